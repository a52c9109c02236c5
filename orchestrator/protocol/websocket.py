"""One side of a WebSocket connection after its handshake (RFC 6455): bytes in, messages and bytes out, no I/O.

Both ends of the control channel use it instead of a library's streams for two reasons. Limits hold before memory is
taken: a length above the limit of the moment ends the connection when its header arrives. And a message costs no task
switch: it is handled in the call that read it, which is what a barrier over thousands of agents consists of.
"""

import enum
import struct
from collections.abc import Callable
from typing import Final

import numpy as np
from weightsync.orchestrator.protocol.codec import ProtocolError

MAX_CONTROL_BYTES: Final = 125
"""RFC 6455 §5.5: payload of a ping, pong or close."""

MAX_FRAGMENTS: Final = 4096
"""Of one message. Neither side of ours fragments; a proxy may, by its buffer, and empty fragments must cost nothing."""

_FIN: Final = 0x80
_RESERVED: Final = 0x70
_MASKED: Final = 0x80
_LENGTH: Final = 0x7F
_TWO_BYTES, _EIGHT_BYTES = 126, 127
_MASK_BYTES: Final = 4
_CODE_BYTES: Final = 2

_WORDS_PAY_FROM: Final = 256
"""Bytes from which masking by words of an array is faster than by one long integer."""


class Opcode(enum.IntEnum):
    """RFC 6455 §5.2."""

    CONTINUATION = 0x0
    TEXT = 0x1
    BINARY = 0x2
    CLOSE = 0x8
    PING = 0x9
    PONG = 0xA


