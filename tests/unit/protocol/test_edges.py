"""What is said of one edge keeps to its bounds, and its errors are fit to be told."""

from typing import get_args

import msgspec
import pytest
from weightsync.orchestrator.protocol.edges import RATES, EdgeFailure, LinkKind, PeerTransfer
from weightsync.orchestrator.protocol.names import Member

PEER = Member("inference", "e", 1)
MOVED = PeerTransfer(PEER, 8, 1, 0.5, (2**64 - 1, 0))


def test_it_travels_as_it_is() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(MOVED), type=PeerTransfer) == MOVED


def test_its_error_is_of_one_line() -> None:
    assert EdgeFailure(PEER, "no route\nto \ud800").error == "no route to \\ud800"
    assert len(EdgeFailure(PEER, "x" * 9999).error) == 4000


@pytest.mark.parametrize(
    "change", [{"bytes": -1}, {"descriptors": 2**54}, {"seconds": float("nan")}, {"digest": [-1, 0]}]
)
def test_no_number_is_outside_of_its_bounds(change: dict[str, object]) -> None:
    wire = msgspec.to_builtins(MOVED) | change
    with pytest.raises(msgspec.ValidationError, match=next(iter(change))):
        msgspec.convert(wire, PeerTransfer)


def test_every_link_that_can_be_measured_has_a_rate_and_no_link_is_expected_to_be_slower_than_the_slowest() -> None:
    assert set(RATES) == set(get_args(LinkKind)) - {"files", "unknown"}
    for rate in RATES.values():
        assert 0 < rate.least < rate.bytes_per_second / 2
        assert rate.source.startswith(("measured: ", "published: "))
