"""One agent's connection as the hub sees it: its phase, its deadlines and its bounded way out.

Frames go out through the transport itself and not through a coroutine per send. A server's WebSocket frames are not
masked, so one broadcast is one run of bytes for every peer, and a write that never waits needs no task; the
transport's own buffer is the queue, and its size is what is limited.
"""

import asyncio
import enum
import struct
from dataclasses import dataclass, field
from typing import Final

from aiohttp import web
from weightsync.orchestrator.protocol.limits import MAX_FRAME_BYTES
from weightsync.orchestrator.protocol.messages import Hello
from weightsync.orchestrator.protocol.names import Member

MAX_SEND_QUEUE_BYTES: Final = 2 * MAX_FRAME_BYTES
"""Unsent bytes to one agent: one frame of the largest allowed size, and as much again queued behind it."""

MAX_CLOSE_REASON_BYTES: Final = 123
"""RFC 6455 §5.5: a control frame carries at most 125 bytes, two of which are the close code."""

_FIN_BINARY: Final = 0x82
_ONE_BYTE_LENGTHS: Final = 126
_TWO_BYTE_LENGTHS: Final = 65_536


def server_frame(payload: bytes) -> bytes:
    """``payload`` as one unmasked, unfragmented binary frame (RFC 6455 §5.2)."""
    length = len(payload)
    if length < _ONE_BYTE_LENGTHS:
        return struct.pack("!BB", _FIN_BINARY, length) + payload
    if length < _TWO_BYTE_LENGTHS:
        return struct.pack("!BBH", _FIN_BINARY, 126, length) + payload
    return struct.pack("!BBQ", _FIN_BINARY, 127, length) + payload


def close_reason(text: str) -> bytes:
    """``text`` as UTF-8 within MAX_CLOSE_REASON_BYTES, cut between characters."""
    return text.encode()[:MAX_CLOSE_REASON_BYTES].decode(errors="ignore").encode()


@dataclass(frozen=True, slots=True)
class HubTiming:
    """Total deadlines of one connection, in seconds.

    ``hello_seconds`` bounds the upgrade to Hello and again Hello to the decision; a peer that is silent, or takes no
    bytes, for ``missed_heartbeats`` × ``heartbeat_seconds`` is lost; ``close_seconds`` bounds the closing handshake.
    """

    heartbeat_seconds: float = 5.0
    missed_heartbeats: int = 4
    hello_seconds: float = 10.0
    close_seconds: float = 2.0

    @property
    def silence_seconds(self) -> float:
        """How long a living peer may say nothing."""
        return self.missed_heartbeats * self.heartbeat_seconds


class Phase(enum.Enum):
    """What a connection waits for."""

    HELLO = enum.auto()
    DECISION = enum.auto()
    ACCEPTED = enum.auto()
    ENDED = enum.auto()


@dataclass(slots=True, eq=False)
class Connection:
    """One WebSocket between upgrade and end. ``number`` grows over the hub's life and is never used twice."""

    number: int
    socket: web.WebSocketResponse
    transport: asyncio.Transport
    remote: str
    heard_at: float
    phase: Phase = Phase.HELLO
    hello: Hello | None = None
    decision_due: float = 0.0
    _written: int = field(default=0, repr=False)
    _taken: int = field(default=0, repr=False)
    _taken_at: float = field(default=0.0, repr=False)

    @property
    def member(self) -> Member | None:
        """Who it says it is; None before its Hello."""
        return None if self.hello is None else self.hello.member

    def __str__(self) -> str:
        return f"{self.member or 'stranger'} at {self.remote} (connection {self.number})"

    def write(self, frame: bytes) -> bool:
        """Hand ``frame`` to the transport; False when that would exceed MAX_SEND_QUEUE_BYTES (nothing is sent)."""
        if self.transport.is_closing():
            return True  # The end of this connection is already on its way to the reader.
        if self.transport.get_write_buffer_size() + len(frame) > MAX_SEND_QUEUE_BYTES:
            return False
        self.transport.write(frame)
        self._written += len(frame)
        return True

    def overdue(self, now: float, timing: HubTiming) -> str:
        """Why this peer is to be given up at ``now`` (seconds of the loop's clock), or an empty string."""
        if self.phase is Phase.DECISION and now > self.decision_due:
            return f"nobody decided on its Hello within {timing.hello_seconds:g} s"
        if now - self.heard_at > timing.silence_seconds:
            return f"silent for {now - self.heard_at:.1f} s, {timing.missed_heartbeats} heartbeats"
        waiting = self.transport.get_write_buffer_size()
        taken = self._written - waiting
        if taken > self._taken or not waiting or not self._taken_at:
            self._taken, self._taken_at = taken, now
        elif now - self._taken_at > timing.silence_seconds:
            return f"slow: took none of {waiting} waiting bytes for {now - self._taken_at:.1f} s"
        return ""

    def excuse(self, since: float) -> None:
        """Count silence from ``since`` at the earliest: before it, the hub itself was not listening."""
        self.heard_at = max(self.heard_at, since)
        self._taken_at = max(self._taken_at, since)
