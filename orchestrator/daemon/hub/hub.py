"""The hub: the WebSocket endpoint that agents connect to. It knows no policy.

What happens on a connection becomes an event of the core, handed to one callback in the call that read it; what the
callback's owner decides comes back through ``accept``, ``refuse``, ``send`` and ``drop``. Every ``AgentConnected`` is
followed by at most one ``AgentLost`` of the same connection: none where the owner itself ended it (``refuse``,
``drop``, ``close``, or ``accept`` of a newer connection of the same member). A peer that misbehaves costs its own
connection and no other.

The hub sees to framing, the limits and the deadlines, that the first message is a Hello whose sender proves that it
holds a token, and that this token is one of the member's. Whether the agent that says it belongs here (its run, its
rank, its schema) is the owner's to judge.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from typing import Final

import msgspec
import structlog
from aiohttp import web, web_response
from websockets.frames import CloseCode
from websockets.protocol import Side
from weightsync.orchestrator.core.events import AgentConnected, AgentLost, AgentSaid, Event
from weightsync.orchestrator.daemon.access.access import Access, NotAdmitted
from weightsync.orchestrator.daemon.access.door import Door
from weightsync.orchestrator.daemon.access.http_log import HttpLog
from weightsync.orchestrator.daemon.access.policy import without_policy
from weightsync.orchestrator.daemon.access.refusals import LOUD_OF_AGENTS
from weightsync.orchestrator.daemon.hub.connection import AgentConnection, HubTiming, Stage
from weightsync.orchestrator.protocol.codec import (
    ProtocolError,
    SchemaMismatch,
    decode_first,
    decode_from_agent,
    encode,
)
from weightsync.orchestrator.protocol.limits import MAX_HELLO_BYTES
from weightsync.orchestrator.protocol.messages import FromDaemon, Heartbeat, Hello, Refused, Welcome
from weightsync.orchestrator.protocol.names import Member
from weightsync.orchestrator.protocol.text import clean
from weightsync.orchestrator.protocol.websocket import message_frame

log = structlog.get_logger(__name__)

AGENTS_PATH: Final = "/agents"

SERVER: Final = "weightsync-orchestrator"
"""What each answer says of us, strangers' included: aiohttp's own tells its version and Python's."""

MAX_CONNECTIONS: Final = 16_384
"""Four times the largest fleet that is measured; each costs a descriptor and some 50 kB."""

SWEEP_SLICES: Final = 32
"""A sweep looks at one slice of the connections, so that no burst of heartbeats delays a barrier."""

_HEARTBEAT: Final = message_frame(encode(Heartbeat()), Side.SERVER)


