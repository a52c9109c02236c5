"""Status and history of the running daemon, for its HTTP routes."""

import asyncio

from weightsync.orchestrator.core.records import RoundEnded
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.daemon.admin.views import LayoutsView, RoundsView, StatusView
from weightsync.orchestrator.daemon.history import History, rows_of
from weightsync.orchestrator.daemon.journal import AsyncJournal
from weightsync.orchestrator.daemon.overview import Overview
from weightsync.orchestrator.daemon.planning import Planning
from weightsync.orchestrator.daemon.run_directory.thread import MarkerThread


class LiveViews:
    """Answers ``admin.routes.Views`` from the daemon's own state. Belongs to the loop that changes that state."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        overview: Overview,
        history: History,
        markers: MarkerThread,
        planning: Planning,
        journal: AsyncJournal,
    ) -> None:
        self._fleet, self._overview, self._history = fleet, overview, history
        self._markers, self._planning, self._journal = markers, planning, journal

    async def status(self) -> StatusView:
        """What ``/status`` answers."""
        problems = [str(problem) for problem in self._markers.problems]
        return self._overview.status(self._fleet, self._history, problems, asyncio.get_running_loop().time())

    async def rounds(self, last: int) -> RoundsView:
        """What ``/rounds`` answers; from the journal, which holds more rounds than the history.

        Raises:
            JournalLost, JournalUnreadable.
        """
        entries = await self._journal.entries(kinds=[RoundEnded.__name__], newest=last)
        return RoundsView(run=self._fleet.policy.run_id, rounds=rows_of(entries))

    async def layouts(self) -> LayoutsView | None:
        """What ``/plan/layouts`` answers."""
        return self._planning.layouts(self._fleet.policy.run_id)
