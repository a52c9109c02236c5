"""The WebSocket endpoint: whatever the pieces that bytes come in, and whatever a peer does wrong."""

import contextlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Close, CloseCode, Frame, Opcode
from websockets.protocol import Side
from weightsync.orchestrator.protocol.websocket import (
    MAX_CONTROL_BYTES,
    MAX_FRAGMENTS,
    Endpoint,
    FrameError,
    message_frame,
)

LIMIT = 100_000
NO_MASK = bytes(4)
"""What is XORed with it stays as it is: for headers written by hand."""


def client() -> Endpoint:
    return Endpoint(Side.CLIENT, LIMIT)


def server(limit: int = LIMIT) -> Endpoint:
    return Endpoint(Side.SERVER, limit)


def frame(opcode: Opcode, payload: bytes, *, masked: bool = True) -> bytes:
    """As a client's, unless ``masked`` is False; control frames of any length."""
    whole = Frame(Opcode.BINARY, payload).serialize(mask=masked)
    return bytes([0x80 | opcode]) + whole[1:]


def fragment(opcode: Opcode, payload: bytes, *, last: bool) -> bytes:
    return Frame(opcode, payload, fin=last).serialize(mask=True)


@given(st.binary(max_size=2000), st.binary(min_size=4, max_size=4))
def test_a_clients_message_is_xor_with_its_repeated_key(data: bytes, key: bytes) -> None:
    header = bytes([0x82, 0x80 | 126]) + len(data).to_bytes(2) + key
    assert server().receive(header + bytes(byte ^ key[place % 4] for place, byte in enumerate(data))) == [data]
    sent = client().message(data)
    body = sent[len(sent) - len(data) :]
    drawn = sent[len(sent) - len(data) - 4 : len(sent) - len(data)]
    assert body == bytes(byte ^ drawn[place % 4] for place, byte in enumerate(data))


def test_a_servers_frame_is_the_same_for_every_peer() -> None:
    assert server().message(b"abc") == message_frame(b"abc", Side.SERVER) == b"\x82\x03abc"
    assert client().message(b"abc") != client().message(b"abc"), "the mask is drawn for each frame"


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
        stream += fragment(Opcode.CONT, part, last=False) + frame(Opcode.PING, b"in between")
    stream += fragment(Opcode.CONT, parts[-1], last=True)
    assert receiver.receive(stream) == [b"".join(parts)]
    assert receiver.answers() == frame(Opcode.PONG, b"in between", masked=False) * (len(parts) - 2)


def test_ping_is_answered_and_pong_is_not() -> None:
    endpoint = server()
    assert endpoint.receive(frame(Opcode.PONG, b"") + frame(Opcode.PING, b"alive?")) == []
    assert endpoint.answers() == frame(Opcode.PONG, b"alive?", masked=False)
    assert endpoint.answers() == b""


def test_close_is_answered_once_and_ends_reading() -> None:
    one, other = client(), server()
    assert other.receive(one.close(CloseCode.GOING_AWAY, "good bye") + one.message(b"after it")) == []
    assert other.peer_closed == Close(CloseCode.GOING_AWAY, "good bye")
    assert one.receive(other.answers()) == []
    assert one.peer_closed == Close(CloseCode.GOING_AWAY, "good bye"), "the answer repeats what it answers"
    assert one.answers() == b""
    assert other.close(CloseCode.NORMAL_CLOSURE, "again") == b""
    assert other.receive(one.message(b"much later")) == []


def test_a_close_without_code_is_a_close() -> None:
    endpoint = server()
    endpoint.receive(frame(Opcode.CLOSE, b""))
    assert endpoint.peer_closed == Close(CloseCode.NO_STATUS_RCVD, "")


