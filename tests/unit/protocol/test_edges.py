"""What is said of one edge keeps to its bounds, and its errors are fit to be told."""

from typing import Any, get_args

import msgspec
import pytest
from weightsync.orchestrator.protocol.edges import (
    FINGERPRINT_CHARS,
    RATES,
    EdgeFailure,
    LinkKind,
    NixlSettings,
    Peer,
    PeerTransfer,
    reached_fingerprint,
)
from weightsync.orchestrator.protocol.limits import MAX_NET_DEVICES
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


def test_settings_arrive_as_they_were() -> None:
    said = NixlSettings(stall_seconds=12.5, net_devices=("eth1", "mlx5_0:1"))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(said), type=NixlSettings) == said


@pytest.mark.parametrize(
    ("field", "value"), [("stall_seconds", 0.0), ("rails", 0), ("net_devices", ["x"] * (MAX_NET_DEVICES + 1))]
)
def test_what_is_out_of_bounds_is_refused(field: str, value: Any) -> None:
    with pytest.raises(msgspec.ValidationError, match=field):
        msgspec.convert({"type": "nixl", field: value}, type=NixlSettings)


def test_every_link_that_can_be_measured_has_a_rate_and_no_link_is_expected_to_be_slower_than_the_slowest() -> None:
    assert set(RATES) == set(get_args(LinkKind)) - {"files", "unknown"}
    for rate in RATES.values():
        assert 0 < rate.least < rate.bytes_per_second / 2
        assert rate.source.startswith(("measured: ", "published: "))


@pytest.mark.parametrize(
    "change", [{"endpoint_name": "e/1-2"}, {"incarnation": 8}, {"member": Member("inference", "e", 2)}]
)
def test_an_edge_set_is_another_one_when_a_peer_is_to_be_reached_elsewhere(change: dict[str, Any]) -> None:
    peers = Peer(PEER, 7, "e/1-1", b"where", ()), Peer(Member("inference", "f", 0), 9, "f/0-1", b"", ())
    known = reached_fingerprint("part", peers)
    assert len(known) == FINGERPRINT_CHARS
    assert reached_fingerprint("part", list(peers)) == known
    moved = msgspec.structs.replace(peers[0], **change)
    assert len({known, reached_fingerprint("part", (moved, peers[1])), reached_fingerprint("other", peers)}) == 3
    assert reached_fingerprint("part", (msgspec.structs.replace(peers[0], endpoint=b"its port"), peers[1])) == known
