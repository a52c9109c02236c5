"""The daemon's life: puts its parts together, lets the core decide what comes in, and ends in order."""

import asyncio
import contextlib
import gc
import secrets
import signal
import time
from collections.abc import Callable
from typing import Final

import structlog
from aiohttp import web
from weightsync.orchestrator.core.commands import Command
from weightsync.orchestrator.core.errors import PeerMisbehaved
from weightsync.orchestrator.core.events import AgentLost, Event, Tick
from weightsync.orchestrator.core.machine import start, step
from weightsync.orchestrator.core.records import decode_record
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.daemon import log as daemon_log
from weightsync.orchestrator.daemon.access.access import Access
from weightsync.orchestrator.daemon.access.descriptors import raise_limit, too_few
from weightsync.orchestrator.daemon.access.tls import ServerTls
from weightsync.orchestrator.daemon.admin.applications import Applications
from weightsync.orchestrator.daemon.admin.audit import Audit
from weightsync.orchestrator.daemon.admin.history import SHOWN, History
from weightsync.orchestrator.daemon.admin.live import LiveViews
from weightsync.orchestrator.daemon.admin.trail import Trail
from weightsync.orchestrator.daemon.admin.verbs import Verbs
from weightsync.orchestrator.daemon.engines.calls import Engines
from weightsync.orchestrator.daemon.engines.kinds import check_kinds, section_of
from weightsync.orchestrator.daemon.group.group import Group
from weightsync.orchestrator.daemon.hub.connection import CLOSE_SECONDS, HELLO_SECONDS, HubTiming
from weightsync.orchestrator.daemon.hub.hub import Hub
from weightsync.orchestrator.daemon.inbox import Inbox
from weightsync.orchestrator.daemon.journal import Journal
from weightsync.orchestrator.daemon.journal_thread import AsyncJournal
from weightsync.orchestrator.daemon.meters import Meters
from weightsync.orchestrator.daemon.notify import Supervisor
from weightsync.orchestrator.daemon.outbox import Outbox
from weightsync.orchestrator.daemon.page.routes import Page
from weightsync.orchestrator.daemon.page.timeline import Timeline
from weightsync.orchestrator.daemon.planning import Planning
from weightsync.orchestrator.daemon.policy import policy_of
from weightsync.orchestrator.daemon.reload import Reload
from weightsync.orchestrator.daemon.run_directory.stable import StableWatch
from weightsync.orchestrator.daemon.run_directory.thread import MarkerThread
from weightsync.orchestrator.daemon.stopping import Stopping
from weightsync.orchestrator.daemon.tracing import RoundTraces
from weightsync.orchestrator.protocol.messages import Fault, Refused
from weightsync.orchestrator.protocol.names import Member
from weightsync.orchestrator.protocol.traces.export import OtlpSpans, TracesUnavailable
from weightsync.orchestrator.release import release
from weightsync.orchestrator.settings.problems import ConfigError, Problem
from weightsync.orchestrator.settings.sections import EngineSection
from weightsync.orchestrator.settings.settings import Settings

log = structlog.get_logger(__name__)

TICK_SECONDS: Final = 0.25
"""Deadlines are seconds; an event acts at once, a missed one within this."""

_STOP: Final = (signal.SIGTERM, signal.SIGINT)

STOP_SECONDS: Final = 10.0
"""For the goodbye: what is not done by then is left to the next daemon, which reads the journal."""


