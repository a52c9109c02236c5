"""Names as people read them, as they are sent, and their order; sums of digests."""

import msgspec
from weightsync.orchestrator.protocol.names import NO_BYTES, Member, RoundName, Version, add_digests


def test_names_in_log_lines() -> None:
    assert str(Member("trainer", "", 3)) == "trainer/3"
    assert str(Member("inference", "glm-a", 1)) == "glm-a/1"
    assert str(Version(255, 40)) == "step 40 (generation ff)"
    assert str(RoundName(2, 9)) == "2.9"


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
