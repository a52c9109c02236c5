"""The daemon's life: turns the outside into events, lets the core decide, performs its commands in their order."""

import asyncio
import contextlib
import itertools
import logging
import signal
import time
from collections.abc import Callable
from typing import Final

import structlog
from aiohttp import web
from weightsync.orchestrator.core import versions
from weightsync.orchestrator.core.commands import (
    Accept,
    Append,
    CallEngine,
    Command,
    Deliver,
    Drop,
    MakePlan,
    OpenGroup,
    Refuse,
    Say,
    Send,
    WriteMarker,
)
from weightsync.orchestrator.core.errors import WeightsyncError
from weightsync.orchestrator.core.events import (
    AgentConnected,
    AgentLost,
    AgentSaid,
    Appended,
    Event,
    MarkersSeen,
    PlanReady,
    PlanRejected,
    StableSeen,
    Tick,
)
from weightsync.orchestrator.core.machine import start, step
from weightsync.orchestrator.core.plan import PlanError
from weightsync.orchestrator.core.policy import EngineConfig, GroupAddress, Policy
from weightsync.orchestrator.core.records import RoundEnded, decode_record, encode_record
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.protocol.markers import manifest
from weightsync.orchestrator.protocol.messages import FilesystemSettings
from weightsync.orchestrator.shell import hub as hubs
from weightsync.orchestrator.shell.admin import routes
from weightsync.orchestrator.shell.admin_views import (
    HISTORY_ROUNDS,
    LayoutsView,
    RoundRow,
    RoundsView,
    StatusView,
    newest,
    round_row,
)
from weightsync.orchestrator.shell.engines import Engines
from weightsync.orchestrator.shell.group import Group
from weightsync.orchestrator.shell.hub import Hub
from weightsync.orchestrator.shell.hub_connection import HubTiming
from weightsync.orchestrator.shell.hub_token import read_token
from weightsync.orchestrator.shell.journal import AsyncJournal, Journal
from weightsync.orchestrator.shell.log import round_line
from weightsync.orchestrator.shell.markers import MarkerDirectory
from weightsync.orchestrator.shell.planning import Planning
from weightsync.orchestrator.shell.settings import Settings, TcpStoreRendezvous
from weightsync.orchestrator.shell.view import View
from weightsync.orchestrator.shell.watcher import wakes

log = structlog.get_logger(__name__)

TICK_SECONDS: Final = 0.25
"""Deadlines are seconds; an event acts at once, a missed one within this."""

LOOK_SECONDS: Final = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
"""Between looks for a STABLE that every rank's STAGED announces: the file system's own notice takes 50 ms and more."""

STOP_SECONDS: Final = 10.0
"""For the goodbye: what is not done by then is left to the next daemon, which reads the journal."""


def policy_of(settings: Settings) -> Policy:
    """The core's numbers from the settings."""
    deadlines, rendezvous = settings.deadlines, settings.rendezvous
    group = None
    if isinstance(rendezvous, TcpStoreRendezvous):
        group = GroupAddress(rendezvous.host, rendezvous.port, rendezvous.timeout_seconds)
    return Policy(
        run_id=settings.run.id,
        engines=tuple(EngineConfig(engine.name, engine.pair or "") for engine in settings.engines),
        transport=settings.transport.message(),
        group=group,
        run_dir=str(settings.run.directory) if isinstance(settings.transport.message(), FilesystemSettings) else "",
        trainer_world=settings.trainer.world,
        attempts=settings.retry.attempts,
        backoff=settings.retry.backoff_seconds,
        join=deadlines.join_seconds,
        staged=deadlines.staged_seconds,
        rendezvous=deadlines.rendezvous_seconds,
        probe=deadlines.probe_seconds,
        pause=deadlines.pause_seconds,
        quiesce=deadlines.quiesce_seconds,
        transfer=deadlines.transfer_seconds,
        verify=deadlines.verify_seconds,
        finish=deadlines.finish_seconds,
        heartbeat=deadlines.heartbeat_seconds,
    )


