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
from aiohttp import WSCloseCode, WSMessage, WSMsgType, hdrs, web
from weightsync.orchestrator.protocol.codec import ProtocolError, cut, decode_from_agent, encode
from weightsync.orchestrator.protocol.limits import MAX_FRAME_BYTES, MAX_HELLO_BYTES, SCHEMA_VERSION
from weightsync.orchestrator.protocol.messages import FromAgent, FromDaemon, Heartbeat, Hello, Refused, Welcome
from weightsync.orchestrator.protocol.names import Member
from weightsync.orchestrator.shell.hub_connection import Connection, HubTiming, Phase, close_reason, server_frame
from weightsync.orchestrator.shell.hub_token import bears, read_token

log = structlog.get_logger(__name__)

AGENTS_PATH: Final = "/agents"

MAX_CONNECTIONS: Final = 16_384
"""Four times the largest fleet that is measured; each costs a descriptor and some 50 kB."""

ACCEPT_BACKLOG: Final = 4096
"""Connections that may wait for accept(2): a whole fleet reconnects at once when the daemon returns."""

SWEEP_SLICES: Final = 32
"""A sweep looks at one slice of the connections, so that no burst of heartbeats delays a barrier."""


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
        self._endings: set[asyncio.Task[None]] = set()
        self._handlers: set[asyncio.Task[object]] = set()
        self._sweeper: asyncio.Task[None] | None = None
        self._runner: web.AppRunner | None = None
        self._last: tuple[FromDaemon, bytes] | None = None

    # ------------------------------------------------------------------------------------------------- life
    async def start(self, host: str, port: int) -> int:
        """Listen on ``host``:``port`` (0: any free port) and return the port.

        Raises:
            OSError: the address is taken or not ours.
        """
        app = web.Application()
        app.router.add_get(AGENTS_PATH, self.handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=self._timing.close_seconds)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, ssl_context=self._ssl_context, backlog=ACCEPT_BACKLOG)
        try:
            await site.start()
        except OSError:
            await self._runner.cleanup()
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
        for connection in list(self._connections.values()):
            self._end(connection, WSCloseCode.GOING_AWAY, reason)
        while self._endings or self._handlers:
            await asyncio.wait(self._endings | self._handlers)
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
            self._end(older, WSCloseCode.POLICY_VIOLATION, "a newer connection of this agent took its place")
        connection.phase = Phase.ACCEPTED
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

    def drop(self, member: Member, reason: str) -> bool:
        """End the member's connection; it may come back. False when it has none."""
        connection = self._members.get(member)
        if connection is None:
            return False
        self._end(connection, WSCloseCode.POLICY_VIOLATION, reason)
        return True

    # ------------------------------------------------------------------------------------------- one connection
    async def handle(self, request: web.Request) -> web.StreamResponse:
        """The request handler of AGENTS_PATH, for owners that bring their own application."""
        remote = request.remote or "unknown"
        if self._token is not None and not bears(request, self._token):
            log.warning("agent turned away: wrong or missing token", remote=remote)
            return web.Response(status=401, text="wrong or missing token\n", headers={hdrs.WWW_AUTHENTICATE: "Bearer"})
        if len(self._connections) >= MAX_CONNECTIONS:
            log.warning("agent turned away: too many connections", remote=remote, limit=MAX_CONNECTIONS)
            return web.Response(status=503, text=f"more than {MAX_CONNECTIONS} connections\n")
        socket = web.WebSocketResponse(
            compress=False, max_msg_size=MAX_FRAME_BYTES, timeout=self._timing.close_seconds, decode_text=False
        )
        await socket.prepare(request)
        transport, task = request.transport, asyncio.current_task()
        if transport is None or task is None:
            return socket
        self._handlers.add(task)
        try:
            await self._serve(Connection(next(self._numbers), socket, transport, remote, self._now()))
        finally:
            self._handlers.discard(task)
        return socket

    async def _serve(self, connection: Connection) -> None:
        self._connections[connection.number] = connection
        code, reason = WSCloseCode.GOING_AWAY, "the daemon is stopping"
        try:
            hello = await self._hello(connection)
            connection.hello = hello
            connection.phase = Phase.DECISION
            connection.decision_due = self._now() + self._timing.hello_seconds
            self._on_event(AgentConnected(hello.member, hello, connection.number))
            reason = await self._listen(connection, hello.member)
        except _Unwelcome as error:
            self._refuse(connection, error.message)
        except ProtocolError as error:
            code, reason = WSCloseCode.PROTOCOL_ERROR, str(error)
        finally:
            self._lose(connection, code, reason)

    async def _hello(self, connection: Connection) -> Hello:
        try:
            frame = await connection.socket.receive(timeout=self._timing.hello_seconds)
        except TimeoutError:
            raise ProtocolError(f"no Hello within {self._timing.hello_seconds:g} s") from None
        connection.heard_at = self._now()
        data = _payload(frame)
        if data is None:
            raise ProtocolError(f"no Hello: {_end_of(connection, frame)}")
        _same_schema(data)
        hello = decode_from_agent(data, MAX_HELLO_BYTES)
        if not isinstance(hello, Hello):
            raise ProtocolError(f"the first message is {type(hello).__name__} and not Hello")
        if hello.run_id != self._run_id:
            raise _Unwelcome(f"this daemon serves run {self._run_id!r}, not {hello.run_id!r}")
        return hello

    async def _listen(self, connection: Connection, member: Member) -> str:
        """Turn frames into events until the connection ends; returns why it did."""
        receive, now, on_event, number = connection.socket.receive, self._now, self._on_event, connection.number
        while True:
            frame = await receive()
            data = _payload(frame)
            if data is None:
                return _end_of(connection, frame)
            if connection.phase is Phase.ENDED:
                return "ended"
            connection.heard_at = now()
            message = decode_from_agent(data)
            if type(message) is Heartbeat:
                continue
            if connection.phase is not Phase.ACCEPTED or type(message) is Hello:
                raise ProtocolError(f"{type(message).__name__} out of turn: in phase {connection.phase.name}")
            on_event(AgentMessage(member, number, message))

    # --------------------------------------------------------------------------------------------------- endings
    def _waiting(self, member: Member, connection_id: int) -> Connection | None:
        connection = self._connections.get(connection_id)
        if connection is None or connection.phase is not Phase.DECISION or connection.member != member:
            return None
        return connection

    def _refuse(self, connection: Connection, refused: Refused) -> None:
        log.warning("agent refused", agent=str(connection), reason=refused.reason, fault=refused.fault)
        connection.write(self._frame(refused))
        self._end(connection, WSCloseCode.POLICY_VIOLATION, refused.reason)

    def _lose(self, connection: Connection, code: int, reason: str, *, abort: bool = False) -> None:
        """End a connection against its owner's wish: report it, once."""
        if connection.phase is Phase.ENDED:
            return
        reported = connection.phase in (Phase.DECISION, Phase.ACCEPTED)
        log.warning("agent lost", agent=str(connection), reason=reason)
        self._end(connection, code, reason, abort=abort)
        if reported and connection.member is not None:
            self._on_event(AgentLost(connection.member, connection.number, reason))

    def _end(self, connection: Connection, code: int, reason: str, *, abort: bool = False) -> None:
        if connection.phase is Phase.ENDED:
            return
        connection.phase = Phase.ENDED
        del self._connections[connection.number]
        member = connection.member
        if member is not None and self._members.get(member) is connection:
            del self._members[member]
        if abort:  # It takes no bytes, or says nothing: a closing handshake would only wait for it again.
            connection.transport.abort()
            return
        task = asyncio.get_running_loop().create_task(self._handshake(connection, code, reason))
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    async def _handshake(self, connection: Connection, code: int, reason: str) -> None:
        try:
            async with asyncio.timeout(self._timing.close_seconds):
                await connection.socket.close(code=code, message=close_reason(reason))
        except TimeoutError:
            connection.transport.abort()
        if connection.transport.get_write_buffer_size():
            connection.transport.abort()

    # ------------------------------------------------------------------------------------------------ heartbeats
    async def _sweep_for_ever(self) -> None:
        interval = self._timing.heartbeat_seconds / SWEEP_SLICES
        due = self._now()
        for turn in itertools.count():
            due += interval
            await asyncio.sleep(due - self._now())
            late = self._now() - due
            if late > self._timing.heartbeat_seconds:
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
        heartbeat = self._frame(_HEARTBEAT)
        for connection in [c for c in self._connections.values() if c.number % SWEEP_SLICES == turn]:
            reason = "" if connection.phase is Phase.HELLO else connection.overdue(now, self._timing)
            if reason:
                self._lose(connection, WSCloseCode.GOING_AWAY, reason, abort=True)
            elif connection.phase is Phase.ACCEPTED:
                self._write(connection, heartbeat)

    # ---------------------------------------------------------------------------------------------------- writing
    def _frame(self, message: FromDaemon) -> bytes:
        if message is _HEARTBEAT:
            return _HEARTBEAT_FRAME
        if self._last is None or self._last[0] is not message:
            self._last = (message, server_frame(encode(message)))
        return self._last[1]

    def _write(self, connection: Connection, frame: bytes) -> bool:
        if connection.write(frame):
            return True
        # Later, not now: the owner is in the middle of its own commands and must not meet a new event among them.
        asyncio.get_running_loop().call_soon(self._lose_slow, connection)
        return False

    def _lose_slow(self, connection: Connection) -> None:
        self._lose(connection, WSCloseCode.POLICY_VIOLATION, "slow: its send queue is full", abort=True)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


