"""How the daemon ends when it is told to: the round under way may end first, and a second word ends it at once."""

import asyncio
from collections.abc import Callable

import structlog
from weightsync.orchestrator.core.events import StopAsked
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.daemon.inbox import Inbox
from weightsync.orchestrator.daemon.outbox import Outbox

log = structlog.get_logger(__name__)


class Stopping:
    """Sets ``inbox.stopped`` when the daemon is to end. ``seconds``: how long a round may take until then."""

    def __init__(self, inbox: Inbox, outbox: Outbox, fleet: Fleet, seconds: Callable[[], float]) -> None:
        self._inbox, self._outbox, self._fleet, self._seconds = inbox, outbox, fleet, seconds
        self._asked = self._leaving = False

    def ask(self) -> None:
        """SIGTERM or SIGINT arrived."""
        if self._asked:
            log.warning("told again to stop: the daemon ends at once", state=self._fleet.sentence)
            self._inbox.stopped.set()
            return
        self._asked = True
        log.info("the daemon stops", state=self._fleet.sentence, round_may_take_seconds=self._seconds())
        self._inbox.post(StopAsked(self._inbox.next_id()))
        asyncio.get_running_loop().call_later(self._seconds(), self._late)

    def decided(self) -> None:
        """The core has decided something; perhaps that the last round is over."""
        if self._fleet.stopping and self._fleet.round is None and not self._leaving:
            self._leaving = True
            self._inbox.spawn(self._leave(), "stop")

    async def _leave(self) -> None:
        await self._outbox.flushed()  # what ends the round is told and written, too
        self._inbox.stopped.set()

    def _late(self) -> None:
        if not self._inbox.stopped.is_set():
            log.warning("the round is left to the next start", state=self._fleet.sentence)
            self._inbox.stopped.set()