class Runner:
    """One daemon. ``run`` returns when it is told to stop, and raises when it must not go on."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.planning = Planning()
        self._ids = itertools.count(1)
        self._pending: list[Event] = []
        self._flush_due = False
        self._outbox: asyncio.Queue[list[Command]] = asyncio.Queue()
        self._stopped = asyncio.Event()
        self._failure: BaseException | None = None
        self._looks = 0
        self._look: asyncio.TimerHandle | None = None
        self._planner: set[asyncio.Task[None]] = set()
        self._rounds: tuple[RoundRow, ...] = ()
        self._view = View(settings, time.time())
        self.markers = MarkerDirectory(settings.run.directory, settings.run.id)
        timing = HubTiming(
            heartbeat_seconds=settings.deadlines.heartbeat_seconds,
            missed_heartbeats=settings.deadlines.lost_after_heartbeats,
        )
        self.hub = Hub(
            run_id=settings.run.id, token_file=settings.listen.token_file, on_event=self._hub_event, timing=timing
        )
        self.fleet: Fleet
        self.journal: AsyncJournal

    # ---------------------------------------------------------------------------------------------------------- life
    async def run(self, ready: Callable[[int], None] | None = None) -> None:
        """Serve until SIGTERM or SIGINT.

        Args:
            ready: called with the port once agents can connect.

        Raises:
            WeightsyncError: an invariant broke; the journal is what the next daemon believes.
            JournalLost, JournalError, OSError: the disk or the address.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopped.set)
        self.journal = AsyncJournal(Journal.open(self.settings.journal_path))
        records = [decode_record(entry.body) for entry in await self.journal.entries()]
        self._rounds = tuple(await self._history(HISTORY_ROUNDS))
        self.fleet, commands = start(policy_of(self.settings), self.journal.journal_id, records, loop.time())
        self.engines = Engines(self.settings, lambda: next(self._ids), self.post)
        self.group = Group(lambda: next(self._ids), self.post)
        try:
            port = await self._listen()
            self._outbox.put_nowait(commands)
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._perform_for_ever(), name="outbox"),
                    group.create_task(self._watch(), name="markers"),
                    group.create_task(self._tick(), name="ticks"),
                ]
                log.info("the daemon serves", run=self.settings.run.id, epoch=self.fleet.epoch, port=port)
                if ready is not None:
                    ready(port)
                await self._stopped.wait()
                for task in tasks:
                    task.cancel()
            if self._failure is not None:
                raise self._failure
        finally:
            await self._close()

    async def _listen(self) -> int:
        def configure(app: web.Application) -> None:
            app.router.add_routes(routes(self, read_token(self.settings.listen.token_file)))

        return await self.hub.start(self.settings.listen.host, self.settings.listen.port, configure)

    async def status(self) -> StatusView:
        """What ``/status`` answers."""
        problems = [str(problem) for problem in self.markers.problems]
        return self._view.status(self.fleet, self._rounds, problems, asyncio.get_running_loop().time())

    async def rounds(self, last: int) -> RoundsView:
        """What ``/rounds`` answers."""
        return RoundsView(run=self.settings.run.id, rounds=tuple(await self._history(last)))

    async def layouts(self) -> LayoutsView | None:
        """What ``/plan/layouts`` answers."""
        return self.planning.layouts(self.settings.run.id)

    async def _history(self, last: int) -> list[RoundRow]:
        entries = await self.journal.entries(kinds=[RoundEnded.__name__], newest=last)
        rows = [(decode_record(entry.body), entry.unix_time) for entry in entries]
        return [round_row(record, when) for record, when in rows if isinstance(record, RoundEnded)]

    async def _close(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await self.engines.close()
                await self.group.close()
                await self.hub.close()
                for task in self._planner:
                    task.cancel()
        await self.journal.close()

    # -------------------------------------------------------------------------------------------------------- events
    def post(self, event: Event) -> None:
        """Hand an event to the core; those that come in one turn of the loop are decided together."""
        self._pending.append(event)
        if not self._flush_due:
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        events, self._pending = self._pending, []
        if self._stopped.is_set():
            return
        try:
            commands = step(self.fleet, events, asyncio.get_running_loop().time())
        except Exception as error:
            self._fail(error)
            return
        if commands:
            self._outbox.put_nowait(commands)
        self._look_for_stable()

    def _fail(self, error: BaseException) -> None:
        """Stop at once: nothing that follows from a broken state may be performed."""
        log.error("the daemon ends", reason=str(error), exc_info=not isinstance(error, WeightsyncError))
        if self._failure is None:
            self._failure = error
        self._stopped.set()

    def _hub_event(self, event: hubs.HubEvent) -> None:
        number = next(self._ids)
        match event:
            case hubs.AgentConnected():
                self.post(AgentConnected(number, event.member, event.connection_id, event.hello))
            case hubs.AgentMessage():
                self.post(AgentSaid(number, event.member, event.connection_id, event.message))
            case hubs.AgentLost():
                self.post(AgentLost(number, event.member, event.connection_id, event.reason))

    async def _tick(self) -> None:
        while True:
            self.post(Tick(next(self._ids)))
            await asyncio.sleep(TICK_SECONDS)

    async def _watch(self) -> None:
        async with contextlib.aclosing(wakes(self.settings.run.directory, self.settings.rescan_seconds)) as woken:
            async for _ in woken:
                self._scan()

    def _scan(self) -> None:
        scan = self.markers.scan()
        for problem in scan.problems:
            log.warning("marker not believed", problem=str(problem))
        seen = tuple(
            StableSeen(waiting.step, waiting.stable.manifest.generation if waiting.stable.manifest else None)
            for waiting in scan.waiting
            if waiting.stable is not None
        )
        if seen != self.fleet.stable:
            self.post(MarkersSeen(next(self._ids), seen))

    def _look_for_stable(self) -> None:
        """All ranks have staged: STABLE is a moment away, so look instead of waiting to be told."""
        version = versions.staged(self.fleet)
        settled = version is None or version in self.fleet.memory.done or version in self.fleet.memory.failed
        if version is None or settled or versions.is_stable(self.fleet, version):
            self._looks = 0
        elif self._look is None and self._looks < len(LOOK_SECONDS):
            self._look = asyncio.get_running_loop().call_later(LOOK_SECONDS[self._looks], self._looked)
            self._looks += 1

    def _looked(self) -> None:
        self._look = None
        self._scan()
        if not self._flush_due:
            self._look_for_stable()

    # ------------------------------------------------------------------------------------------------------ commands
    async def _perform_for_ever(self) -> None:
        """One batch after the other; a record is durable before any later command is performed."""
        try:
            while True:
                for command in await self._outbox.get():
                    if isinstance(command, Append):
                        await self._append(command)
                    else:
                        self._perform(command)
        except Exception as error:
            self._fail(error)

    async def _append(self, command: Append) -> None:
        record = command.record
        await self.journal.append(type(record).__name__, encode_record(record))
        if isinstance(record, RoundEnded):
            row = round_row(record, time.time())
            self._rounds = newest([*self._rounds, row])
            round_line(row)
        if command.answer:
            self.post(Appended(next(self._ids), type(record).__name__, getattr(record, "round", None)))

    def _perform(self, command: Command) -> None:
        match command:
            case Accept():
                self.hub.accept(command.member, command.connection, command.welcome)
            case Refuse():
                self.hub.refuse(command.member, command.connection, command.refused)
            case Drop():
                self.hub.drop(command.member, command.reason)
            case Send():
                self.hub.send(command.member, command.message)
            case Deliver():
                if not self.group.deliver(command.member, command.connect):
                    self.hub.send(command.member, command.connect)
            case OpenGroup():
                connections = {member: self.fleet.agents[member].connection for member in command.members}
                self.group.open(command.group, connections)
            case MakePlan():
                self._plan(command)
            case CallEngine():
                self.engines.call(command)
            case WriteMarker():
                self._mark(command)
            case Say():
                log.log(getattr(logging, command.level.upper()), command.sentence, cause=command.cause)
            case _:
                raise TypeError(f"no performer for {type(command).__name__}")

    def _plan(self, command: MakePlan) -> None:
        async def plan() -> None:
            try:
                facts = await asyncio.to_thread(self.planning.make, command)
            except PlanError as error:
                engine = error.member.engine if error.member is not None else ""
                self.post(PlanRejected(next(self._ids), command.number, str(error), engine))
            except Exception as error:
                self._fail(error)
            else:
                self.post(PlanReady(next(self._ids), command.number, facts))

        task = asyncio.get_running_loop().create_task(plan(), name="planner")
        self._planner.add(task)
        task.add_done_callback(self._planner.discard)

    def _mark(self, command: WriteMarker) -> None:
        facts = command.facts
        text = manifest(
            self.settings.run.id,
            command.version,
            sequence=int(facts.get("sequence", 0)),
            round=str(facts.get("round", "")),
            reason=str(facts.get("reason", "")),
        )
        try:
            self.markers.write(command.kind, text)
        except OSError as error:
            # Derived from the journal and for people: its absence stops nobody.
            log.error("marker not written", marker=command.kind, version=str(command.version), reason=str(error))


def run(settings: Settings) -> int:
    """Entry of the command ``run``."""
    asyncio.run(Runner(settings).run())
    return 0
