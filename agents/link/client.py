"""The agent's end of the control channel: one connection to the daemon, kept up for as long as the process lives.

``run`` connects, introduces the agent, delivers what the daemon says and comes back after every loss. It resends
nothing: ``hello`` is asked anew for each connection and carries the agent's state, and the daemon decides from that.
What is said after that Hello and before its Welcome waits for the Welcome, for no Hello carries it.
Everything here belongs to the loop that ``run`` runs on, usually in a thread of its own inside a trainer or a vLLM
worker; other threads go through ``loop.call_soon_threadsafe``.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp
from aiohttp import hdrs
from weightsync.agents.link.connection import (
    ConnectionLost,
    DaemonConnection,
    NotConnected,
    NotObeyed,
    RefusedForGood,
    TokenRejected,
    upgrade,
)
from weightsync.agents.link.tls import tls_context
from weightsync.agents.link.token import read_token
from weightsync.orchestrator.protocol.codec import ProtocolError, encode
from weightsync.orchestrator.protocol.limits import MAX_HELLO_BYTES
from weightsync.orchestrator.protocol.messages import (
    Announce,
    Bye,
    Examined,
    FromAgent,
    FromDaemon,
    Hello,
    Ready,
    Refused,
)
from weightsync.orchestrator.protocol.proof import Challenge, agent_proof
from weightsync.orchestrator.protocol.token import TokenError

__all__ = ["Backoff", "ConnectionLost", "ControlClient", "NotConnected", "RefusedForGood", "TokenError"]

log = logging.getLogger(__name__)

SCHEMES: Final = ("ws://", "wss://")
"""``wss`` where the daemon has a certificate (``agents/link/tls.py``)."""

CONNECT_SECONDS: Final = 30.0
"""Of one attempt. Longer than the daemon waits for a Hello, so that a daemon that is only slow gives its own reason."""

CLOSE_SECONDS: Final = 2.0
"""Of the farewell: the end of a trainer or a worker waits so long at most for a daemon that does not answer."""

OF_A_CONNECTION: Final = (Announce, Ready, Examined, Bye)
"""Said anew on each connection, after its Welcome; all else tells how the agent's state has changed."""

MAX_DOUBLINGS: Final = 32
"""Of a wait: beyond any sensible longest / first, and small enough for a float."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits between attempts, in seconds: doubling from ``first`` to ``quick``, after ``quick_failures`` attempts on
    to ``longest``; each drawn from its upper half.

    A daemon that is started again in the middle of a round is back within seconds, and paused engines wait for its
    agents: so the first attempts stay close together. The draw keeps a fleet that lost its daemon at one instant from
    coming back at one instant.
    """

    first: float = 0.2
    longest: float = 10.0
    quick: float = 1.0
    quick_failures: int = 16

    def seconds(self, failures: int, draw: float) -> float:
        """The wait after ``failures`` in a row (from 1); ``draw`` is uniform in [0, 1)."""
        quick = min(self.longest, self.quick, self.first * 2.0 ** min(failures - 1, MAX_DOUBLINGS))
        later = min(max(failures - self.quick_failures, 0), MAX_DOUBLINGS)
        return min(self.longest, quick * 2.0**later) * (0.5 + draw / 2)