_HEARTBEAT: Final = Heartbeat()
_HEARTBEAT_FRAME: Final = server_frame(encode(_HEARTBEAT))


def _same_schema(data: bytes) -> None:
    """Refuse another schema by name, even where its Hello is not ours any more."""
    if len(data) > MAX_HELLO_BYTES:
        return
    try:
        schema = msgspec.msgpack.decode(data, type=_AnyHello).schema
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return  # Whatever it is, the real decoder says it better.
    if schema != SCHEMA_VERSION:
        raise _Unwelcome(f"the agent speaks schema {schema}, the daemon {SCHEMA_VERSION}: update the older side")


def _payload(frame: WSMessage) -> bytes | None:
    """The bytes of a binary frame; None when the connection has ended.

    Raises:
        ProtocolError: a text frame.
    """
    if frame.type is WSMsgType.BINARY:
        data: bytes = frame.data
        return data
    if frame.type is WSMsgType.TEXT:
        raise ProtocolError("a text frame: messages are binary")
    return None


def _end_of(connection: Connection, frame: WSMessage) -> str:
    if frame.type is WSMsgType.ERROR:
        return f"broken by its sender: {frame.data}"
    if frame.type is WSMsgType.CLOSE:
        return f"closed by the agent: code {frame.data} {frame.extra or ''}".rstrip()
    return f"the connection broke (code {connection.socket.close_code})"
