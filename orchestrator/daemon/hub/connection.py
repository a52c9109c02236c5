"""One agent's connection as the hub sees it: its stage, its deadlines and its bounded way out.

Nothing here waits. Bytes are handled in the call that read them, and frames go out through the transport itself: a
server's frames are not masked, so one broadcast is one run of bytes for every peer; the transport's own buffer is the
queue, and its size is what is limited.
"""

import asyncio
import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog
from websockets.frames import CloseCode
from websockets.protocol import Side
from weightsync.orchestrator.daemon.access.access import Claim
from weightsync.orchestrator.protocol.limits import MAX_FRAME_BYTES, MAX_HELLO_BYTES
from weightsync.orchestrator.protocol.messages import Hello
from weightsync.orchestrator.protocol.names import Member
from weightsync.orchestrator.protocol.proof import PROOF_BYTES
from weightsync.orchestrator.protocol.websocket import Endpoint, FrameError

log = structlog.get_logger(__name__)

MAX_SEND_QUEUE_BYTES: Final = 2 * MAX_FRAME_BYTES
"""Unsent bytes to one agent: one frame of the largest allowed size, and as much again queued behind it."""

READ_BYTES: Final = 64 * 1024
"""Read at once from one agent. asyncio's own 256 KiB is above glibc's mmap threshold: every heartbeat would map and
unmap that much, which doubles the cost of a small message."""

HELLO_SECONDS: Final = 10.0
"""From the upgrade to the decision: a Hello is one small message and the core answers it at once, so this is for a slow
network and a process that is still loading its model."""

CLOSE_SECONDS: Final = 2.0
"""For a closing handshake: long enough for a round trip, short beside the time that stopping the daemon may take."""


@dataclass(frozen=True, slots=True)
class HubTiming:
    """Total deadlines of one connection, in seconds.

    ``hello_seconds`` bounds upgrade to decision (Hello lies between them); a peer that is silent, or takes no bytes,
    for ``missed_heartbeats`` × ``heartbeat_seconds`` is lost; ``close_seconds`` bounds the closing handshake.
    """

    heartbeat_seconds: float
    missed_heartbeats: int
    hello_seconds: float
    close_seconds: float

    @property
    def silence_seconds(self) -> float:
        """How long a living peer may say nothing."""
        return self.missed_heartbeats * self.heartbeat_seconds


class Stage(enum.Enum):
    """What a connection waits for."""

    HELLO = enum.auto()
    DECISION = enum.auto()
    ACCEPTED = enum.auto()
    ENDED = enum.auto()