class Hub:
    """Agents' endpoint. All methods belong to the loop that called ``start``.

    Args:
        access: who may come in.
        post: called for each event, in order, on the loop; it must not raise and must not block. Heartbeats are none.
        next_id: the number of the next event.
        timing: deadlines; ``heartbeat_seconds`` and ``missed_heartbeats`` are to be what Welcome tells the agents.
    """

    def __init__(
        self, *, access: Access, post: Callable[[Event], None], next_id: Callable[[], int], timing: HubTiming
    ) -> None:
        self._access = access
        access.credentials.changed = self._dismiss
        self._post = post
        self._next_id = next_id
        self._timing = timing
        self._numbers = itertools.count(1)
        self._connections: dict[int, AgentConnection] = {}
        self._members: dict[Member, AgentConnection] = {}
        self._entered: set[int] = set()
        self._handlers: set[asyncio.Task[object]] = set()
        self._sweeper: asyncio.Task[None] | None = None
        self._runner: web.AppRunner | None = None
        self._door: Door | None = None
        self._last: tuple[FromDaemon, bytes] | None = None

    # ------------------------------------------------------------------------------------------------- life
    async def start(self, host: str, port: int, configure: Callable[[web.Application], None] | None = None) -> int:
        """Listen on ``host``:``port`` (0: any free port) and return the port. ``configure`` may add routes of others.

        Raises:
            OSError: the address is taken or not ours.
            RuntimeError: a route of others that ``daemon/access/policy.py`` does not know.
        """
        web_response.SERVER_SOFTWARE = SERVER  # type: ignore[attr-defined]
        app = web.Application()
        self._access.guard.install(app)
        app.router.add_get(AGENTS_PATH, self._handle, allow_head=False)
        if configure is not None:
            configure(app)
        missing = list(without_policy(app))
        if missing:
            raise RuntimeError(f"routes without a policy, which nobody could use: {', '.join(missing)}")
        self._runner = web.AppRunner(
            app,
            access_log=None,
            logger=HttpLog(self._access.refusals),
            shutdown_timeout=self._timing.close_seconds,
            lingering_time=self._timing.close_seconds,
            auto_decompress=False,  # 260 kB of a stranger would be 256 MiB, for which the loop stands still a second
        )
        await self._runner.setup()
        server, tls = self._runner.server, self._access.tls
        assert server is not None
        context = None if tls is None else tls.context
        agents = self._entered.__len__  # the others are still the door's
        door = Door(server, self._access.refusals, agents, context, self._access.limits)
        try:
            bound = await door.open(host, port)
        except OSError:
            await self._runner.cleanup()
            self._runner = None  # or ``close`` would fail on it and hide why the start did
            raise
        self._door, self._access.limited, guard = door, door.limit, self._access.guard
        guard.let_in, guard.answers = door.request, door.answers
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep_for_ever(), name="hub sweeper")
        return bound

    async def close(self, reason: str = "the daemon is stopping") -> None:
        """End every connection within ``close_seconds`` and stop listening. Emits nothing."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper
            self._sweeper = None
        if self._door is not None:
            await self._door.close()
            self._door = None
        for connection in list(self._connections.values()):
            self._end(connection, CloseCode.GOING_AWAY, reason)
        if self._handlers:
            await asyncio.wait(self._handlers)  # Each connection has a timer that ends it within close_seconds.
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    # --------------------------------------------------------------------------------------- what the owner decides
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
        return self._tell(connection, welcome)

    def refuse(self, member: Member, connection_id: int, refused: Refused) -> bool:
        """Tell a waiting connection why it is not taken in, and end it. False when it is gone."""
        connection = self._waiting(member, connection_id)
        if connection is None:
            return False
        self._refuse(connection, refused)
        return True

    def send(self, member: Member, message: FromDaemon) -> bool:
        """Queue ``message`` for ``member``; False when it has no connection, one that is too slow, or when the message
        cannot be sent, which costs the member its connection.

        False needs no answer: the member's AgentLost has been reported or is about to be, never from within ``send``.

        The same message object sent to many members is encoded once.
        """
        connection = self._members.get(member)
        return connection is not None and self._tell(connection, message)

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
        try:
            claim = self._access.claim_of(request)
        except NotAdmitted as error:
            self._access.refusals.say("agent turned away", remote=remote, reason=str(error))
            return web.Response(status=error.status, text=f"{error}\n")
        if self._door is None:
            return web.Response(status=503, text="the daemon is stopping\n")
        if len(self._connections) >= MAX_CONNECTIONS:
            self._access.refusals.say("agent turned away: too many connections", remote=remote, limit=MAX_CONNECTIONS)
            return web.Response(status=503, text=f"more than {MAX_CONNECTIONS} connections\n")
        # aiohttp does the handshake and keeps the books of the request; from then on the transport is the connection's.
        upgrade = web.WebSocketResponse(compress=False)
        upgrade.headers.update(claim.headers())
        await upgrade.prepare(request)
        transport, task = request.transport, asyncio.current_task()
        if transport is None or task is None:
            return upgrade
        connection = AgentConnection(
            next(self._numbers), remote, claim, transport, request.protocol, self._on_frame, self._lose
        )
        self._connections[connection.number] = connection
        connection.expect(self._timing.hello_seconds, lambda: self._undecided(connection))
        self._handlers.add(task)
        try:
            await connection.gone.wait()
        finally:
            self._handlers.discard(task)
        return upgrade

    def _on_frame(self, connection: AgentConnection, data: bytes) -> None:
        try:
            if connection.stage is Stage.HELLO:
                self._introduce(connection, data)
                return
            message = decode_from_agent(data)
            if type(message) is Heartbeat:
                return
            if connection.stage is not Stage.ACCEPTED or connection.hello is None or type(message) is Hello:
                raise ProtocolError(f"{type(message).__name__} out of turn: in stage {connection.stage.name}")
        except SchemaMismatch as error:
            # A Hello that cannot even be decoded never reaches the core, whose place it otherwise is to refuse.
            self._refuse(connection, Refused(reason=str(error), fault="config", retry=False))
        except ProtocolError as error:
            self._lose(connection, CloseCode.PROTOCOL_ERROR, str(error))
        else:
            self._post(AgentSaid(self._next_id(), connection.hello.member, connection.number, message))

    def _introduce(self, connection: AgentConnection, data: bytes) -> None:
        proved = connection.claim.said_in(data)
        if self._door is not None:
            self._door.enter(connection.transport)
            self._entered.add(connection.number)
        hello = decode_first(proved, MAX_HELLO_BYTES)
        connection.hello = hello
        connection.stage = Stage.DECISION
        wrong = connection.claim.refuses(hello.member)
        if wrong:
            self._refuse(connection, Refused(reason=wrong, fault="config", retry=False))
            return
        self._post(AgentConnected(self._next_id(), hello.member, connection.number, hello))

    def _dismiss(self) -> None:
        """Tokens were taken away: whoever came with one of them has to come again with another."""
        for connection in list(self._connections.values()):
            if not self._access.credentials.holds(connection.claim.token):
                self._lose(connection, CloseCode.POLICY_VIOLATION, "the token that it came with counts no longer")

    def _undecided(self, connection: AgentConnection) -> None:
        missing = "no Hello" if connection.stage is Stage.HELLO else "no decision on its Hello"
        self._lose(connection, CloseCode.POLICY_VIOLATION, f"{missing} within {self._timing.hello_seconds:g} s")

    # --------------------------------------------------------------------------------------------------- endings
    def _waiting(self, member: Member, connection_id: int) -> AgentConnection | None:
        connection = self._connections.get(connection_id)
        if connection is None or connection.stage is not Stage.DECISION or connection.member != member:
            return None
        return connection

    def _refuse(self, connection: AgentConnection, refused: Refused) -> None:
        self._access.refusals.say(
            "agent refused", LOUD_OF_AGENTS, agent=str(connection), reason=refused.reason, fault=refused.fault
        )
        self._tell(connection, refused)
        self._end(connection, CloseCode.POLICY_VIOLATION, refused.reason)

    def _lose(self, connection: AgentConnection, code: int, reason: str) -> None:
        """The peer, or a deadline, ends a connection that its owner did not end: report it, once."""
        if connection.stage is not Stage.ENDED:
            stage = connection.stage
            self._end(connection, code, reason)
            self._report(connection, stage, reason, orderly=code == CloseCode.NORMAL_CLOSURE)

    def _cut(self, connection: AgentConnection, reason: str) -> None:
        """``_lose`` without a closing handshake."""
        if connection.stage is not Stage.ENDED:
            stage = connection.stage
            self._forget(connection)
            connection.abort()
            self._report(connection, stage, reason)

    def _report(self, connection: AgentConnection, stage: Stage, reason: str, *, orderly: bool = False) -> None:
        reason, refusals = clean(reason), self._access.refusals
        if stage is Stage.HELLO:
            refusals.say("agent turned away: it has proved nothing", remote=connection.remote, reason=reason)
        elif orderly:
            log.info("agent lost", agent=str(connection), reason=reason)
        else:
            refusals.say("agent lost", LOUD_OF_AGENTS, agent=str(connection), reason=reason)
        if connection.member is not None and stage in (Stage.DECISION, Stage.ACCEPTED):
            self._post(AgentLost(self._next_id(), connection.member, connection.number, reason))

    def _end(self, connection: AgentConnection, code: int, reason: str) -> None:
        self._forget(connection)
        connection.end(code, clean(reason), self._timing.close_seconds)

    def _forget(self, connection: AgentConnection) -> None:
        del self._connections[connection.number]
        self._entered.discard(connection.number)
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
            self._access.refusals.sweep()
            if self._door is not None:
                self._door.sweep()

    def _excuse_all(self) -> None:
        """The daemon itself stood still (a suspended machine, a starved core): nobody else is to blame for silence."""
        since = self._now() - self._timing.silence_seconds + self._timing.heartbeat_seconds
        for connection in self._connections.values():
            connection.excuse(since)

    def sweep(self, now: float, turn: int) -> None:
        """Give up the overdue and send heartbeats to the others of slice ``turn`` of SWEEP_SLICES."""
        for connection in [c for c in self._connections.values() if c.number % SWEEP_SLICES == turn]:
            if connection.stage is Stage.ACCEPTED:
                reason = connection.overdue(now, self._timing)
                if reason:
                    self._cut(connection, reason)
                else:
                    self._write(connection, _HEARTBEAT)

    # ---------------------------------------------------------------------------------------------------- writing
    def _frame(self, message: FromDaemon) -> bytes:
        # One message object goes to many members, one after the other: it is encoded for the first and kept.
        if self._last is None or self._last[0] is not message:
            self._last = (message, message_frame(encode(message), Side.SERVER))
        return self._last[1]

    def _tell(self, connection: AgentConnection, message: FromDaemon) -> bool:
        try:
            return self._write(connection, self._frame(message))
        except (ValueError, OverflowError, TypeError, msgspec.MsgspecError) as error:
            # Too long, or with something in it that has no encoding. It is for this agent, made of what agents said.
            reason = f"{type(message).__name__} cannot be sent to it: {error}"
            asyncio.get_running_loop().call_soon(self._cut, connection, reason)
            return False

    def _write(self, connection: AgentConnection, data: bytes) -> bool:
        if connection.write(data):
            return True
        # Later, not now: the owner is in the middle of its own commands and must not meet a new event among them.
        asyncio.get_running_loop().call_soon(self._cut, connection, "slow: its send queue is full")
        return False

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