def test_a_long_close_reason_is_cut_between_characters() -> None:
    endpoint = client()
    endpoint.receive(server().close(CloseCode.MESSAGE_TOO_BIG, "ä" * 100))
    assert endpoint.peer_closed == Close(CloseCode.MESSAGE_TOO_BIG, "ä" * ((MAX_CONTROL_BYTES - 2) // 2))


@pytest.mark.parametrize("header_bytes", [4, 10])
def test_a_length_above_the_limit_fails_before_its_payload_comes(header_bytes: int) -> None:
    endpoint = server(1000)
    header = frame(Opcode.BINARY, bytes(1001 if header_bytes == 4 else 70_000))[:header_bytes]
    with pytest.raises(FrameError, match="exceeds limit of 1000 bytes") as caught:
        endpoint.receive(header)
    assert caught.value.code == CloseCode.MESSAGE_TOO_BIG


def test_the_limit_may_be_raised_and_lowered_between_messages() -> None:
    endpoint = server(10)
    assert endpoint.receive(client().message(bytes(10))) == [bytes(10)]
    endpoint.limit_messages(1000)
    assert endpoint.receive(client().message(bytes(1000))) == [bytes(1000)]
    endpoint.limit_messages(10)
    with pytest.raises(FrameError, match="11 bytes exceeds limit of 10 bytes"):
        endpoint.receive(client().message(bytes(11)))


def test_after_a_violation_the_peer_is_told_and_nothing_more_is_read() -> None:
    endpoint = server()
    with pytest.raises(FrameError, match="text frame"):
        endpoint.receive(frame(Opcode.TEXT, b"x"))
    assert endpoint.receive(client().message(b"y")) == []
    peer = client()
    peer.receive(endpoint.close(CloseCode.UNSUPPORTED_DATA, "whatever its owner says"))
    assert peer.peer_closed == Close(CloseCode.UNSUPPORTED_DATA, "a text frame: messages are binary")
    assert endpoint.close(CloseCode.NORMAL_CLOSURE, "") == b""


@pytest.mark.parametrize("masked", [True, False])
def test_a_violation_counts_although_a_close_came_with_it(masked: bool) -> None:
    endpoint, peer = (server(), client()) if masked else (client(), server())
    with pytest.raises(FrameError, match="text frame"):
        endpoint.receive(frame(Opcode.TEXT, b"x", masked=masked) + peer.close(CloseCode.NORMAL_CLOSURE, "bye"))
    peer.receive(endpoint.close(CloseCode.UNSUPPORTED_DATA, "too late: the answer to its Close has been made"))
    assert peer.peer_closed == Close(CloseCode.NORMAL_CLOSURE, "bye")
    assert endpoint.receive(b"whatever comes now") == []


def test_a_message_may_be_answered_although_the_peers_close_was_read_with_it() -> None:
    one, other = client(), server()
    assert other.receive(one.message(b"last words") + one.close(CloseCode.NORMAL_CLOSURE, "")) == [b"last words"]
    assert one.receive(other.message(b"answer") + other.answers()) == [b"answer"]


def test_fragments_count_together() -> None:
    endpoint = server(1000)
    endpoint.receive(fragment(Opcode.BINARY, bytes(600), last=False))
    with pytest.raises(FrameError, match="600 bytes after reading 600 bytes exceeds limit of 1000 bytes"):
        endpoint.receive(fragment(Opcode.CONT, bytes(600), last=True))


def test_empty_fragments_do_not_pile_up() -> None:
    endpoint = server()
    endless = fragment(Opcode.BINARY, b"", last=False)
    endless += fragment(Opcode.CONT, b"", last=False) * MAX_FRAGMENTS
    with pytest.raises(FrameError, match="fragments"):
        endpoint.receive(endless)


@pytest.mark.parametrize(
    ("data", "code", "reason"),
    [
        pytest.param(frame(Opcode.BINARY, b"x", masked=False), CloseCode.PROTOCOL_ERROR, "masking", id="unmasked"),
        pytest.param(frame(Opcode.TEXT, b"x"), CloseCode.UNSUPPORTED_DATA, "text", id="text"),
        pytest.param(b"\xc2\x80" + NO_MASK, CloseCode.PROTOCOL_ERROR, "reserved", id="compressed"),
        pytest.param(b"\x83\x80" + NO_MASK, CloseCode.PROTOCOL_ERROR, "invalid opcode", id="unknown data"),
        pytest.param(b"\x8b\x80" + NO_MASK, CloseCode.PROTOCOL_ERROR, "invalid opcode", id="unknown control"),
        pytest.param(b"\x09\x80" + NO_MASK, CloseCode.PROTOCOL_ERROR, "fragmented control frame", id="fragmented ping"),
        pytest.param(frame(Opcode.PING, bytes(126)), CloseCode.PROTOCOL_ERROR, "frame too long", id="long ping"),
        pytest.param(frame(Opcode.CONT, b""), CloseCode.PROTOCOL_ERROR, "unexpected continuation", id="no first part"),
    ],
)
def test_violations(data: bytes, code: CloseCode, reason: str) -> None:
    with pytest.raises(FrameError, match=reason) as caught:
        server().receive(data)
    assert caught.value.code == code


def test_a_new_message_inside_a_fragmented_one() -> None:
    endpoint = server()
    endpoint.receive(fragment(Opcode.BINARY, b"x", last=False))
    with pytest.raises(FrameError, match="expected a continuation frame"):
        endpoint.receive(frame(Opcode.BINARY, b"y"))


def test_a_masked_frame_from_a_server() -> None:
    with pytest.raises(FrameError, match="masking"):
        client().receive(frame(Opcode.BINARY, b"x"))


@given(st.binary(max_size=200))
def test_junk_is_messages_or_a_frame_error_and_nothing_else(junk: bytes) -> None:
    endpoint = server()
    with contextlib.suppress(FrameError):
        endpoint.receive(junk)
