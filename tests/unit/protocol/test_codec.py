"""Frames of msgpack: what comes out is what went in, and anything else is one typed error."""

import msgspec
import pytest
from weightsync.orchestrator.protocol import codec
from weightsync.orchestrator.protocol.codec import (
    ProtocolError,
    SchemaMismatch,
    decode_first,
    decode_from_agent,
    decode_from_daemon,
    encode,
)
from weightsync.orchestrator.protocol.limits import MAX_FRAME_BYTES, MAX_HELLO_BYTES, SCHEMA_VERSION
from weightsync.orchestrator.protocol.messages import Heartbeat, Hello, Outcome, Ready
from weightsync.orchestrator.protocol.names import Member, Version

READY = Ready(fingerprint="f")
OUTCOME = Outcome(version=Version(1, 2), committed=True)
HELLO = Hello(schema=SCHEMA_VERSION, run_id="run", member=Member("trainer", "", 3), world=4, incarnation=1)


def test_a_message_is_a_map_with_its_class_name_as_tag() -> None:
    assert msgspec.msgpack.decode(encode(READY)) == {"type": "Ready", "fingerprint": "f", "failed": []}


def test_each_side_reads_what_the_other_says() -> None:
    assert decode_from_agent(encode(READY)) == READY
    assert decode_from_daemon(encode(OUTCOME)) == OUTCOME
    assert decode_from_agent(encode(Heartbeat())) == decode_from_daemon(encode(Heartbeat())) == Heartbeat()


def test_nobody_may_speak_for_the_other_side() -> None:
    with pytest.raises(ProtocolError, match="malformed frame"):
        decode_from_agent(encode(OUTCOME))
    with pytest.raises(ProtocolError, match="malformed frame"):
        decode_from_daemon(encode(READY))


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"junk", encode(READY)[:-1], encode(READY) + b"\x00", b"\x91" * 100_000]
)
def test_what_is_no_message_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"malformed frame of {len(data)} bytes"):
        decode_from_agent(data)


def test_a_frame_above_its_limit_is_not_decoded() -> None:
    data = encode(READY)
    assert decode_from_agent(data, len(data)) == READY
    with pytest.raises(ProtocolError, match=f"frame of {len(data)} bytes exceeds the limit of {len(data) - 1}"):
        decode_from_agent(data, len(data) - 1)


def test_a_message_above_the_limit_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_FRAME_BYTES == 67_108_864
    monkeypatch.setattr(codec, "MAX_FRAME_BYTES", len(encode(READY)) - 1)
    with pytest.raises(ProtocolError, match="Ready of 34 bytes exceeds the limit of 33"):
        encode(READY)


def test_the_first_message_is_a_hello() -> None:
    assert decode_first(encode(HELLO), MAX_HELLO_BYTES) == HELLO
    with pytest.raises(ProtocolError, match="the first message is Ready and not Hello"):
        decode_first(encode(READY), MAX_HELLO_BYTES)
    with pytest.raises(ProtocolError, match="exceeds the limit of 10"):
        decode_first(encode(HELLO), 10)


def test_a_hello_of_another_schema_is_explained_even_if_it_cannot_be_decoded() -> None:
    data = msgspec.msgpack.encode({"type": "Hello", "schema": 99, "novelty": [1, 2]})
    with pytest.raises(SchemaMismatch, match=f"it speaks schema 99, the daemon {SCHEMA_VERSION}; install the same"):
        decode_first(data, MAX_HELLO_BYTES)
    decodable = msgspec.structs.replace(HELLO, schema=99)
    assert decode_first(encode(decodable), MAX_HELLO_BYTES) == decodable, "whether to take it in is not decided here"


def test_a_broken_hello_of_this_schema_is_a_protocol_error() -> None:
    data = msgspec.msgpack.encode({"type": "Hello", "schema": SCHEMA_VERSION})
    with pytest.raises(ProtocolError, match="malformed frame") as caught:
        decode_first(data, MAX_HELLO_BYTES)
    assert not isinstance(caught.value, SchemaMismatch)
