"""The hub: the WebSocket endpoint that agents connect to. It knows no policy.

What happens on a connection becomes a typed event, handed synchronously to one callback; what the callback's owner
decides comes back through ``accept``, ``refuse``, ``send`` and ``drop``. Every ``AgentConnected`` is followed by at
most one ``AgentLost`` of the same connection: none where the owner itself ended it (``refuse``, ``drop``, ``close``, or
``accept`` of a newer connection of the same member). A peer that misbehaves costs its own connection and no other.
"""

import asyncio
import contextlib
import itertools
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import structlog
from aiohttp import hdrs, web
from weightsync.orchestrator.daemon.hub.connection import Connection, HubTiming, Phase
from weightsync.orchestrator.daemon.hub.token import bears, read_token
from weightsync.orchestrator.protocol.codec import ProtocolError, cut, decode_from_agent, encode
from weightsync.orchestrator.protocol.limits import MAX_HELLO_BYTES, SCHEMA_VERSION
from weightsync.orchestrator.protocol.messages import FromAgent, FromDaemon, Heartbeat, Hello, Refused, Welcome
from weightsync.orchestrator.protocol.names import Member
from weightsync.orchestrator.protocol.websocket import CloseCode, Opcode, frame

log = structlog.get_logger(__name__)

AGENTS_PATH: Final = "/agents"

MAX_CONNECTIONS: Final = 16_384
"""Four times the largest fleet that is measured; each costs a descriptor and some 50 kB."""

ACCEPT_BACKLOG: Final = 4096
"""Connections that may wait for accept(2): a whole fleet reconnects at once when the daemon returns."""

SWEEP_SLICES: Final = 32
"""A sweep looks at one slice of the connections, so that no burst of heartbeats delays a barrier."""


_HEARTBEAT: Final = frame(Opcode.BINARY, encode(Heartbeat()))


@dataclass(frozen=True, slots=True)
class AgentConnected:
    """A well-formed Hello of this run has come; the connection waits for ``accept`` or ``refuse``."""

    member: Member
    hello: Hello
    connection_id: int


@dataclass(frozen=True, slots=True)
class AgentMessage:
    """An accepted agent has said something (heartbeats are not reported)."""

    member: Member
    connection_id: int
    message: FromAgent


@dataclass(frozen=True, slots=True)
class AgentLost:
    """A connection that was reported has ended, and not by its owner's wish."""

    member: Member
    connection_id: int
    reason: str


HubEvent = AgentConnected | AgentMessage | AgentLost


class _AnyHello(msgspec.Struct, tag="Hello"):
    """The one field of Hello that no schema may change."""

    schema: int


