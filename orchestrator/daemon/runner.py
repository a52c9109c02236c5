"""The daemon's life: turns the outside into events, lets the core decide, performs its commands in their order."""

import asyncio
import contextlib
import gc
import itertools
import signal
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import structlog
from aiohttp import web
from weightsync.orchestrator.core.errors import WeightsyncError
from weightsync.orchestrator.core.events import Event, MarkersSeen, StableSeen, Tick
from weightsync.orchestrator.core.machine import start, step
from weightsync.orchestrator.core.policy import EngineConfig, Policy
from weightsync.orchestrator.core.records import RoundEnded, decode_record
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.daemon.admin.routes import routes
from weightsync.orchestrator.daemon.admin.views import (
    LayoutsView,
    RoundRow,
    RoundsView,
    StatusView,
    round_row,
)
from weightsync.orchestrator.daemon.engines.calls import Engines
from weightsync.orchestrator.daemon.group.group import Group
from weightsync.orchestrator.daemon.hub.connection import CLOSE_SECONDS, HELLO_SECONDS, HubTiming
from weightsync.orchestrator.daemon.hub.hub import Hub
from weightsync.orchestrator.daemon.hub.token import read_token
from weightsync.orchestrator.daemon.journal import AsyncJournal, Journal
from weightsync.orchestrator.daemon.outbox import Outbox
from weightsync.orchestrator.daemon.planning import Planning
from weightsync.orchestrator.daemon.run_directory.markers import MarkerDirectory
from weightsync.orchestrator.daemon.run_directory.watcher import wakes
from weightsync.orchestrator.daemon.view import View
from weightsync.orchestrator.protocol.messages import FilesystemSettings
from weightsync.orchestrator.settings.settings import Settings

log = structlog.get_logger(__name__)

TICK_SECONDS: Final = 0.25
"""Deadlines are seconds; an event acts at once, a missed one within this."""

KEPT_ROUNDS: Final = 10_000
"""Of history, at every start. A round each minute fills them in a week; each has about 1 kB."""

STOP_SECONDS: Final = 10.0
"""For the goodbye: what is not done by then is left to the next daemon, which reads the journal."""


def policy_of(settings: Settings) -> Policy:
    """The core's numbers from the settings."""
    deadlines = settings.deadlines
    return Policy(
        run_id=settings.run.id,
        engines=tuple(EngineConfig(engine.name, engine.pair or "") for engine in settings.engines),
        transport=settings.transport.message(),
        group=settings.rendezvous.group_address(),
        run_dir=str(settings.run.directory) if isinstance(settings.transport.message(), FilesystemSettings) else "",
        trainer_world=settings.trainer.world,
        attempts=settings.retry.attempts,
        backoff=settings.retry.backoff_seconds,
        join=deadlines.join_seconds,
        staged=deadlines.staged_seconds,
        rendezvous=deadlines.rendezvous_seconds,
        probe=deadlines.probe_seconds,
        probe_interval=deadlines.probe_interval_seconds,
        init=deadlines.init_seconds,
        pause=deadlines.pause_seconds,
        quiesce=deadlines.quiesce_seconds,
        transfer=deadlines.transfer_seconds,
        verify=deadlines.verify_seconds,
        finish=deadlines.finish_seconds,
        heartbeat=deadlines.heartbeat_seconds,
        lost_after=deadlines.lost_after_heartbeats,
    )


