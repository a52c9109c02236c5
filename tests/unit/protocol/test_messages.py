"""Caps of messages: what a peer may put into a field, and that the codec holds to it."""

from typing import Any

import msgspec
import pytest
from weightsync.orchestrator.protocol.codec import ProtocolError, decode_from_agent, decode_from_daemon, encode
from weightsync.orchestrator.protocol.edges import PeerTransfer
from weightsync.orchestrator.protocol.limits import MAX_COUNT, MAX_NAME_CHARS, MAX_REASON_CHARS, MAX_WORLD
from weightsync.orchestrator.protocol.messages import (
    Bye,
    Closed,
    EngineStatus,
    Hello,
    HubRendezvous,
    Left,
    Message,
    NixlSettings,
    Ready,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Member, RoundName, Version

HELLO: dict[str, Any] = {
    "type": "Hello", "schema": 2, "run_id": "run", "member": ["trainer", "", 0], "world": 1, "incarnation": 1,
}  # fmt: skip
WELCOME: dict[str, Any] = {
    "type": "Welcome", "epoch": 1, "journal_id": "j", "heartbeat_seconds": 5.0, "lost_after_heartbeats": 3,
    "transport": {"type": "nixl"}, "rendezvous": {"type": "hub"},
}  # fmt: skip


def test_the_least_that_a_hello_says() -> None:
    expected = Hello(schema=2, run_id="run", member=Member("trainer", "", 0), world=1, incarnation=1)
    assert decode_from_agent(msgspec.msgpack.encode(HELLO)) == expected
    assert expected.trainer is expected.engine is None


@pytest.mark.parametrize(
    "change",
    [
        {"world": 1},
        {"world": MAX_WORLD},
        {"incarnation": 2**63 - 1},
        {"run_id": "x" * MAX_NAME_CHARS},
        {"a field of a later release": 1},
    ],
)
def test_what_fits(change: dict[str, Any]) -> None:
    assert isinstance(decode_from_agent(msgspec.msgpack.encode(HELLO | change)), Hello)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"world": 0}, "world"),
        ({"world": MAX_WORLD + 1}, "world"),
        ({"incarnation": -1}, "incarnation"),
        ({"run_id": "x" * (MAX_NAME_CHARS + 1)}, "run_id"),
        ({"member": ["spectator", "", 0]}, "member"),
        ({"member": ["trainer", "", -1]}, "member"),
        ({"member": ["trainer", "", MAX_WORLD]}, "member"),
        ({"member": ["trainer", "x", 0]}, "belongs to no engine, but this one to 'x'"),
        ({"member": ["inference", "", 0]}, "'' is no engine's name"),
        ({"member": ["inference", "e/0", 0]}, "'e/0' is no engine's name: use 1 to 128 letters"),
        ({"member": ["inference", "e\n", 0]}, "is no engine's name"),
        ({"incarnation": 2**63}, "incarnation"),
        ({"generation": 2**63}, "generation"),
        ({"epoch_seen": MAX_COUNT + 1}, "epoch_seen"),
        ({"pid": 2**53 + 1}, "pid"),
        ({"trainer": {"staged": [1, 10**18]}}, "staged"),
        ({"trainer": {"staged": [-1, 1]}}, "staged"),
        ({"trainer": {"open_rounds": [[1, -1]]}}, "open_rounds"),
        ({"schema": "1"}, "schema"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ProtocolError, match=field):
        decode_from_agent(msgspec.msgpack.encode(HELLO | change))


def test_free_text_is_bounded() -> None:
    assert decode_from_agent(encode(Bye(reason="x" * MAX_REASON_CHARS))) == Bye(reason="x" * 4000)
    with pytest.raises(ProtocolError, match="reason"):
        decode_from_agent(msgspec.msgpack.encode({"type": "Bye", "reason": "x" * (MAX_REASON_CHARS + 1)}))
    assert len(Bye(reason="x" * 9999).reason) == MAX_REASON_CHARS, "what we say is taken back"
    with pytest.raises(ProtocolError, match="fault"):
        decode_from_agent(encode(Closed(round=RoundName(1, 1), fault="somebody")))  # type: ignore[arg-type]


def test_a_welcome_says_when_silence_is_a_loss() -> None:
    welcome = decode_from_daemon(msgspec.msgpack.encode(WELCOME))
    assert welcome == Welcome(
        epoch=1, journal_id="j", heartbeat_seconds=5.0, lost_after_heartbeats=3, transport=NixlSettings(),
        rendezvous=HubRendezvous(),
    )  # fmt: skip
    for change in ({"lost_after_heartbeats": 0}, {"transport": {"type": "pigeon"}}):
        with pytest.raises(ProtocolError, match=next(iter(change))):
            decode_from_daemon(msgspec.msgpack.encode(WELCOME | change))


@pytest.mark.parametrize(
    "message",
    [
        Ready(fingerprint="f"),
        Closed(round=RoundName(1, 2), peers=(PeerTransfer(Member("inference", "e", 1), 8, 1, 0.5, (2**64 - 1, 0)),)),
        Left(round=RoundName(1, 2), status=EngineStatus(applied=Version(2**62, 40), torn=True)),
    ],
)
def test_nested_values_survive(message: Message) -> None:
    assert decode_from_agent(encode(message)) == message