class _Unwelcome(Exception):
    """The first frame is a Hello, but of somebody who does not belong here."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.message = Refused(reason=cut(reason), fault="config", retry=False)


class Hub:
    """Agents' endpoint. All methods belong to the loop that called ``start``.

    Args:
        run_id: agents of another run are refused.
        token_file: holds the bearer token; None only where ``ssl_context`` demands client certificates.
        on_event: called for each event, in order, on the loop; it must not raise and must not block.
        timing: deadlines; ``heartbeat_seconds`` is to be what Welcome tells the agents.
        ssl_context: for TLS, and with ``verify_mode`` CERT_REQUIRED for mutual TLS.

    Raises:
        TokenError: the token file cannot serve.
        ValueError: nothing would authenticate the agents.
    """

    def __init__(
        self,
        *,
        run_id: str,
        token_file: Path | None,
        on_event: Callable[[HubEvent], None],
        timing: HubTiming | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        if token_file is None and (ssl_context is None or ssl_context.verify_mode is not ssl.CERT_REQUIRED):
            raise ValueError("without a token file the hub needs TLS that demands client certificates")
        self._token = None if token_file is None else read_token(token_file)
        self._run_id = run_id
        self._on_event = on_event
        self._timing = timing or HubTiming()
        self._ssl_context = ssl_context
        self._numbers = itertools.count(1)
        self._connections: dict[int, Connection] = {}
        self._members: dict[Member, Connection] = {}
        self._handlers: set[asyncio.Task[object]] = set()
        self._sweeper: asyncio.Task[None] | None = None
        self._runner: web.AppRunner | None = None
        self._site: web.TCPSite | None = None
        self._last: tuple[FromDaemon, bytes] | None = None

    # ------------------------------------------------------------------------------------------------- life
    async def start(self, host: str, port: int, configure: Callable[[web.Application], None] | None = None) -> int:
        """Listen on ``host``:``port`` (0: any free port) and return the port. ``configure`` may add routes of others.

        Raises:
            OSError: the address is taken or not ours.
        """
        app = web.Application()
        app.router.add_get(AGENTS_PATH, self._handle)
        if configure is not None:
            configure(app)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=self._timing.close_seconds)
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, host, port, ssl_context=self._ssl_context, backlog=ACCEPT_BACKLOG)
        try:
            await self._site.start()
        except OSError:
            await self._runner.cleanup()
            self._runner = self._site = None  # or ``close`` would fail on them and hide why the start did
            raise
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep_for_ever(), name="hub sweeper")
        return int(self._runner.addresses[0][1])

    async def close(self, reason: str = "the daemon is stopping") -> None:
        """End every connection within ``close_seconds`` and stop listening. Emits nothing."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper
            self._sweeper = None
        if self._site is not None:
            await self._site.stop()
            self._site = None
        for connection in list(self._connections.values()):
            self._end(connection, CloseCode.GOING_AWAY, reason)
        if self._handlers:
            await asyncio.wait(self._handlers)  # Each connection has a timer that ends it within close_seconds.
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    # ------------------------------------------------------------------------------------------ owner's wishes
    @property
    def connected(self) -> frozenset[Member]:
        """Members with an accepted connection."""
        return frozenset(self._members)

    def accept(self, member: Member, connection_id: int, welcome: Welcome) -> bool:
        """Make a waiting connection the member's own and send ``welcome``; an older one of the member is ended.

        False when the connection is gone or waits for nothing.
        """
        connection = self._waiting(member, connection_id)
        if connection is None:
            return False
        older = self._members.get(member)
        if older is not None:
            self._end(older, CloseCode.POLICY_VIOLATION, "a newer connection of this agent took its place")
        connection.accepted()
        self._members[member] = connection
        return self._write(connection, self._frame(welcome))

    def refuse(self, member: Member, connection_id: int, refused: Refused) -> bool:
        """Tell a waiting connection why it is not taken in, and end it. False when it is gone."""
        connection = self._waiting(member, connection_id)
        if connection is None:
            return False
        self._refuse(connection, refused)
        return True

    def send(self, member: Member, message: FromDaemon) -> bool:
        """Queue ``message`` for ``member``; False when it has no connection, or one that is too slow.

        False needs no answer: the member's AgentLost has been reported or is about to be, never from within ``send``.

        The same message object sent to many members is encoded once.

        Raises:
            ProtocolError: the message exceeds MAX_FRAME_BYTES.
        """
        connection = self._members.get(member)
        return connection is not None and self._write(connection, self._frame(message))

    def broadcast(self, members: Iterable[Member], message: FromDaemon) -> list[Member]:
        """``send`` to each; returns those that it failed for."""
        return [member for member in members if not self.send(member, message)]

    def drop(self, member: Member, connection_id: int, reason: str) -> bool:
        """End this connection of the member; it may come back. False when it is not, or no longer, the member's own."""
        connection = self._members.get(member)
        if connection is None or connection.number != connection_id:
            return False
        self._end(connection, CloseCode.POLICY_VIOLATION, reason)
        return True

    # ------------------------------------------------------------------------------------------- one connection
    async def _handle(self, request: web.Request) -> web.StreamResponse:
        remote = request.remote or "unknown"
        if self._token is not None and not bears(request, self._token):
            log.warning("agent turned away: wrong or missing token", remote=remote)
            return web.Response(status=401, text="wrong or missing token\n", headers={hdrs.WWW_AUTHENTICATE: "Bearer"})
        if self._site is None:
            return web.Response(status=503, text="the daemon is stopping\n")
        if len(self._connections) >= MAX_CONNECTIONS:
            log.warning("agent turned away: too many connections", remote=remote, limit=MAX_CONNECTIONS)
            return web.Response(status=503, text=f"more than {MAX_CONNECTIONS} connections\n")
        upgrade = web.WebSocketResponse(compress=False)
        await upgrade.prepare(request)
        transport, task = request.transport, asyncio.current_task()
        if transport is None or task is None:
            return upgrade
        connection = Connection(next(self._numbers), remote, transport, request.protocol, self._on_frame, self._lose)
        self._connections[connection.number] = connection
        connection.expect(self._timing.hello_seconds, lambda: self._undecided(connection))
        self._handlers.add(task)
        try:
            await connection.gone.wait()
        finally:
            self._handlers.discard(task)
        return upgrade

    def _on_frame(self, connection: Connection, data: bytes) -> None:
        try:
            if connection.phase is Phase.HELLO:
                self._introduce(connection, data)
                return
            message = decode_from_agent(data)
            if type(message) is Heartbeat:
                return
            if connection.phase is not Phase.ACCEPTED or connection.hello is None or type(message) is Hello:
                raise ProtocolError(f"{type(message).__name__} out of turn: in phase {connection.phase.name}")
        except _Unwelcome as error:
            self._refuse(connection, error.message)
        except ProtocolError as error:
            self._lose(connection, CloseCode.PROTOCOL_ERROR, str(error))
        else:
            self._on_event(AgentMessage(connection.hello.member, connection.number, message))

    def _introduce(self, connection: Connection, data: bytes) -> None:
        _same_schema(data)
        hello = decode_from_agent(data, MAX_HELLO_BYTES)
        if not isinstance(hello, Hello):
            raise ProtocolError(f"the first message is {type(hello).__name__} and not Hello")
        if hello.run_id != self._run_id:
            raise _Unwelcome(f"this daemon serves run {self._run_id!r}, not {hello.run_id!r}")
        connection.hello = hello
        connection.phase = Phase.DECISION
        self._on_event(AgentConnected(hello.member, hello, connection.number))

    def _undecided(self, connection: Connection) -> None:
        missing = "no Hello" if connection.phase is Phase.HELLO else "no decision on its Hello"
        self._lose(connection, CloseCode.POLICY_VIOLATION, f"{missing} within {self._timing.hello_seconds:g} s")

    # --------------------------------------------------------------------------------------------------- endings
    def _waiting(self, member: Member, connection_id: int) -> Connection | None:
        connection = self._connections.get(connection_id)
        if connection is None or connection.phase is not Phase.DECISION or connection.member != member:
            return None
        return connection

    def _refuse(self, connection: Connection, refused: Refused) -> None:
        log.warning("agent refused", agent=str(connection), reason=refused.reason, fault=refused.fault)
        connection.write(self._frame(refused))
        self._end(connection, CloseCode.POLICY_VIOLATION, refused.reason)

    def _lose(self, connection: Connection, code: CloseCode, reason: str) -> None:
        """A connection ends against its owner's wish: report it, once."""
        if connection.phase is not Phase.ENDED:
            phase = connection.phase
            self._end(connection, code, reason)
            self._report(connection, phase, reason, orderly=code is CloseCode.NORMAL)

    def _cut(self, connection: Connection, reason: str) -> None:
        """``_lose`` without a closing handshake."""
        if connection.phase is not Phase.ENDED:
            phase = connection.phase
            self._forget(connection)
            connection.abort()
            self._report(connection, phase, reason)

    def _report(self, connection: Connection, phase: Phase, reason: str, *, orderly: bool = False) -> None:
        (log.info if orderly else log.warning)("agent lost", agent=str(connection), reason=reason)
        if connection.member is not None and phase in (Phase.DECISION, Phase.ACCEPTED):
            self._on_event(AgentLost(connection.member, connection.number, reason))

    def _end(self, connection: Connection, code: CloseCode, reason: str) -> None:
        self._forget(connection)
        connection.end(code, reason, self._timing.close_seconds)

    def _forget(self, connection: Connection) -> None:
        del self._connections[connection.number]
        member = connection.member
        if member is not None and self._members.get(member) is connection:
            del self._members[member]

    # ------------------------------------------------------------------------------------------------ heartbeats
    async def _sweep_for_ever(self) -> None:
        interval = self._timing.heartbeat_seconds / SWEEP_SLICES
        due = self._now()
        for turn in itertools.count():
            due += interval
            await asyncio.sleep(due - self._now())
            if self._now() - due > self._timing.heartbeat_seconds:
                due = self._now()
                self._excuse_all()
            self.sweep(self._now(), turn % SWEEP_SLICES)

    def _excuse_all(self) -> None:
        """The daemon itself stood still (a suspended machine, a starved core): nobody else is to blame for silence."""
        since = self._now() - self._timing.silence_seconds + self._timing.heartbeat_seconds
        for connection in self._connections.values():
            connection.excuse(since)

    def sweep(self, now: float, turn: int) -> None:
        """Give up the overdue and send heartbeats to the others of slice ``turn`` of SWEEP_SLICES."""
        for connection in [c for c in self._connections.values() if c.number % SWEEP_SLICES == turn]:
            if connection.phase is Phase.ACCEPTED:
                reason = connection.overdue(now, self._timing)
                if reason:
                    self._cut(connection, reason)
                else:
                    self._write(connection, _HEARTBEAT)

    # ---------------------------------------------------------------------------------------------------- writing
    def _frame(self, message: FromDaemon) -> bytes:
        if self._last is None or self._last[0] is not message:
            self._last = (message, frame(Opcode.BINARY, encode(message)))
        return self._last[1]

    def _write(self, connection: Connection, data: bytes) -> bool:
        if connection.write(data):
            return True
        # Later, not now: the owner is in the middle of its own commands and must not meet a new event among them.
        asyncio.get_running_loop().call_soon(self._cut, connection, "slow: its send queue is full")
        return False

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _same_schema(data: bytes) -> None:
    """Refuse another schema by name, even where its Hello is not ours any more."""
    try:
        schema = msgspec.msgpack.decode(data, type=_AnyHello).schema
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return  # Whatever it is, the real decoder says it better.
    if schema != SCHEMA_VERSION:
        raise _Unwelcome(f"the agent speaks schema {schema}, the daemon {SCHEMA_VERSION}: update the older side")