class Runner:
    """One daemon. ``run`` returns when it is told to stop, and raises when it must not go on."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.planning = Planning()
        self._ids = itertools.count(1)
        self._pending: list[Event] = []
        self._flush_due = False
        self._stopped = asyncio.Event()
        self._failure: BaseException | None = None
        self._frozen_for = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._files = ThreadPoolExecutor(max_workers=1, thread_name_prefix="markers")
        self._view = View(settings, time.time())
        self.markers = MarkerDirectory(settings.run.directory, settings.run.id)
        timing = HubTiming(
            heartbeat_seconds=settings.deadlines.heartbeat_seconds,
            missed_heartbeats=settings.deadlines.lost_after_heartbeats,
            hello_seconds=HELLO_SECONDS,
            close_seconds=CLOSE_SECONDS,
        )
        self.hub = Hub(token_file=settings.listen.token_file, post=self.post, next_id=self._next_id, timing=timing)
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
        await self.journal.prune(KEPT_ROUNDS)
        entries = await self.journal.entries()
        records = [decode_record(entry.body) for entry in entries]
        self.fleet, commands = start(policy_of(self.settings), self.journal.journal_id, records, loop.time())
        self._open_outbox()
        for entry, record in zip(entries, records, strict=True):
            self._outbox.remember(record, entry.unix_time)
        try:
            port = await self._listen()
            self._outbox.put(commands)
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._outbox.run(), name="outbox"),
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

    def _open_outbox(self) -> None:
        self.engines = Engines(self.settings, self._next_id, self.post)
        self.group = Group(self._next_id, self.post, self.hub.drop)
        self._outbox = Outbox(
            run_id=self.settings.run.id,
            journal=self.journal,
            hub=self.hub,
            engines=self.engines,
            group=self.group,
            markers=self.markers,
            files=self._files,
            planning=self.planning,
            post=self.post,
            next_id=self._next_id,
            spawn=self._spawn,
            fail=self._fail,
            look=self._look,
        )

    def _next_id(self) -> int:
        return next(self._ids)

    async def _listen(self) -> int:
        def configure(app: web.Application) -> None:
            app.router.add_routes(routes(self, read_token(self.settings.listen.token_file)))

        return await self.hub.start(self.settings.listen.host, self.settings.listen.port, configure)

    async def status(self) -> StatusView:
        """What ``/status`` answers."""
        problems = [str(problem) for problem in self.markers.problems]
        now, outbox = asyncio.get_running_loop().time(), self._outbox
        return self._view.status(self.fleet, outbox.rounds, outbox.committed_at, problems, now)

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
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
        self._files.shutdown()
        await self.journal.close()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

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
            self._outbox.put(commands)
        if self._frozen_for != self.fleet.confirmed_plan:
            self._frozen_for = self.fleet.confirmed_plan
            gc.freeze()  # what a fleet is made of stays; walking it again and again costs barriers tens of milliseconds

    def _fail(self, error: BaseException) -> None:
        """Stop at once: nothing that follows from a broken state may be performed."""
        log.error("the daemon ends", reason=str(error), exc_info=not isinstance(error, WeightsyncError))
        if self._failure is None:
            self._failure = error
        self._stopped.set()

    async def _tick(self) -> None:
        while True:
            self.post(Tick(self._next_id()))
            await asyncio.sleep(TICK_SECONDS)

    async def _watch(self) -> None:
        async with contextlib.aclosing(wakes(self.settings.run.directory, self.settings.rescan_seconds)) as woken:
            async for _ in woken:
                await self._scan()

    async def _scan(self, asked: bool = False) -> None:
        scan = await asyncio.get_running_loop().run_in_executor(self._files, self.markers.scan)
        for problem in scan.problems:
            log.warning("marker not believed", problem=str(problem))
        seen = tuple(
            StableSeen(waiting.step, waiting.stable.manifest.generation if waiting.stable.manifest else None)
            for waiting in scan.waiting
            if waiting.stable is not None
        )
        if asked or seen != self.fleet.stable:
            self.post(MarkersSeen(self._next_id(), seen))

    def _look(self, seconds: float) -> None:
        self._spawn(self._look_after(seconds), "look for STABLE")

    async def _look_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self._scan(asked=True)


def run(settings: Settings) -> int:
    """Entry of the command ``run``."""
    try:
        asyncio.run(Runner(settings).run())
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from group  # the first has cancelled the others; its type is the exit code
    return 0
