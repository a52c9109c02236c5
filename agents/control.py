"""The agent's end of the control channel: one connection to the daemon, kept up for as long as the process lives.

``run`` connects, introduces the agent, delivers what the daemon says and comes back after every loss. It resends
nothing: ``hello`` is asked anew for each connection and carries the agent's state, and the daemon decides from that.
Everything here belongs to the loop that ``run`` runs on, usually in a thread of its own inside a trainer or a vLLM
worker; other threads go through ``loop.call_soon_threadsafe``.
"""

import asyncio
import contextlib
import logging
import random
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp
from aiohttp import hdrs
from weightsync.agents.control_connection import Connection, ConnectionLost, NotConnected, RefusedForGood, message_in
from weightsync.agents.control_token import TokenError, read_token
from weightsync.orchestrator.protocol.codec import ProtocolError, encode
from weightsync.orchestrator.protocol.limits import MAX_FRAME_BYTES, MAX_HELLO_BYTES
from weightsync.orchestrator.protocol.messages import Bye, FromAgent, FromDaemon, Heartbeat, Hello, Welcome

__all__ = ["Backoff", "ConnectionLost", "ControlClient", "NotConnected", "RefusedForGood", "TokenError"]

log = logging.getLogger(__name__)

HTTP_UNAUTHORIZED: Final = 401

MAX_DOUBLINGS: Final = 32
"""Of a wait: beyond any sensible longest / first, and small enough for a float."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits between attempts, in seconds: doubling from ``first`` to ``longest``, each drawn from its upper half.

    The draw keeps a fleet that lost its daemon at one instant from coming back at one instant.
    """

    first: float = 0.2
    longest: float = 10.0

    def seconds(self, failures: int, draw: float) -> float:
        """The wait after ``failures`` in a row (from 1); ``draw`` is uniform in [0, 1)."""
        doublings = min(failures - 1, MAX_DOUBLINGS)
        return min(self.longest, self.first * 2.0**doublings) * (0.5 + draw / 2)