class CloseCode(enum.IntEnum):
    """RFC 6455 §7.4.1, those that are used here."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    UNSUPPORTED_DATA = 1003
    NO_CODE = 1005
    POLICY_VIOLATION = 1008
    TOO_BIG = 1009


class FrameError(ProtocolError):
    """The peer broke RFC 6455 or a limit; ``code`` is what to close the connection with."""

    def __init__(self, code: CloseCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def mask(data: bytes, key: bytes) -> bytes:
    """``data`` XOR ``key`` repeated; its own inverse (RFC 6455 §5.3)."""
    size = len(data)
    if size < _WORDS_PAY_FROM:
        repeated = (key * (size // _MASK_BYTES + 1))[:size]
        return (int.from_bytes(data, "little") ^ int.from_bytes(repeated, "little")).to_bytes(size, "little")
    whole = size - size % _MASK_BYTES
    words = np.frombuffer(data, "<u4", whole // _MASK_BYTES) ^ np.uint32(int.from_bytes(key, "little"))
    return words.tobytes() + (mask(data[whole:], key) if whole < size else b"")


def frame(opcode: Opcode, payload: bytes, key: bytes = b"") -> bytes:
    """``payload`` as one unfragmented frame; ``key`` is the mask of a client's, empty for a server's."""
    size, masked = len(payload), _MASKED if key else 0
    if size < _TWO_BYTES:
        head = struct.pack("!BB", _FIN | opcode, masked | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", _FIN | opcode, masked | _TWO_BYTES, size)
    else:
        head = struct.pack("!BBQ", _FIN | opcode, masked | _EIGHT_BYTES, size)
    return head + key + mask(payload, key) if key else head + payload


class Endpoint:
    """The protocol state of one side.

    Args:
        limit: largest message that the peer may send, in bytes; may be raised or lowered at any time.
        mask_key: makes the 4 random bytes of each frame of a client; None on the server's side.

    Attributes:
        outgoing: what the protocol itself wants sent (pongs, the echo of a close); the owner takes it by ``answers``.
        peer_closed: code and reason of the peer's Close, None before it.
    """

    def __init__(self, limit: int, mask_key: Callable[[], bytes] | None) -> None:
        self.limit = limit
        self.outgoing: list[bytes] = []
        self.peer_closed: tuple[int, str] | None = None
        self._close_sent = False
        self._mask_key = mask_key
        self._masked_in = 0 if mask_key else _MASKED
        self._buffer = bytearray()
        self._parts: list[bytes] = []
        self._parts_bytes = 0

    def message(self, payload: bytes) -> bytes:
        """The frame to send for a binary message."""
        return frame(Opcode.BINARY, payload, self._mask_key() if self._mask_key else b"")

    def close(self, code: CloseCode, reason: str) -> bytes:
        """The frame that begins, or answers, the closing handshake; empty when it has been sent before."""
        if self._close_sent:
            return b""
        self._close_sent = True
        text = reason.encode()[: MAX_CONTROL_BYTES - _CODE_BYTES].decode(errors="ignore").encode()
        return self._control(Opcode.CLOSE, struct.pack("!H", code) + text)

    def answers(self) -> bytes:
        """Takes what is to be sent in answer to what was received."""
        data = b"".join(self.outgoing)
        self.outgoing.clear()
        return data

    def receive(self, data: bytes) -> list[bytes]:
        """Binary messages that ``data`` completes. Nothing is read after the peer's Close.

        Raises:
            FrameError: the peer broke the protocol or the limit; messages before that in ``data`` are lost.
        """
        messages: list[bytes] = []
        if self.peer_closed is not None:
            return messages
        if self._buffer:
            self._buffer += data
            self._parse(self._buffer, messages)
            return messages
        # Nearly always the data is one or more whole frames; it is parsed where it is and never copied as a whole.
        taken = self._parse(data, messages)
        if taken < len(data):
            self._buffer += data[taken:]
        return messages

    def _parse(self, data: bytes | bytearray, messages: list[bytes]) -> int:
        """Take whole frames from the front of ``data`` (removing them from a bytearray); returns the bytes taken."""
        start, available = 0, len(data)
        while available - start >= 2 and self.peer_closed is None:
            first, second = data[start], data[start + 1]
            size, body = second & _LENGTH, start + 2
            if size >= _TWO_BYTES:
                wide = 2 if size == _TWO_BYTES else 8
                if available < body + wide:
                    break
                size, body = int.from_bytes(data[body : body + wide]), body + wide
            self._check(first, second, size)
            end = body + (_MASK_BYTES if self._masked_in else 0) + size
            if available < end:
                break
            payload = bytes(data[end - size : end])
            if self._masked_in:
                payload = mask(payload, bytes(data[body : body + _MASK_BYTES]))
            start = end
            if first == _FIN | Opcode.BINARY:
                messages.append(payload)
            else:
                self._unusual(first, payload, messages)
        if isinstance(data, bytearray):
            del data[:start]
        return start

    def _check(self, first: int, second: int, size: int) -> None:
        """What can be said of a frame before its payload has come."""
        if first & _RESERVED:
            raise FrameError(CloseCode.PROTOCOL_ERROR, "a frame with reserved bits: no extension was agreed on")
        if second & _MASKED != self._masked_in:
            raise FrameError(CloseCode.PROTOCOL_ERROR, "a client's frame unmasked, or a server's masked")
        opcode = first & ~_FIN
        if opcode >= Opcode.CLOSE:
            if not first & _FIN or size > MAX_CONTROL_BYTES:
                raise FrameError(CloseCode.PROTOCOL_ERROR, f"a control frame in parts, or of {size} bytes")
        elif size + self._parts_bytes > self.limit:
            size += self._parts_bytes
            raise FrameError(CloseCode.TOO_BIG, f"frame of {size} bytes exceeds the limit of {self.limit}")
        elif (opcode == Opcode.CONTINUATION) != bool(self._parts):
            raise FrameError(CloseCode.PROTOCOL_ERROR, "a fragment out of turn")

    def _unusual(self, first: int, payload: bytes, messages: list[bytes]) -> None:
        """Anything but an unfragmented binary frame."""
        opcode = first & ~_FIN
        if opcode in (Opcode.BINARY, Opcode.CONTINUATION):
            # An empty first fragment is kept too: a non-empty list means that a message is under way.
            self._parts.append(payload)
            self._parts_bytes += len(payload)
            if len(self._parts) > MAX_FRAGMENTS:
                raise FrameError(CloseCode.TOO_BIG, f"a message of more than {MAX_FRAGMENTS} fragments")
            if first & _FIN:
                messages.append(b"".join(self._parts))
                self._parts, self._parts_bytes = [], 0
        elif opcode == Opcode.PING:
            if not self._close_sent:
                self.outgoing.append(self._control(Opcode.PONG, payload))
        elif opcode == Opcode.CLOSE:
            self.peer_closed = _code_and_reason(payload)
            self.outgoing.append(self.close(CloseCode.NORMAL, ""))
        elif opcode == Opcode.TEXT:
            raise FrameError(CloseCode.UNSUPPORTED_DATA, "a text frame: messages are binary")
        elif opcode != Opcode.PONG:
            raise FrameError(CloseCode.PROTOCOL_ERROR, f"a frame of unknown kind {opcode:#x}")

    def _control(self, opcode: Opcode, payload: bytes) -> bytes:
        return frame(opcode, payload, self._mask_key() if self._mask_key else b"")


def _code_and_reason(payload: bytes) -> tuple[int, str]:
    if len(payload) < _CODE_BYTES:
        return CloseCode.NO_CODE, ""
    return int.from_bytes(payload[:_CODE_BYTES]), payload[_CODE_BYTES:].decode(errors="replace")
