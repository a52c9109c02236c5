"""Every number, text and list that crosses a process boundary has a bound, and decoding holds it to that."""

import random

import msgspec
import pytest
from bounded import outside, packed, unbounded, value
from weightsync.orchestrator.protocol.codec import ProtocolError, decode_from_agent, decode_from_daemon, encode
from weightsync.orchestrator.protocol.fields import Spoken
from weightsync.orchestrator.protocol.limits import MAX_REASON_CHARS
from weightsync.orchestrator.protocol.markers import Manifest
from weightsync.orchestrator.protocol.messages import FromAgent, FromDaemon

DIRECTIONS = {"from an agent": (FromAgent, decode_from_agent), "from the daemon": (FromDaemon, decode_from_daemon)}


@pytest.mark.parametrize("kind", [FromAgent, FromDaemon, Manifest])
def test_nothing_is_without_a_bound(kind: object) -> None:
    assert unbounded(kind) == []


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_whatever_is_within_its_bounds_survives(direction: str) -> None:
    kind, decode = DIRECTIONS[direction]
    chance = random.Random(11)
    for _ in range(600):
        message = decode(packed(value(kind, chance)))
        assert decode(encode(message)) == message


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_number_outside_of_its_bounds_is_taken(direction: str) -> None:
    kind, decode = DIRECTIONS[direction]
    chance, tried = random.Random(12), set()
    for message in kind.__args__:
        for _ in range(6):
            for path, wire in outside(message, chance):
                tried.add(path)
                with pytest.raises(ProtocolError, match="malformed frame"):
                    decode(packed(wire))
    expected = "PeerTransfer.seconds" if kind is FromAgent else "Welcome.heartbeat_seconds"
    assert any(path.endswith(expected) for path in tried)
    assert len(tried) >= 8


class Said(Spoken, frozen=True):
    who: str
    what: str
    spoken = ("what",)


def test_free_text_is_cleaned_whoever_makes_the_struct() -> None:
    long = "prefix: " + "x" * MAX_REASON_CHARS
    assert len(Said("a\n", long).what) == MAX_REASON_CHARS
    assert Said("a\n", "b\n\ud800") == Said("a\n", "b \\ud800")
    assert msgspec.msgpack.decode(packed({"who": "a", "what": "b\x00"}), type=Said).what == "b\\x00"