class Runner:
    """One daemon. ``run`` returns when it is told to stop, and raises when it must not go on.

    ``read`` gives the settings anew when SIGHUP asks for it.

    Raises:
        UnknownEngineKind: the settings name an engine that nobody here can talk to.
        ConfigError: a token file cannot serve, or there are too few descriptors.
    """

    def __init__(self, settings: Settings, read: Callable[[], Settings] | None = None) -> None:
        check_kinds(settings.engines)
        self.settings, self._read = settings, read
        self.inbox = Inbox(self._decide)
        self.planning, self.history, self.meters, self.timeline = Planning(), History(), Meters(), Timeline()
        self.markers = MarkerThread(settings.run.directory, settings.run.id)
        self.stable = StableWatch(self.markers, self.inbox, settings.run.directory, settings.rescan_seconds)
        timing = HubTiming(
            heartbeat_seconds=settings.deadlines.heartbeat_seconds,
            missed_heartbeats=settings.deadlines.lost_after_heartbeats,
            hello_seconds=HELLO_SECONDS,
            close_seconds=CLOSE_SECONDS,
        )
        allowed = raise_limit()
        short = too_few(allowed, settings)
        if short is not None:
            raise ConfigError(settings.state_directory, short)
        tls = None if settings.listen.tls is None else ServerTls(settings.listen.tls)
        self.access = Access(settings.credentials, settings.run.id, daemon_log.withhold, tls)
        self.meters.refusals_of(self.access.refusals.counts)
        self.hub = Hub(access=self.access, post=self.inbox.post, next_id=self.inbox.next_id, timing=timing)
        self.spans = _spans(settings)
        self.traces = RoundTraces(self.spans)
        self.audit = Audit(settings.state_directory)
        self.trail = Trail(self.audit)
        self.access.refusals.audited = self.trail.refused
        self.supervisor = Supervisor()
        self._frozen_for = 0
        self.fleet: Fleet
        self.journal: AsyncJournal
        self.engines: Engines
        self.group: Group
        self.outbox: Outbox
        self.page: Page
        self.reload: Reload
        self.stopping: Stopping

    # ---------------------------------------------------------------------------------------------------------- life
    async def run(self, ready: Callable[[int], None] | None = None) -> None:
        """Serve until SIGTERM or SIGINT; a round under way may end within ``deadlines.stop_seconds``.

        Args:
            ready: called with the port once agents can connect.

        Raises:
            WeightsyncError: an invariant broke; the journal is what the next daemon believes.
            JournalLost, JournalError, OSError: the disk or the address.
            ConfigError: an engine's key file cannot be read.
        """
        loop = asyncio.get_running_loop()
        # A signal is no exception in the middle of a decision: the loop ends its turn, then the daemon ends in order.
        for number in _STOP:
            loop.add_signal_handler(number, self.inbox.stopped.set)
        self.journal = AsyncJournal(Journal.open(self.settings.journal_path))
        self.meters.journal_at(self.settings.journal_path)
        commands = await self._recall()
        self._open_outbox()
        try:
            # Before anybody can connect: nobody hears of an epoch that the next daemon would not find in the journal.
            await self.outbox.perform(commands)
            port = await self._listen()
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self.outbox.run(), name="outbox"),
                    group.create_task(self.stable.run(), name="markers"),
                    group.create_task(self._tick(), name="ticks"),
                    group.create_task(self.trail.run(), name="audit log"),
                    group.create_task(self.reload.run(), name="reload"),
                    group.create_task(self.reload.watch(), name="engines_from"),
                    group.create_task(self.access.credentials.watch(self.settings.rescan_seconds), name="credentials"),
                    group.create_task(self.page.stream.run(), name="pages"),
                ]
                for number in _STOP:
                    loop.add_signal_handler(number, self.stopping.ask)
                loop.add_signal_handler(signal.SIGHUP, self.reload.ask)
                log.info(
                    "the daemon serves", release=release(), run=self.settings.run.id, epoch=self.fleet.epoch, port=port
                )
                self.supervisor.ready(self.fleet.sentence)
                if ready is not None:
                    ready(port)
                await self.inbox.stopped.wait()
                self.supervisor.stopping("the daemon ends")
                for task in tasks:
                    task.cancel()
            # Out of the group, which would wrap it: its type is the exit code.
            if self.inbox.failure is not None:
                raise self.inbox.failure
        finally:
            await self._close()

    async def _recall(self) -> list[Command]:
        """The fleet as the journal knows it; what the core wants done first."""
        records = [decode_record(entry.body, entry.intact) for entry in await self.journal.recall()]
        for kind, newest in SHOWN.items():
            self.history.recall(await self.journal.entries([kind], newest))
        now = asyncio.get_running_loop().time()
        self.fleet, commands = start(
            policy_of(self.settings), self.journal.journal_id, records, now, secrets.token_hex(8)
        )
        for name, opened in self.fleet.memory.open_rounds.items():
            self.trail.decided(name, opened.digests)
        return commands

    def _open_outbox(self) -> None:
        credentials = self.access.credentials
        self.engines = Engines(
            self.settings, self.inbox, lambda: self.fleet.memory.admitted, credentials.of_engine, self.traces
        )
        self.group = Group(self.inbox, self.hub.drop)
        self.outbox = Outbox(
            inbox=self.inbox,
            journal=self.journal,
            history=self.history,
            hub=self.hub,
            group=self.group,
            engines=self.engines,
            planning=self.planning,
            markers=self.markers,
            stable=self.stable,
            meters=self.meters,
            trail=self.trail,
            traces=self.traces,
        )
        self.reload = Reload(self.settings, self._read, self.inbox, self.engines, self.access.again)
        self.stopping = Stopping(self.inbox, self.outbox, self.fleet, self.reload.stop_seconds)

    async def _listen(self) -> int:
        views = LiveViews(
            settings=self.settings,
            fleet=self.fleet,
            history=self.history,
            markers=self.markers,
            layouts=self.planning.layouts,
            journal=self.journal,
            sections=self._sections,
            applications=Applications(self.fleet, self._ask, self.inbox.next_id),
            access=self.access,
            meters=self.meters,
            work=lambda: self.outbox.obstacle,
            verbs=Verbs(self.fleet, self.audit, self._ask, self.inbox.next_id),
        )
        self.page = Page(
            fleet=self.fleet,
            history=self.history,
            timeline=self.timeline,
            status=views.status,
            plan=lambda: self.planning.plan,
            directory=self.settings.state_directory,
        )

        def configure(app: web.Application) -> None:
            views.add_routes(app)
            self.page.add_routes(app)

        listen = self.settings.listen
        if listen.insecure and listen.tls is None:
            log.warning("listen.insecure: tokens of viewers and operators can be read on its network", host=listen.host)
        return await self.hub.start(listen.host, listen.port, configure)

    def _sections(self) -> list[EngineSection]:
        """All engines, as they are configured or have introduced themselves."""
        settings, admitted = self.reload.settings, self.fleet.memory.admitted
        return [*settings.engines, *(section_of(engine, settings) for engine in admitted.values())]

    async def _close(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                # What makes calls ends before what the calls go through.
                await self.inbox.close()
                await self.engines.close()
                await self.group.close()
                await self.hub.close()
        # Both wait for what they have begun, however long the disk takes: its outcome would be unknown.
        self.markers.close()
        await self.journal.close()
        if self.spans is not None:
            await asyncio.to_thread(self.spans.close)

    # -------------------------------------------------------------------------------------------------------- events
    async def _ask(self, event: Event) -> None:
        """Have ``event`` decided; returns when what follows from it is durable, so far as it is to be."""
        self.inbox.post(event)
        await asyncio.sleep(0)  # the inbox is emptied in the loop's next turn, before this goes on
        await self.outbox.flushed()

    def _decide(self, events: list[Event]) -> None:
        now = asyncio.get_running_loop().time()
        self.meters.happened(events, now)
        while True:
            try:
                commands = step(self.fleet, events, now)
                break
            except PeerMisbehaved as error:  # before it changed anything: the rest is decided as if it had not come
                events = self._without(events, error)
        self.timeline.happened(self.fleet, events, now)
        if commands:
            self.meters.commanded(commands)
            self.outbox.put(commands)
        self.stopping.decided()
        self._freeze_after_rendezvous()
        if not self.outbox.obstacle:  # a tick comes here several times a second, also where nothing happens
            self.supervisor.works(self.fleet.sentence)

    def _without(self, events: list[Event], error: PeerMisbehaved) -> list[Event]:
        """Send the agent away whose message cannot be true; the events without those of its connection."""
        log.error("an agent is sent away", agent=str(error.member), reason=error.reason, story=self.fleet.sentence)
        if not self.hub.drop(error.member, error.connection, error.reason):
            refused = Refused(reason=error.reason, fault=_side(error.member), retry=True)
            self.hub.refuse(error.member, error.connection, refused)
        kept = [event for event in events if getattr(event, "connection", None) != error.connection]
        if len(kept) == len(events):
            raise error  # it is about none of them, and would come again without end: a bug of the core
        return [*kept, AgentLost(self.inbox.next_id(), error.member, error.connection, error.reason)]

    def _freeze_after_rendezvous(self) -> None:
        """Once per complete rendezvous, take what it built out of the garbage collector's walk.

        The agents, their layouts and the plan are many objects and stay until the next plan. A full collection walks
        all of them, finds nothing, and stops the loop for tens of milliseconds in the middle of a barrier. What was
        frozen is looked at here: connections that ended since the last time are cycles, and frozen they stay for ever.
        """
        if self._frozen_for != self.fleet.confirmed_plan:
            self._frozen_for = self.fleet.confirmed_plan
            gc.unfreeze()
            gc.collect()
            gc.freeze()

    async def _tick(self) -> None:
        while True:
            self.inbox.post(Tick(self.inbox.next_id()))
            asleep = time.monotonic()
            await asyncio.sleep(TICK_SECONDS)
            self.meters.late(time.monotonic() - asleep - TICK_SECONDS)


def _spans(settings: Settings) -> OtlpSpans | None:
    endpoint = settings.traces.otlp_endpoint
    if endpoint is None:
        return None
    try:
        return OtlpSpans(endpoint, settings.run.id)
    except TracesUnavailable as error:
        problem = Problem("traces.otlp_endpoint", endpoint, str(error), "install it, or leave the key out")
        raise ConfigError(settings.state_directory, problem) from error


def _side(member: Member) -> Fault:
    return "trainer" if member.role == "trainer" else "engine"


def run(settings: Settings, read: Callable[[], Settings] | None = None) -> int:
    """Entry of the command ``run``. ``read``: as for ``Runner``."""
    try:
        asyncio.run(Runner(settings, read).run())
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from group  # the first has cancelled the others; its type is the exit code
    return 0
