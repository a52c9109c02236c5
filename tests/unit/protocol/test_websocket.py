"""The WebSocket endpoint: whatever the pieces that bytes come in, and whatever a peer does wrong."""

import contextlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from weightsync.orchestrator.protocol.websocket import (
    MAX_CONTROL_BYTES,
    MAX_FRAGMENTS,
    CloseCode,
    Endpoint,
    FrameError,
    Opcode,
    frame,
    mask,
)

LIMIT = 100_000
KEY = b"\x01\x82\x03\xfe"


def client() -> Endpoint:
    return Endpoint(LIMIT, lambda: KEY)


def server() -> Endpoint:
    return Endpoint(LIMIT, None)


def fragment(opcode: Opcode, payload: bytes, *, last: bool) -> bytes:
    whole = frame(opcode, payload, KEY)
    return whole if last else bytes([whole[0] & 0x7F]) + whole[1:]


@given(st.binary(max_size=2000), st.binary(min_size=4, max_size=4))
def test_mask_is_xor_with_the_repeated_key(data: bytes, key: bytes) -> None:
    assert mask(data, key) == bytes(byte ^ key[place % 4] for place, byte in enumerate(data))


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 255, 256, 65_535, 65_536, LIMIT])
def test_every_length_travels_both_ways(size: int) -> None:
    payload = bytes(range(256)) * (size // 256 + 1)
    payload = payload[:size]
    assert server().receive(client().message(payload)) == [payload]
    assert client().receive(server().message(payload)) == [payload]


@given(st.lists(st.binary(max_size=300), max_size=8), st.data())
def test_pieces_do_not_matter(payloads: list[bytes], data: st.DataObject) -> None:
    sender, receiver = client(), server()
    stream = b"".join(sender.message(payload) for payload in payloads)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    received: list[bytes] = []
    for start, end in pairwise([0, *cuts, len(stream)]):
        received += receiver.receive(stream[start:end])
    assert received == payloads


@given(st.lists(st.binary(max_size=50), min_size=2, max_size=6))
def test_fragments_make_one_message_around_control_frames(parts: list[bytes]) -> None:
    receiver = server()
    stream = fragment(Opcode.BINARY, parts[0], last=False)
    for part in parts[1:-1]:
        stream += fragment(Opcode.CONTINUATION, part, last=False) + frame(Opcode.PING, b"in between", KEY)
    stream += fragment(Opcode.CONTINUATION, parts[-1], last=True)
    assert receiver.receive(stream) == [b"".join(parts)]
    assert receiver.answers() == frame(Opcode.PONG, b"in between") * (len(parts) - 2)


def test_ping_is_answered_and_pong_is_not() -> None:
    endpoint = server()
    assert endpoint.receive(frame(Opcode.PONG, b"", KEY) + frame(Opcode.PING, b"alive?", KEY)) == []
    assert endpoint.answers() == frame(Opcode.PONG, b"alive?")
    assert endpoint.answers() == b""


def test_close_is_answered_once_and_ends_reading() -> None:
    one, other = client(), server()
    assert other.receive(one.close(CloseCode.GOING_AWAY, "good bye") + one.message(b"after it")) == []
    assert other.peer_closed == (CloseCode.GOING_AWAY, "good bye")
    assert one.receive(other.answers()) == []
    assert one.peer_closed == (CloseCode.NORMAL, "")
    assert one.answers() == b""
    assert other.close(CloseCode.NORMAL, "again") == b""
    assert other.receive(one.message(b"much later")) == []


def test_a_close_without_code_is_a_close() -> None:
    endpoint = server()
    endpoint.receive(frame(Opcode.CLOSE, b"", KEY))
    assert endpoint.peer_closed == (CloseCode.NO_CODE, "")


def test_a_long_close_reason_is_cut_between_characters() -> None:
    endpoint = client()
    endpoint.receive(server().close(CloseCode.TOO_BIG, "ä" * 100))
    assert endpoint.peer_closed == (CloseCode.TOO_BIG, "ä" * ((MAX_CONTROL_BYTES - 2) // 2))


@pytest.mark.parametrize("header_bytes", [4, 10])
def test_a_length_above_the_limit_fails_before_its_payload_comes(header_bytes: int) -> None:
    endpoint = Endpoint(1000, None)
    header = frame(Opcode.BINARY, bytes(1001 if header_bytes == 4 else 70_000), KEY)[:header_bytes]
    with pytest.raises(FrameError, match="exceeds the limit of 1000") as caught:
        endpoint.receive(header)
    assert caught.value.code is CloseCode.TOO_BIG


def test_fragments_count_together() -> None:
    endpoint = Endpoint(1000, None)
    endpoint.receive(fragment(Opcode.BINARY, bytes(600), last=False))
    with pytest.raises(FrameError, match="frame of 1200 bytes exceeds"):
        endpoint.receive(fragment(Opcode.CONTINUATION, bytes(600), last=True))


def test_empty_fragments_do_not_pile_up() -> None:
    endpoint = server()
    endless = fragment(Opcode.BINARY, b"", last=False)
    endless += fragment(Opcode.CONTINUATION, b"", last=False) * MAX_FRAGMENTS
    with pytest.raises(FrameError, match="fragments"):
        endpoint.receive(endless)


@pytest.mark.parametrize(
    ("data", "code", "reason"),
    [
        pytest.param(frame(Opcode.BINARY, b"x"), CloseCode.PROTOCOL_ERROR, "unmasked", id="unmasked"),
        pytest.param(frame(Opcode.TEXT, b"x", KEY), CloseCode.UNSUPPORTED_DATA, "text", id="text"),
        pytest.param(b"\xc2\x80" + KEY, CloseCode.PROTOCOL_ERROR, "reserved", id="compressed"),
        pytest.param(b"\x83\x80" + KEY, CloseCode.PROTOCOL_ERROR, "unknown kind 0x3", id="unknown data"),
        pytest.param(b"\x8b\x80" + KEY, CloseCode.PROTOCOL_ERROR, "unknown kind 0xb", id="unknown control"),
        pytest.param(b"\x09\x80" + KEY, CloseCode.PROTOCOL_ERROR, "control frame in parts", id="fragmented ping"),
        pytest.param(frame(Opcode.PING, bytes(126), KEY), CloseCode.PROTOCOL_ERROR, "126 bytes", id="long ping"),
        pytest.param(frame(Opcode.CONTINUATION, b"", KEY), CloseCode.PROTOCOL_ERROR, "out of turn", id="no first part"),
    ],
)
def test_violations(data: bytes, code: CloseCode, reason: str) -> None:
    with pytest.raises(FrameError, match=reason) as caught:
        server().receive(data)
    assert caught.value.code is code


def test_a_new_message_inside_a_fragmented_one() -> None:
    endpoint = server()
    endpoint.receive(fragment(Opcode.BINARY, b"x", last=False))
    with pytest.raises(FrameError, match="out of turn"):
        endpoint.receive(frame(Opcode.BINARY, b"y", KEY))


def test_a_masked_frame_from_a_server() -> None:
    with pytest.raises(FrameError, match="masked"):
        client().receive(frame(Opcode.BINARY, b"x", KEY))


@given(st.binary(max_size=200))
def test_junk_is_messages_or_a_frame_error_and_nothing_else(junk: bytes) -> None:
    endpoint = server()
    with contextlib.suppress(FrameError):
        endpoint.receive(junk)
