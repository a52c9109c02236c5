"""Performs the core's commands, in their order; a record is durable before any later command leaves."""

import asyncio
import itertools
import time
from typing import Final

import structlog
from weightsync.orchestrator.core.commands import (
    Accept,
    Append,
    CallEngine,
    Command,
    Drop,
    LookForStable,
    MakeNeeds,
    MakePlan,
    OpenGroup,
    Refuse,
    Say,
    Send,
    SendPlan,
    WriteMarker,
)
from weightsync.orchestrator.core.events import Appended, NeedsReady, PlanReady, PlanRejected
from weightsync.orchestrator.core.records import RoundBegan, RoundEnded, encode_record
from weightsync.orchestrator.daemon.admin.history import History
from weightsync.orchestrator.daemon.admin.trail import Trail
from weightsync.orchestrator.daemon.engines.calls import Engines
from weightsync.orchestrator.daemon.group.group import Group
from weightsync.orchestrator.daemon.hub.hub import Hub
from weightsync.orchestrator.daemon.inbox import Inbox
from weightsync.orchestrator.daemon.journal_thread import AsyncJournal
from weightsync.orchestrator.daemon.log import round_line, say
from weightsync.orchestrator.daemon.meters import Meters
from weightsync.orchestrator.daemon.planning import Planning
from weightsync.orchestrator.daemon.run_directory.stable import StableWatch
from weightsync.orchestrator.daemon.run_directory.thread import MarkerThread
from weightsync.orchestrator.daemon.tracing import UNTRACED, RoundTraces
from weightsync.orchestrator.planner import PlanError
from weightsync.orchestrator.protocol.messages import Fault
from weightsync.orchestrator.protocol.names import Member
from weightsync.orchestrator.protocol.text import clean

log = structlog.get_logger(__name__)

STUCK_SECONDS: Final = 5.0
"""Of one batch, which waits for nothing but a commit to the journal; a thousand times as long as that takes."""


