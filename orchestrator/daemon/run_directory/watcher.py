"""Wakes the daemon when the run directory may have changed. A wake says nothing: the truth is a rescan.

watchfiles makes it prompt, the timer makes it certain: a network file system sends no events, and a directory that
was deleted and made again would otherwise stay silent for ever.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final, Literal

import structlog
from watchfiles import awatch

log = structlog.get_logger(__name__)

Why = Literal["start", "change", "timer"]

STEP_MILLISECONDS: Final = 5
"""Quiet time that ends a burst. It delays every STABLE, and costs 0.6 % of a core at 5 ms, 0.15 % at 50 ms."""

BURST_MILLISECONDS: Final = 200
"""A burst that does not end (a checkpoint being written) wakes us this often."""

RESTART_SECONDS: Final = 1.0
"""Before a watch that failed is followed by another one: what made it fail may be there still."""

Identity = tuple[int, int] | None


async def wakes(path: Path, rescan_seconds: float) -> AsyncGenerator[Why, None]:
    """Yields at once, then on changes below ``path`` and at the latest every ``rescan_seconds``; never ends by itself.

    Close it (``aclose``, or ``contextlib.aclosing``) to stop the watching thread. Wakes that come while the consumer
    is busy become one.
    """
    changed = asyncio.Event()
    watching: asyncio.Task[None] | None = None
    watched: Identity = None
    try:
        yield "start"
        while True:
            found = _identity(path)
            # inotify follows the inode: a directory that was made again needs a watch of its own.
            if watching is None or watching.done() or found != watched:
                await _stop(watching)
                watched, watching = found, _start(path, changed) if found is not None else None
            try:
                async with asyncio.timeout(rescan_seconds):
                    await changed.wait()
            except TimeoutError:
                yield "timer"
            else:
                changed.clear()
                yield "change"
    finally:
        await _stop(watching)


def _start(path: Path, changed: asyncio.Event) -> asyncio.Task[None]:
    return asyncio.create_task(_watch(path, changed), name=f"watch {path}")


async def _watch(path: Path, changed: asyncio.Event) -> None:
    try:
        async for _ in awatch(
            path, step=STEP_MILLISECONDS, recursive=True, watch_filter=None, debounce=BURST_MILLISECONDS
        ):
            changed.set()
    except Exception as error:
        # No inotify left, the directory gone again, a name that is no UTF-8 (which watchfiles cannot tell us): whatever
        # it is, the timer is there, and with the next wake another watch.
        log.debug("the run directory is looked at by the clock", path=str(path), reason=repr(error))
        await asyncio.sleep(RESTART_SECONDS)
        changed.set()


async def _stop(watching: asyncio.Task[None] | None) -> None:
    if watching is None:
        return
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching


def _identity(path: Path) -> Identity:
    """Device and inode of the directory: a deleted and re-created one is another."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino)
