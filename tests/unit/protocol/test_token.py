"""What the bytes of a token file may be."""

import pytest
from weightsync.orchestrator.protocol.token import MAX_TOKEN_BYTES, TokenError, parse_token, parse_tokens


@pytest.mark.parametrize(
    ("data", "token"),
    [
        (b"abc-123", "abc-123"),
        (b"abc-123\n", "abc-123"),
        (b"\t abc-123 \r\n\n", "abc-123"),
        (b"!~", "!~"),
        (b"x" * MAX_TOKEN_BYTES, "x" * 4096),
    ],
)
def test_one_line_without_white_space_around_it(data: bytes, token: str) -> None:
    assert parse_token(data, "F") == token


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "token file F is empty"),
        (b" \n", "token file F is empty"),
        (b"two words", "without blanks"),
        (b"two\nlines", "one line, not 2"),
        (b"two\nor\nthree", "holds 3 lines"),
        (b"a\x00b", "printable"),
        ("ä".encode(), "ASCII"),
        (b"x" * (MAX_TOKEN_BYTES + 1), "token file F is longer than 4096 bytes"),
    ],
)
def test_what_is_no_token_is_named_without_being_shown(data: bytes, reason: str) -> None:
    with pytest.raises(TokenError, match=reason) as caught:
        parse_token(data, "F")
    assert "two" not in str(caught.value)


def test_two_lines_are_the_token_to_present_and_the_one_before_it() -> None:
    assert parse_tokens(b" new \r\n\nold\n", "F") == ("new", "old")
    assert parse_tokens(b"only", "F") == ("only",)