class Outbox:
    """``put`` batches; ``run`` performs them for ever. Everything on the loop but the journal, the files, the planner.

    What a command leads to comes back as an event through ``inbox``; what it leaves for people goes into ``history``.
    """

    def __init__(
        self,
        *,
        inbox: Inbox,
        journal: AsyncJournal,
        history: History,
        hub: Hub,
        group: Group,
        engines: Engines,
        planning: Planning,
        markers: MarkerThread,
        stable: StableWatch,
        meters: Meters,
        trail: Trail,
        traces: RoundTraces = UNTRACED,
    ) -> None:
        self._traces = traces
        self._inbox, self._journal, self._history = inbox, journal, history
        self._hub, self._group, self._engines = hub, group, engines
        self._planning, self._markers, self._stable, self._meters = planning, markers, stable, meters
        self._trail = trail
        self._batches: asyncio.Queue[list[Command] | asyncio.Future[None]] = asyncio.Queue()
        self._busy_since: float | None = None
        self._in_round = False
        self._compacting: asyncio.Task[None] | None = None

    def put(self, commands: list[Command]) -> None:
        """Perform these after all earlier ones."""
        self._batches.put_nowait(commands)

    def flushed(self) -> "asyncio.Future[None]":
        """Done when all that was put before is performed, and durable where it is to be."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._batches.put_nowait(waiter)
        return waiter

    @property
    def obstacle(self) -> str:
        """Why what is decided is not done; empty when it is, or will be in a moment."""
        busy = 0.0 if self._busy_since is None else time.monotonic() - self._busy_since
        return f"the journal's disk has not answered for {busy:.0f} s" if busy > STUCK_SECONDS else ""

    async def run(self) -> None:
        """Perform until cancelled. An error ends the daemon: what was decided and not done is for the next one."""
        try:
            while True:
                batch = await self._batches.get()
                if isinstance(batch, list):
                    self._busy_since = time.monotonic()
                    await self.perform(batch)
                    self._busy_since = None
                elif not batch.done():  # whoever waited may have given up
                    batch.set_result(None)
        except Exception as error:
            self._inbox.fail(error)

    async def perform(self, batch: list[Command]) -> None:
        """One batch: runs of records, and runs of what may leave only once the records before it are durable."""
        for durable, commands in itertools.groupby(batch, lambda c: isinstance(c, Append)):
            if durable:
                await self._append([command for command in commands if isinstance(command, Append)])
                continue
            for command in commands:
                self._perform(command)

    async def _append(self, commands: list[Append]) -> None:
        """Neighbours in one commit: an fsync costs milliseconds."""
        entries = [(type(command.record).__name__, encode_record(command.record)) for command in commands]
        began = time.monotonic()
        await self._journal.append(entries)
        self._meters.appended(len(entries), time.monotonic() - began)
        for command in commands:
            record = command.record
            self._in_round = isinstance(record, RoundBegan) or (self._in_round and not isinstance(record, RoundEnded))
            self._trail.durable(record)
            now = time.time()
            row = self._history.remember(record, now)
            if isinstance(record, RoundEnded):
                self._traces.ended(record, now)
            if row is not None:
                round_line(row)
                self._meters.ended(row)
            if command.answer:
                name = getattr(record, "round", None)
                self._inbox.post(Appended(self._inbox.next_id(), type(record).__name__, name))
        if not self._in_round and (self._compacting is None or self._compacting.done()):
            self._compacting = self._inbox.spawn(self._compact(), "compaction")

    async def _compact(self) -> None:
        """Between rounds, where nothing waits for the journal's thread while an engine is paused."""
        while not self._in_round and await self._journal.compact():
            pass

    def _perform(self, command: Command) -> None:
        match command:
            case Accept():
                self._hub.accept(command.member, command.connection, command.welcome)
            case Refuse():
                self._hub.refuse(command.member, command.connection, command.refused)
            case Drop():
                self._hub.drop(command.member, command.connection, command.reason)
            case Send():
                self._hub.send(command.member, command.message)
            case SendPlan():
                if not self._group.deliver(command.member, command.connect):
                    self._hub.send(command.member, command.connect)
            case OpenGroup():
                self._group.open(command.group, dict(command.connections))
            case MakePlan():
                self._inbox.spawn(self._plan(command), "planner")
            case MakeNeeds():
                self._inbox.spawn(self._needs(command), "needs")
            case CallEngine():
                self._engines.call(command)
            case LookForStable():
                self._inbox.spawn(self._stable.look(command.after_seconds, command.step), "look for STABLE")
            case WriteMarker():
                self._markers.write(command.kind, command.version, command.facts)
            case Say():
                say(command)
            case _:
                raise TypeError(f"no performer for {type(command).__name__}")

    async def _needs(self, command: MakeNeeds) -> None:
        """In a thread: layouts of large models have a hundred thousand tensors. What breaks costs the needs only."""
        try:
            found = await asyncio.to_thread(self._planning.needs, command)
        except Exception:
            log.exception("what the engines need cannot be put together")
            return
        self._inbox.post(NeedsReady(self._inbox.next_id(), command.number, found.needs, found.misfits))

    async def _plan(self, command: MakePlan) -> None:
        """In a thread: the planner computes for seconds. What goes wrong is an event: its input is the agents'."""
        try:
            facts = await asyncio.to_thread(self._planning.make, command)
        except PlanError as error:
            engine = _engine_of(error.member)
            self._reject(command, str(error), engine, error.fault)
        except Exception as error:
            log.exception("the planner broke")
            self._reject(command, f"the planner broke: {error!r}", "", "daemon")
        else:
            self._inbox.post(PlanReady(self._inbox.next_id(), command.number, facts, command.lends))

    def _reject(self, command: MakePlan, reason: str, engine: str, fault: Fault) -> None:
        number, told = command.number, clean(reason)
        self._inbox.post(PlanRejected(self._inbox.next_id(), number, told, engine, fault, command.lends))


def _engine_of(member: Member | None) -> str:
    return member.engine if member is not None else ""
