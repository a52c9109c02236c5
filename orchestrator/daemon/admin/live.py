"""Status and history of the running daemon, for its HTTP routes."""

import asyncio
import time
from collections.abc import Callable, Iterable

import msgspec
from aiohttp import web
from weightsync.orchestrator.core.records import RoundEnded
from weightsync.orchestrator.core.round.links import measured
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.daemon.access.access import Access
from weightsync.orchestrator.daemon.admin.applications import Applications
from weightsync.orchestrator.daemon.admin.history import History, rows_of
from weightsync.orchestrator.daemon.admin.overview import Overview
from weightsync.orchestrator.daemon.admin.readiness import readiness
from weightsync.orchestrator.daemon.admin.routes import application_routes, routes, verb_routes
from weightsync.orchestrator.daemon.admin.verbs import Verbs
from weightsync.orchestrator.daemon.admin.views import LayoutsView, RoundsView, StatusView
from weightsync.orchestrator.daemon.journal_thread import AsyncJournal
from weightsync.orchestrator.daemon.meters import Meters
from weightsync.orchestrator.daemon.metrics import render
from weightsync.orchestrator.daemon.run_directory.thread import MarkerThread
from weightsync.orchestrator.settings.sections import EngineSection
from weightsync.orchestrator.settings.settings import Settings


class LiveViews:
    """Answers ``admin.routes.Views`` from the daemon's own state. Belongs to the loop that changes that state.

    ``layouts``: of the present plan, for the run that it is given the name of. ``work``: why decisions are not
    performed, empty when they are.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        fleet: Fleet,
        history: History,
        markers: MarkerThread,
        layouts: Callable[[str], LayoutsView | None],
        journal: AsyncJournal,
        verbs: Verbs,
        applications: Applications,
        access: Access,
        meters: Meters,
        work: Callable[[], str],
        sections: Callable[[], Iterable[EngineSection]] | None = None,
    ) -> None:
        self._fleet, self._history = fleet, history
        self._overview = Overview(settings, time.time(), sections)
        self._markers, self._layouts, self._journal = markers, layouts, journal
        self._verbs, self._applications, self._access = verbs, applications, access
        self._meters, self._work = meters, work

    def add_routes(self, app: web.Application) -> None:
        """Serve these views, the verbs and engines that apply in ``app``, whose guard knows who may."""
        app.router.add_routes([*routes(self), *verb_routes(self._verbs)])
        app.router.add_routes(application_routes(self._applications, self._access))

    async def status(self) -> StatusView:
        """What ``/status`` answers."""
        markers = [str(problem) for problem in self._markers.problems]
        return self._overview.status(self._fleet, self._history, markers, asyncio.get_running_loop().time())

    async def rounds(self, last: int) -> RoundsView:
        """What ``/rounds`` answers; from the journal, which holds more rounds than the history.

        Raises:
            JournalLost, JournalUnreadable.
        """
        entries = await self._journal.entries(kinds=[RoundEnded.__name__], newest=last)
        return RoundsView(run=self._fleet.policy.run_id, rounds=rows_of(entries))

    async def layouts(self) -> LayoutsView | None:
        """What ``/plan/layouts`` answers."""
        view = self._layouts(self._fleet.policy.run_id)
        return view and msgspec.structs.replace(view, gb_per_s=measured(self._fleet.link_rates))

    async def metrics(self) -> bytes:
        """What ``/metrics`` answers."""
        return render(await self.status(), self._meters, asyncio.get_running_loop().time())

    async def obstacle(self) -> str:
        """What ``/readyz`` answers."""
        return "the daemon is stopping" if self._fleet.stopping else self._work()

    async def ready(self, engine: str) -> tuple[bool, str] | None:
        """What ``/engines/NAME/ready`` answers."""
        return readiness(self._fleet, engine)
