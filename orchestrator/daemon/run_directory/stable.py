"""Watches the run directory for STABLE markers and tells the core when there are other ones than before."""

import asyncio
import contextlib
from collections.abc import Awaitable
from pathlib import Path
from typing import Final

import structlog
from weightsync.orchestrator.core.events import MarkersSeen, StableSeen
from weightsync.orchestrator.daemon.inbox import Inbox
from weightsync.orchestrator.daemon.run_directory.scan import Scan
from weightsync.orchestrator.daemon.run_directory.thread import MarkerThread
from weightsync.orchestrator.daemon.run_directory.watcher import wakes

log = structlog.get_logger(__name__)


READ_ON_SECONDS: Final = 0.02
"""Between two scans as long as there are steps that none has read: half of the time for looks and for other threads."""


class StableWatch:
    """Posts MarkersSeen. ``run`` scans whenever the directory may have changed, ``look`` looks when the core asks."""

    def __init__(self, markers: MarkerThread, inbox: Inbox, run_directory: Path, rescan_seconds: float) -> None:
        self._markers, self._inbox = markers, inbox
        self._run_directory, self._rescan_seconds = run_directory, rescan_seconds
        self._posted: tuple[StableSeen, ...] = ()
        self._failure = ""

    async def run(self) -> None:
        """Scan at once, then after every change and every ``rescan_seconds``, until cancelled."""
        async with contextlib.aclosing(wakes(self._run_directory, self._rescan_seconds)) as woken:
            async for _ in woken:
                unread = True
                while unread:
                    unread = await self.scan()
                    await asyncio.sleep(READ_ON_SECONDS if unread else 0)

    async def look(self, after_seconds: float, step: int) -> None:
        """Look at one step, ``after_seconds`` from now, and post what is there, also if it is no news.

        The core asks for a look when STABLE is due, and decides by the answer whether to ask again.
        """
        await asyncio.sleep(after_seconds)
        self._tell(await self._whatever_is_there(self._markers.look(step)), always=True)

    async def scan(self) -> bool:
        """Scan once, and post what is there if it is news; whether there are steps that no scan has come to."""
        # The scan, never the wake, is the truth: whoever woke us may know less than the directory.
        scan = await self._whatever_is_there(self._markers.scan())
        self._tell(scan, always=False)
        return scan is not None and scan.unread

    async def _whatever_is_there(self, scanning: Awaitable[Scan]) -> Scan | None:
        try:
            scan = await scanning
        except Exception as error:
            # Many may write to that directory; whatever they have found, it ends a scan and nothing else.
            if repr(error) != self._failure:
                log.exception("the run directory cannot be scanned", path=str(self._run_directory))
            self._failure = repr(error)
            return None
        self._failure = ""
        return scan

    def _tell(self, scan: Scan | None, always: bool) -> None:
        seen = self._posted
        if scan is not None:
            for problem in scan.problems:
                log.warning("marker not believed", problem=str(problem))
            seen = _seen(scan)
        if always or seen != self._posted:
            self._posted = seen
            self._inbox.post(MarkersSeen(self._inbox.next_id(), seen))


def _seen(scan: Scan) -> tuple[StableSeen, ...]:
    return tuple(
        StableSeen(waiting.step, waiting.stable.manifest.generation if waiting.stable.manifest else None)
        for waiting in scan.waiting
        if waiting.stable is not None
    )