class ControlClient:
    """One agent's connection.

    Args:
        url: of the daemon's endpoint, as ``ws://host:port/agents`` or ``wss://…``.
        token_file: holds the bearer token, read again for each attempt; None only with a client certificate.
        hello: the agent's introduction and current state, asked for each attempt.
        on_message: called with each message (Welcome first; Heartbeat and Refused never), in order; must not block.
        connect_seconds: total deadline from the first SYN to Welcome.
        on_lost: called with the reason whenever a connection that had its Welcome ends, unless by ``close``.
        missed_heartbeats: silence of so many heartbeats (``Welcome.heartbeat_seconds``) is a loss.
        close_seconds: deadline of the farewell, and again of the closing handshake.
        ssl_context: for ``wss``; with a client certificate for mutual TLS.

    Raises:
        TokenError: the token file cannot serve.
        ValueError: nothing would authenticate this agent.
    """

    def __init__(
        self,
        url: str,
        token_file: Path | None,
        hello: Callable[[], Hello],
        on_message: Callable[[FromDaemon], None],
        *,
        connect_seconds: float = 30.0,
        on_lost: Callable[[str], None] | None = None,
        missed_heartbeats: int = 4,
        close_seconds: float = 2.0,
        backoff: Backoff | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        if token_file is None and ssl_context is None:
            raise ValueError("without a token file the control client needs a TLS context with a client certificate")
        if token_file is not None:
            read_token(token_file)  # A wrong path is told now, to whoever configures; later it is only logged.
        self._url = url
        self._token_file = token_file
        self._hello = hello
        self._on_message = on_message
        self._on_lost = on_lost
        self._connect_seconds = connect_seconds
        self._missed_heartbeats = missed_heartbeats
        self._close_seconds = close_seconds
        self._backoff = backoff or Backoff()
        self._ssl_context = ssl_context
        self._closing = asyncio.Event()
        self._ended = asyncio.Event()
        self._started = False
        self._attempt: asyncio.Timeout | None = None
        self._connection: Connection | None = None

    @property
    def connected(self) -> bool:
        """Whether there is a connection with a Welcome."""
        return self._connection is not None

    def send(self, message: FromAgent) -> None:
        """Queue ``message`` on the present connection.

        Raises:
            NotConnected: there is none, or its queue is full (which ends it).
            ProtocolError: the message exceeds MAX_FRAME_BYTES.
        """
        if self._connection is None:
            raise NotConnected("no connection to the daemon")
        self._connection.queue(encode(message))

    async def close(self, reason: str = "") -> None:
        """Say Bye, end the connection and wait for ``run`` to return; 2 × ``close_seconds`` at most."""
        self._closing.set()
        if self._connection is not None:
            self._connection.finish(encode(Bye(reason=reason)), self._close_seconds)
        if self._attempt is not None and not self._attempt.expired():
            self._attempt.reschedule(asyncio.get_running_loop().time())
        if self._started:
            await self._ended.wait()

    async def run(self) -> None:
        """Keep the connection up until ``close``. May be called once.

        Raises:
            RefusedForGood: the daemon said Refused with ``retry`` false.
            Exception: whatever ``hello``, ``on_message`` or ``on_lost`` raised.
        """
        if self._started:
            raise RuntimeError("a ControlClient runs once")
        self._started = True
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
                await self._run(session)
        finally:
            self._ended.set()

    async def _run(self, session: aiohttp.ClientSession) -> None:
        failures = 0
        while not self._closing.is_set():
            welcomed = False
            try:
                socket, welcome = await self._connect(session)
                welcomed = True
                if self._closing.is_set():
                    await self._hang_up(socket)
                    return
                await self._talk(socket, welcome)
            except ConnectionLost as lost:
                if self._closing.is_set():
                    return
                failures = 1 if welcomed else failures + 1
                wait = self._backoff.seconds(failures, random.random())
                log.warning("no daemon at %s: %s; next attempt in %.1f s", self._url, lost, wait)
                if welcomed and self._on_lost is not None:
                    self._on_lost(str(lost))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._closing.wait()

    # -------------------------------------------------------------------------------------------------- connecting
    async def _connect(self, session: aiohttp.ClientSession) -> tuple[aiohttp.ClientWebSocketResponse, Welcome]:
        try:
            async with asyncio.timeout(self._connect_seconds) as self._attempt:
                socket = await self._dial(session)
                try:
                    return socket, await self._introduce(socket)
                except BaseException:
                    await self._hang_up(socket)
                    raise
        except TimeoutError:
            raise ConnectionLost(f"no Welcome within {self._connect_seconds:g} s") from None
        finally:
            self._attempt = None

    async def _dial(self, session: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse:
        headers = {}
        try:
            if self._token_file is not None:
                headers[hdrs.AUTHORIZATION] = f"Bearer {read_token(self._token_file)}"
            return await session.ws_connect(
                self._url,
                headers=headers,
                max_msg_size=MAX_FRAME_BYTES,
                compress=0,
                timeout=aiohttp.ClientWSTimeout(ws_close=self._close_seconds),
                ssl=True if self._ssl_context is None else self._ssl_context,
            )
        except aiohttp.WSServerHandshakeError as error:
            if error.status == HTTP_UNAUTHORIZED:
                raise ConnectionLost(f"it rejects the token in {self._token_file}: compare the two files") from error
            raise ConnectionLost(f"it answers {error.status} {error.message}") from error
        except (aiohttp.ClientError, OSError, TokenError) as error:
            raise ConnectionLost(str(error) or type(error).__name__) from error

    async def _introduce(self, socket: aiohttp.ClientWebSocketResponse) -> Welcome:
        hello = encode(self._hello())
        if len(hello) > MAX_HELLO_BYTES:
            raise ProtocolError(f"Hello of {len(hello)} bytes exceeds the limit of {MAX_HELLO_BYTES}")
        try:
            await socket.send_bytes(hello)
        except (aiohttp.ClientError, OSError) as error:
            raise ConnectionLost(str(error) or type(error).__name__) from error
        while True:
            message = message_in(socket, await socket.receive())
            if isinstance(message, Welcome):
                return message
            if not isinstance(message, Heartbeat):
                raise ConnectionLost(f"it answers Hello with {type(message).__name__}")

    # ----------------------------------------------------------------------------------------------------- talking
    async def _talk(self, socket: aiohttp.ClientWebSocketResponse, welcome: Welcome) -> None:
        connection = Connection(socket, welcome.heartbeat_seconds, self._missed_heartbeats)
        self._connection = connection
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(connection.write(), name="control writer")
                group.create_task(connection.beat(), name="control heartbeat")
                group.create_task(self._read(connection, welcome), name="control reader")
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from failures  # The first has cancelled the others.
        finally:
            self._connection = None
            await self._hang_up(socket)

    async def _read(self, connection: Connection, message: FromDaemon) -> None:
        while True:
            if type(message) is not Heartbeat:
                self._on_message(message)
            message = await connection.receive()

    async def _hang_up(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._close_seconds):
                await socket.close()