class AgentConnection(asyncio.Protocol):
    """One WebSocket from its upgrade to its end; takes over the transport of the HTTP request that asked for it.

    Args:
        number: grows over the hub's life and is never used twice.
        remote: the peer's address, for log lines.
        claim: whose token it says that it holds.
        http: the protocol that served the request; it is told of the transport's end, for its own books.
        on_message: called with each binary message until the connection is ENDED.
        on_end: called once with the reason when the peer ended it or broke the protocol.
    """

    def __init__(
        self,
        number: int,
        remote: str,
        claim: Claim,
        transport: asyncio.Transport,
        http: asyncio.Protocol,
        on_message: "Callable[[AgentConnection, bytes], None]",
        on_end: "Callable[[AgentConnection, int, str], None]",
    ) -> None:
        self.number = number
        self.remote = remote
        self.claim = claim
        self.stage = Stage.HELLO
        self.hello: Hello | None = None
        self.gone = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.heard_at = self._loop.time()
        self.transport = transport
        self._http = http
        self._on_message = on_message
        self._on_end = on_end
        self._endpoint = Endpoint(Side.SERVER, PROOF_BYTES + MAX_HELLO_BYTES)
        self._timer: asyncio.TimerHandle | None = None
        self._written = 0
        self._taken = 0
        self._taken_at = self.heard_at
        # asyncio's selector transports read this attribute of their own before each read; others have none to set.
        if hasattr(transport, "max_size"):
            transport.max_size = READ_BYTES
        transport.set_protocol(self)

    @property
    def member(self) -> Member | None:
        """Who it says it is; None before its Hello."""
        return None if self.hello is None else self.hello.member

    def __str__(self) -> str:
        return f"{self.member or 'stranger'} at {self.remote} (connection {self.number})"

    # ------------------------------------------------------------------------------------------------------ reading
    def data_received(self, data: bytes) -> None:
        """Handle what has come, to the end of the last whole frame. What goes wrong with it costs this peer only."""
        try:
            self._receive(data)
        except FrameError as error:
            self._on_end(self, error.code, str(error))
        except Exception as error:
            log.exception("what an agent sent broke its handling", agent=str(self))
            self._on_end(self, CloseCode.INTERNAL_ERROR, f"handling its message broke: {error!r}")

    def _receive(self, data: bytes) -> None:
        self.heard_at = self._loop.time()
        messages = self._endpoint.receive(data)
        for message in messages:
            if self.stage is Stage.ENDED:
                break
            self._on_message(self, message)
        answers = self._endpoint.answers()
        if answers:
            self.transport.write(answers)
        closed = self._endpoint.peer_closed
        if closed is not None:
            said = f"closed by the agent: code {closed.code} {closed.reason}".rstrip()
            self._on_end(self, CloseCode.NORMAL_CLOSURE, said)
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport has ended, closed by either side."""
        self._on_end(self, CloseCode.GOING_AWAY, f"the connection broke: {exc or 'end of stream'}")
        if self._timer is not None:
            self._timer.cancel()
        self._http.connection_lost(exc)
        self.gone.set()

    # ------------------------------------------------------------------------------------------------------ writing
    def write(self, frame: bytes) -> bool:
        """Hand ``frame`` to the transport; False when that would exceed MAX_SEND_QUEUE_BYTES (nothing is sent)."""
        transport = self.transport
        if transport.is_closing():
            return True  # The end of this connection is already on its way to ``connection_lost``.
        if transport.get_write_buffer_size() + len(frame) > MAX_SEND_QUEUE_BYTES:
            return False
        transport.write(frame)
        self._written += len(frame)
        return True

    # ---------------------------------------------------------------------------------------------------- deadlines
    def expect(self, seconds: float, late: Callable[[], None]) -> None:
        """Call ``late`` after ``seconds`` unless ``expect``, ``accepted`` or the end come first."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, late)

    def accepted(self) -> None:
        """It belongs here: large messages are welcome, and only silence is watched."""
        self.stage = Stage.ACCEPTED
        self._endpoint.limit_messages(MAX_FRAME_BYTES)
        if self._timer is not None:
            self._timer.cancel()

    def end(self, code: int, reason: str, close_seconds: float) -> None:
        """Begin the closing handshake; the transport ends within ``close_seconds`` whatever the peer does."""
        self.stage = Stage.ENDED
        self.expect(close_seconds, self.transport.abort)
        if not self.transport.is_closing():
            self.transport.write(self._endpoint.close(code, reason))

    def abort(self) -> None:
        """End at once: it takes no bytes or says nothing, and a closing handshake would only wait for it again."""
        self.stage = Stage.ENDED
        self.transport.abort()

    def overdue(self, now: float, timing: HubTiming) -> str:
        """Why this peer is to be given up at ``now`` (seconds of the loop's clock), or an empty string."""
        if now - self.heard_at > timing.silence_seconds:
            return f"silent for {now - self.heard_at:.1f} s, {timing.missed_heartbeats} heartbeats"
        waiting = self.transport.get_write_buffer_size()
        taken = self._written - waiting
        if taken > self._taken or not waiting:
            self._taken, self._taken_at = taken, now
        elif now - self._taken_at > timing.silence_seconds:
            return f"slow: took none of {waiting} waiting bytes for {now - self._taken_at:.1f} s"
        return ""

    def excuse(self, since: float) -> None:
        """Count silence from ``since`` at the earliest: before it, the hub itself was not listening."""
        self.heard_at = max(self.heard_at, since)
        self._taken_at = max(self._taken_at, since)
