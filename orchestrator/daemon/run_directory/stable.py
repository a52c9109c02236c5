"""Watches the run directory for STABLE markers and tells the core when there are other ones than before."""

import asyncio
import contextlib
from pathlib import Path

import structlog
from weightsync.orchestrator.core.events import MarkersSeen, StableSeen
from weightsync.orchestrator.daemon.inbox import Inbox
from weightsync.orchestrator.daemon.run_directory.markers import Scan
from weightsync.orchestrator.daemon.run_directory.thread import MarkerThread
from weightsync.orchestrator.daemon.run_directory.watcher import wakes

log = structlog.get_logger(__name__)


class StableWatch:
    """Posts MarkersSeen. ``run`` looks whenever the directory may have changed, ``look`` when the core asks."""

    def __init__(self, markers: MarkerThread, inbox: Inbox, run_directory: Path, rescan_seconds: float) -> None:
        self._markers, self._inbox = markers, inbox
        self._run_directory, self._rescan_seconds = run_directory, rescan_seconds
        self._posted: tuple[StableSeen, ...] = ()
        self._failure = ""

    async def run(self) -> None:
        """Scan at once, then after every change and every ``rescan_seconds``, until cancelled."""
        async with contextlib.aclosing(wakes(self._run_directory, self._rescan_seconds)) as woken:
            async for _ in woken:
                await self.scan()

    async def look(self, after_seconds: float) -> None:
        """Scan once, ``after_seconds`` from now, and post what is there, also if it is no news.

        The core asks for a look when STABLE is due, and decides by the answer whether to ask again.
        """
        await asyncio.sleep(after_seconds)
        if not await self.scan():
            self._inbox.post(MarkersSeen(self._inbox.next_id(), self._posted))

    async def scan(self) -> bool:
        """Read the directory once; whether there was something new to post."""
        # The scan, never the wake, is the truth: whoever woke us may know less than the directory.
        try:
            scan = await self._markers.scan()
        except Exception as error:
            # Many may write to that directory; whatever they have found, it ends a scan and nothing else.
            if repr(error) != self._failure:
                log.exception("the run directory cannot be scanned", path=str(self._run_directory))
            self._failure = repr(error)
            return False
        self._failure = ""
        for problem in scan.problems:
            log.warning("marker not believed", problem=str(problem))
        seen = _seen(scan)
        if seen == self._posted:
            return False
        self._posted = seen
        self._inbox.post(MarkersSeen(self._inbox.next_id(), seen))
        return True


def _seen(scan: Scan) -> tuple[StableSeen, ...]:
    return tuple(
        StableSeen(waiting.step, waiting.stable.manifest.generation if waiting.stable.manifest else None)
        for waiting in scan.waiting
        if waiting.stable is not None
    )
