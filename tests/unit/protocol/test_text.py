"""Text of others is of one line, bounded and encodable, and still tells what it said."""

import os
import random

import pytest
from weightsync.orchestrator.protocol.limits import MAX_REASON_CHARS
from weightsync.orchestrator.protocol.text import clean


def test_a_text_is_cut_to_its_limit_with_a_mark() -> None:
    assert clean("x" * MAX_REASON_CHARS) == "x" * 4000
    assert clean("x" * (MAX_REASON_CHARS + 1)) == "x" * 3999 + "…"
    assert clean("abc", 2) == "a…"
    assert clean("\x00" * 10, 8) == "\\x00\\x0…", "also when cleaning made it longer"


def test_what_is_fit_is_left_alone() -> None:
    text = "tensor 'w' ≠ größer: 𝄞 🙂"
    assert clean(text) is text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines\tand\r\ntabs", "two lines and  tabs"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        (os.fsdecode(b"step_\xff\xfe"), "step_\\xff\\xfe"),
        ("lone \ud800 surrogate", "lone \\ud800 surrogate"),
        ("gp\u202egnp.exe\u2069", "gp\\u202egnp.exe\\u2069"),
        ("a\u2028b\x85c", "a b c"),
        ("\x9b31m", "\\x9b31m"),
    ],
)
def test_what_is_not_is_shown_by_its_escape(text: str, shown: str) -> None:
    assert clean(text) == shown


def test_any_text_can_be_encoded_and_is_of_one_line() -> None:
    chance = random.Random(5)
    for _ in range(2000):
        text = "".join(chr(chance.randrange(chance.choice([0x100, 0x3000, 0x110000]))) for _ in range(40))
        tidy = clean(text, chance.choice([1, 7, 4000]))
        assert len(tidy.encode().decode().splitlines()) <= 1
        assert clean(tidy) == tidy
