"""One connection of the control client: its bounded queue, its heartbeats, its end; and what may go wrong."""

import asyncio
import random
from collections import deque
from typing import Final

import aiohttp
from weightsync.orchestrator.protocol.codec import ProtocolError, decode_from_daemon, encode
from weightsync.orchestrator.protocol.limits import MAX_FRAME_BYTES
from weightsync.orchestrator.protocol.messages import FromDaemon, Heartbeat, Refused

MAX_QUEUED_MESSAGES: Final = 4096
"""Messages that wait for the socket. An agent says a handful per round: more means that the daemon has stopped."""

MAX_QUEUED_BYTES: Final = 2 * MAX_FRAME_BYTES
"""One message of the largest allowed size, and as much again behind it."""

_HEARTBEAT: Final = encode(Heartbeat())


class NotConnected(ConnectionError):
    """There is no daemon to say it to. The network's or the daemon's fault; the next Welcome is the time to retry."""


class ConnectionLost(ConnectionError):
    """The connection ended, or never came to a Welcome. Retried by the client itself."""


class RefusedForGood(RuntimeError):
    """The daemon will not take this agent in before something is changed: retrying is pointless."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(f"the daemon refused this agent for good ({refused.fault or 'no'} fault): {refused.reason}")
        self.refused = refused


class Connection:
    """A connection that had its Welcome. ``write``, ``beat`` and the reader of ``receive`` run beside each other."""

    def __init__(
        self, socket: aiohttp.ClientWebSocketResponse, heartbeat_seconds: float, missed_heartbeats: int
    ) -> None:
        self._socket = socket
        self._heartbeat_seconds = heartbeat_seconds
        self._silence_seconds = heartbeat_seconds * missed_heartbeats
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._wake = asyncio.Event()
        self._finishing = False
        self._overflowed = False
        self._due: float | None = None
        self._deadline: asyncio.Timeout | None = None

    def queue(self, data: bytes) -> None:
        """Have ``write`` send ``data``.

        Raises:
            NotConnected: the connection is ending, or its queue is full (which ends it).
        """
        if self._finishing or self._overflowed:
            raise NotConnected("the connection to the daemon is ending")
        if len(self._waiting) >= MAX_QUEUED_MESSAGES or self._waiting_bytes + len(data) > MAX_QUEUED_BYTES:
            self._overflowed = True
            self._end_by(self._loop.time())
            raise NotConnected(f"the daemon takes nothing: {len(self._waiting)} messages wait for it")
        self._append(data)

    def finish(self, farewell: bytes, seconds: float) -> None:
        """Have ``write`` send what waits, then ``farewell``, and end the connection, all within ``seconds``."""
        if not self._finishing:
            self._append(farewell)
            self._finishing = True
            self._end_by(self._loop.time() + seconds)

    def _end_by(self, due: float) -> None:
        self._due = due
        if self._deadline is not None and not self._deadline.expired():
            self._deadline.reschedule(due)

    def _append(self, data: bytes) -> None:
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        self._wake.set()

    async def write(self) -> None:
        """Send what is queued until the connection ends; always raises.

        Raises:
            ConnectionLost: the socket broke, the queue overflowed, or ``finish`` has done its work.
        """
        try:
            async with asyncio.timeout_at(self._due) as self._deadline:
                while not self._finishing or self._waiting:
                    while self._waiting:
                        data = self._waiting.popleft()
                        await self._socket.send_bytes(data)
                        self._waiting_bytes -= len(data)
                    self._wake.clear()
                    if not self._finishing:
                        await self._wake.wait()
                await self._socket.close()
        except TimeoutError:
            raise ConnectionLost("it takes no messages") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ConnectionLost(str(error) or type(error).__name__) from error
        finally:
            self._deadline = None
        raise ConnectionLost("closed by this side")

    async def beat(self) -> None:
        """Send heartbeats and watch for the daemon's; always raises.

        Raises:
            ConnectionLost: the daemon was silent for too long.
        """
        while True:
            # Spread over the interval, or the heartbeats of a fleet that was welcomed at once stay together.
            interval = self._heartbeat_seconds * random.uniform(0.75, 1.0)
            due = self._loop.time() + interval
            await asyncio.sleep(interval)
            now = self._loop.time()
            if now - due > self._heartbeat_seconds:
                # This process stood still: the daemon may have spoken meanwhile, and gets one more interval.
                self._heard_at = max(self._heard_at, now - self._silence_seconds + self._heartbeat_seconds)
            if now - self._heard_at > self._silence_seconds:
                raise ConnectionLost(f"it was silent for {now - self._heard_at:.1f} s")
            if not self._waiting:
                self._append(_HEARTBEAT)

    async def receive(self) -> FromDaemon:
        """The next message.

        Raises:
            ConnectionLost: the connection ended, or the daemon broke the protocol.
            RefusedForGood: as it says.
        """
        frame = await self._socket.receive()
        self._heard_at = self._loop.time()
        return message_in(self._socket, frame)


def message_in(socket: aiohttp.ClientWebSocketResponse, frame: aiohttp.WSMessage) -> FromDaemon:
    """What ``frame``, just received from ``socket``, says.

    Raises:
        ConnectionLost: it ends the connection, breaks the protocol or refuses for now.
        RefusedForGood: it refuses for good.
    """
    if frame.type is aiohttp.WSMsgType.BINARY:
        try:
            message = decode_from_daemon(frame.data)
        except ProtocolError as error:
            raise ConnectionLost(f"it broke the protocol: {error}") from error
        if not isinstance(message, Refused):
            return message
        if message.retry:
            raise ConnectionLost(f"it refuses for now: {message.reason}")
        raise RefusedForGood(message)
    if frame.type is aiohttp.WSMsgType.CLOSE:
        raise ConnectionLost(f"it closed the connection: code {frame.data} {frame.extra or ''}".rstrip())
    if frame.type is aiohttp.WSMsgType.ERROR:
        raise ConnectionLost(f"it broke the protocol: {frame.data}")
    if frame.type is aiohttp.WSMsgType.TEXT:
        raise ConnectionLost("it broke the protocol: a text frame")
    raise ConnectionLost(f"the connection broke (code {socket.close_code})")
