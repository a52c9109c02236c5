"""Status and history of the running daemon, for its HTTP routes."""

import asyncio
import time
from collections.abc import Callable, Iterable

from aiohttp import web
from weightsync.orchestrator.core.records import RoundEnded
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.daemon.admin.history import History, rows_of
from weightsync.orchestrator.daemon.admin.overview import Overview
from weightsync.orchestrator.daemon.admin.readiness import readiness
from weightsync.orchestrator.daemon.admin.routes import routes, verb_routes
from weightsync.orchestrator.daemon.admin.verbs import Verbs
from weightsync.orchestrator.daemon.admin.views import LayoutsView, RoundsView, StatusView
from weightsync.orchestrator.daemon.journal_thread import AsyncJournal
from weightsync.orchestrator.daemon.run_directory.thread import MarkerThread
from weightsync.orchestrator.settings.sections import EngineSection
from weightsync.orchestrator.settings.settings import Settings


class LiveViews:
    """Answers ``admin.routes.Views`` from the daemon's own state. Belongs to the loop that changes that state.

    ``layouts``: of the present plan, for the run that it is given the name of.
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
        sections: Callable[[], Iterable[EngineSection]] | None = None,
    ) -> None:
        self._fleet, self._history = fleet, history
        self._overview = Overview(settings, time.time(), sections)
        self._markers, self._layouts, self._journal, self._verbs = markers, layouts, journal, verbs

    def add_routes(self, app: web.Application) -> None:
        """Serve these views and the verbs in ``app``, whose guard knows who may."""
        app.router.add_routes([*routes(self), *verb_routes(self._verbs)])

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
        return self._layouts(self._fleet.policy.run_id)

    async def ready(self, engine: str) -> tuple[bool, str] | None:
        """What ``/engines/NAME/ready`` answers."""
        return readiness(self._fleet, engine)