class ControlClient:
    """One agent's connection.

    Args:
        url: of the daemon's endpoint, as ``ws://host:port/agents``, or ``wss://…`` with what the environment names.
        token_file: holds the token, read again for each attempt. It is proved and never sent.
        hello: the agent's introduction and current state, asked for each attempt.
        on_message: called with each message (Welcome first; Heartbeat and Refused never), in order; must not block.
        connect_seconds: total deadline from the first SYN to Welcome.
        on_lost: called with the reason whenever a connection that had its Welcome ends, unless by ``close``.
        close_seconds: deadline of the farewell and the closing handshake.

    Raises:
        TokenError: the token file cannot serve.
        ValueError: ``url`` has another scheme, or (TlsError) the environment does not fit it.
    """

    def __init__(
        self,
        url: str,
        token_file: Path,
        hello: Callable[[], Hello],
        on_message: Callable[[FromDaemon], None],
        *,
        connect_seconds: float = CONNECT_SECONDS,
        on_lost: Callable[[str], None] | None = None,
        close_seconds: float = CLOSE_SECONDS,
        backoff: Backoff | None = None,
    ) -> None:
        if not url.startswith(SCHEMES):
            raise ValueError(
                f"hub url must begin with {' or '.join(SCHEMES)}, got {url!r}: write ws://host:port/agents"
            )
        read_token(token_file)  # A wrong path is told now, to whoever configures; later it is only logged.
        self._tls = tls_context(url)
        self._url = url
        self._token_file = token_file
        self._hello = hello
        self._on_message = on_message
        self._on_lost = on_lost
        self._connect_seconds = connect_seconds
        self._close_seconds = close_seconds
        self._backoff = backoff or Backoff()
        self._closing = asyncio.Event()
        self._ended = asyncio.Event()
        self._started = False
        self._attempt: asyncio.Timeout | None = None
        self._connection: DaemonConnection | None = None
        self._since_hello: list[FromAgent] = []
        """Said since the last Hello, while its Welcome is awaited."""
        self.trouble = ""
        """Why the last attempt or connection ended; for whoever gives up waiting."""
        self.dated = ("", 0.0)
        """The date that the daemon told when the last connection began, and when that was by ours, in unix time."""
        self.rejections = 0
        """Attempts in a row that ended because the daemon has another token."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection with a Welcome."""
        return self._connection is not None and self._connection.welcomed.done() and not self._connection.lost.done()

    @property
    def heard_at(self) -> float:
        """When the daemon was heard last on the present connection, on the loop's clock; 0 while there is none."""
        return self._connection.heard_at if self._connection is not None and self.connected else 0.0

    def send(self, message: FromAgent) -> None:
        """Send ``message`` on the present connection, without waiting; before its Welcome, right after that.

        Raises:
            NotConnected: there is none, or too much waits for the daemon already (which ends the connection).
            ProtocolError: the message exceeds MAX_FRAME_BYTES.
        """
        if self._connection is None or not self.connected:
            awaited = self._connection is not None and not self._connection.welcomed.done()
            if not awaited or isinstance(message, OF_A_CONNECTION):
                raise NotConnected("no connection to the daemon")
            self._since_hello.append(message)
        else:
            self._connection.send(encode(message))

    async def close(self, reason: str = "") -> None:
        """Say Bye, end the connection and wait for ``run`` to return."""
        if not self._closing.is_set():
            self._closing.set()
            with contextlib.suppress(NotConnected):
                self.send(Bye(reason=reason))
            if self._connection is not None:
                self._connection.finish()
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
                connection = await self._connect(session)
                welcomed = True
                await self._until_lost(connection)
            except ConnectionLost as lost:
                if self._closing.is_set():
                    return
                failures = 1 if welcomed and not isinstance(lost, NotObeyed) else failures + 1
                self.trouble = str(lost)
                self.rejections = self.rejections + 1 if isinstance(lost, TokenRejected) else 0
                wait = self._backoff.seconds(failures, random.random())
                log.warning("no daemon at %s: %s; next attempt in %.1f s", self._url, lost, wait)
                if welcomed and self._on_lost is not None:
                    self._on_lost(str(lost))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._closing.wait()

    async def _connect(self, session: aiohttp.ClientSession) -> DaemonConnection:
        """A connection that has its Welcome.

        Raises:
            ConnectionLost: not within ``connect_seconds``, or not at all.
            RefusedForGood: as it says.
        """
        try:
            async with asyncio.timeout(self._connect_seconds) as self._attempt:
                connection, token, challenge = await self._dial(session)
                try:
                    self._introduce(connection, token, challenge)
                    await connection.welcomed
                except BaseException:
                    await self._hang_up(connection)
                    raise
                return connection
        except TimeoutError:
            raise ConnectionLost(f"no Welcome within {self._connect_seconds:g} s") from None
        finally:
            self._attempt = None

    async def _dial(self, session: aiohttp.ClientSession) -> tuple[DaemonConnection, str, Challenge]:
        """The connection, and by which token the daemon has proved itself for what."""
        try:
            token = read_token(self._token_file)
        except TokenError as error:
            raise ConnectionLost(str(error)) from error
        upgraded = await upgrade(session, self._url, token, self._tls)
        self.dated = (upgraded.response.headers.get(hdrs.DATE, ""), time.time())
        return DaemonConnection(upgraded.response, self._heard), token, upgraded.challenge

    def _introduce(self, connection: DaemonConnection, token: str, challenge: Challenge) -> None:
        self._since_hello.clear()
        said = self._hello()
        if said.run_id != challenge.run_id:
            reason = f"it belongs to run {said.run_id!r}, this daemon serves run {challenge.run_id!r}"
            raise RefusedForGood(Refused(reason=reason, fault="config", retry=False))
        hello = encode(said)
        if len(hello) > MAX_HELLO_BYTES:
            raise ProtocolError(f"Hello of {len(hello)} bytes exceeds the limit of {MAX_HELLO_BYTES}")
        self._connection = connection  # Before its Welcome is delivered, so that the answer to it can be sent.
        with contextlib.suppress(NotConnected):  # Then ``welcomed`` says why.
            connection.send(agent_proof(token, challenge, hello) + hello)

    def _heard(self, message: FromDaemon) -> None:
        self._on_message(message)
        while self._since_hello:
            with contextlib.suppress(NotConnected):  # then the next Hello carries it
                self.send(self._since_hello.pop(0))

    async def _until_lost(self, connection: DaemonConnection) -> None:
        if self._closing.is_set():
            connection.finish()
        try:
            await connection.lost
        finally:
            await self._hang_up(connection)

    async def _hang_up(self, connection: DaemonConnection) -> None:
        self._connection = None
        await connection.close(self._close_seconds)
