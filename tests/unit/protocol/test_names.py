"""Names as people read them, as they are sent, and their order; sums of digests."""

from typing import Any

import msgspec
import pytest
from weightsync.orchestrator.protocol.layout import ITEMSIZE
from weightsync.orchestrator.protocol.names import (
    NO_BYTES,
    SAVED_PREFIX,
    SCALING,
    SCALING_DTYPE,
    SCALING_SHAPE,
    Member,
    RoundName,
    Version,
    add_digests,
)


def test_names_in_log_lines() -> None:
    assert str(Member("trainer", "", 3)) == "trainer/3"
    assert str(Member("inference", "glm-a", 1)) == "glm-a/1"
    assert str(Version(255, 40)) == "step 40 (generation 255)"
    assert str(RoundName(2, 9)) == "2.9"


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (("trainer", "", -1), "rank -1 is not one from 0 to 65535"),
        (("trainer", "", 65536), "rank 65536 is not one"),
        (("trainer", "x", 0), "a trainer rank belongs to no engine, but this one to 'x'"),
        (("inference", "", 0), "'' is no engine's name"),
        (("inference", "a/b", 0), "'a/b' is no engine's name"),
        (("inference", "x" * 129, 0), "is no engine's name"),
    ],
)
def test_a_member_is_one_place_with_one_name(wrong: tuple[Any, ...], why: str) -> None:
    """Else ``trainer/0`` could be two of them, or none."""
    with pytest.raises(ValueError, match=why):
        Member(*wrong)


def test_they_travel_as_arrays() -> None:
    assert msgspec.json.encode(Member("trainer", "", 3)) == b'["trainer","",3]'
    assert msgspec.json.encode(Version(7, 40)) == b"[7,40]"
    assert msgspec.json.decode(b"[2,9]", type=RoundName) == RoundName(2, 9)


def test_rounds_are_ordered_by_epoch_and_then_by_number() -> None:
    assert sorted([RoundName(2, 1), RoundName(1, 9), RoundName(1, 10)]) == [
        RoundName(1, 9),
        RoundName(1, 10),
        RoundName(2, 1),
    ]


def test_digests_add_up_modulo_two_to_the_64th() -> None:
    assert add_digests() == NO_BYTES == (0, 0)
    assert add_digests((1, 2), (3, 4), (5, 6)) == (9, 12)
    assert add_digests((2**64 - 1, 2**63), (2, 2**63)) == (1, 0)


def test_the_scaling_is_two_float64() -> None:
    assert ITEMSIZE[SCALING_DTYPE] == 8
    assert SCALING_SHAPE == (2,)
    assert not SCALING.startswith(SAVED_PREFIX), "no name of peft's can be taken for it"
