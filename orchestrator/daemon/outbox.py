"""Performs the core's commands, in their order; a record is durable before any later command leaves."""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog
from weightsync.orchestrator.core.commands import (
    Accept,
    Append,
    CallEngine,
    Command,
    Drop,
    LookForStable,
    MakePlan,
    OpenGroup,
    Refuse,
    Say,
    Send,
    SendPlan,
    WriteMarker,
)
from weightsync.orchestrator.core.events import Appended, Event, PlanReady, PlanRejected
from weightsync.orchestrator.core.records import Committed, Record, RoundEnded, encode_record
from weightsync.orchestrator.daemon.admin.views import RoundRow, newest, round_row
from weightsync.orchestrator.daemon.engines.calls import Engines
from weightsync.orchestrator.daemon.group.group import Group
from weightsync.orchestrator.daemon.hub.hub import Hub
from weightsync.orchestrator.daemon.journal import AsyncJournal
from weightsync.orchestrator.daemon.log import round_line
from weightsync.orchestrator.daemon.planning import Planning
from weightsync.orchestrator.daemon.run_directory.markers import MarkerDirectory
from weightsync.orchestrator.planner import PlanError
from weightsync.orchestrator.protocol.markers import MarkerError, manifest
from weightsync.orchestrator.protocol.names import Member

log = structlog.get_logger(__name__)

Spawn = Callable[[Coroutine[Any, Any, None], str], "asyncio.Task[None]"]


class Outbox:
    """``put`` batches; ``run`` performs them for ever. Everything on the loop but the journal, the files, the planner.

    ``rounds`` are the newest ones, oldest first; ``committed_at`` is the unix time of the newest commit.
    """

    def __init__(
        self,
        *,
        run_id: str,
        journal: AsyncJournal,
        hub: Hub,
        engines: Engines,
        group: Group,
        markers: MarkerDirectory,
        files: ThreadPoolExecutor,
        planning: Planning,
        post: Callable[[Event], None],
        next_id: Callable[[], int],
        spawn: Spawn,
        fail: Callable[[BaseException], None],
        look: Callable[[float], None],
    ) -> None:
        self._run_id = run_id
        self._journal, self._hub, self._engines, self._group = journal, hub, engines, group
        self._markers, self._files, self._planning = markers, files, planning
        self._post, self._next_id, self._spawn, self._fail = post, next_id, spawn, fail
        self._look = look
        self._batches: asyncio.Queue[list[Command]] = asyncio.Queue()
        self.rounds: tuple[RoundRow, ...] = ()
        self.committed_at = 0.0

    def put(self, commands: list[Command]) -> None:
        """Perform these after all earlier ones."""
        self._batches.put_nowait(commands)

    async def run(self) -> None:
        """Perform until cancelled. An error ends the daemon: what was decided and not done is for the next one."""
        try:
            while True:
                for kind, commands in itertools.groupby(await self._batches.get(), lambda c: isinstance(c, Append)):
                    if kind:
                        await self._append([command for command in commands if isinstance(command, Append)])
                        continue
                    for command in commands:
                        self._perform(command)
        except Exception as error:
            self._fail(error)

    async def _append(self, commands: list[Append]) -> None:
        """Neighbours in one commit: an fsync costs milliseconds."""
        entries = [(type(command.record).__name__, encode_record(command.record)) for command in commands]
        await self._journal.append_many(entries)
        for command in commands:
            record = command.record
            self.remember(record, time.time())
            if isinstance(record, RoundEnded):
                round_line(self.rounds[-1])
            if command.answer:
                self._post(Appended(self._next_id(), type(record).__name__, getattr(record, "round", None)))

    def remember(self, record: Record, unix_time: float) -> None:
        """Keep what ``/status`` shows of a record."""
        if isinstance(record, RoundEnded):
            self.rounds = newest([*self.rounds, round_row(record, unix_time)])
        elif isinstance(record, Committed):
            self.committed_at = unix_time

    def _perform(self, command: Command) -> None:
        match command:
            case Accept():
                self._hub.accept(command.member, command.connection, command.welcome)
            case Refuse():
                self._hub.refuse(command.member, command.connection, command.refused)
            case Drop():
                self._hub.drop(command.member, command.reason)
            case Send():
                self._hub.send(command.member, command.message)
            case SendPlan():
                if not self._group.deliver(command.member, command.connect):
                    self._hub.send(command.member, command.connect)
            case OpenGroup():
                self._group.open(command.group, dict(command.connections))
            case MakePlan():
                self._spawn(self._plan(command), "planner")
            case CallEngine():
                self._engines.call(command)
            case LookForStable(after_seconds=seconds):
                self._look(seconds)
            case WriteMarker():
                self._files.submit(self._mark, command)
            case Say():
                log.log(getattr(logging, command.level.upper()), command.sentence, cause=command.cause)
            case _:
                raise TypeError(f"no performer for {type(command).__name__}")

    async def _plan(self, command: MakePlan) -> None:
        try:
            facts = await asyncio.to_thread(self._planning.make, command)
        except PlanError as error:
            engine = _engine_of(error.member)
            self._post(PlanRejected(self._next_id(), command.number, str(error), engine, error.fault))
        except Exception as error:
            self._fail(error)
        else:
            self._post(PlanReady(self._next_id(), command.number, facts))

    def _mark(self, command: WriteMarker) -> None:
        """Markers are derived from the journal and for people: one that cannot be written stops nobody."""
        try:
            self._markers.write(command.kind, manifest(self._run_id, command.version, **command.facts))
        except (OSError, MarkerError) as error:
            log.error("marker not written", marker=command.kind, version=str(command.version), reason=str(error))


def _engine_of(member: Member | None) -> str:
    return member.engine if member is not None else ""
