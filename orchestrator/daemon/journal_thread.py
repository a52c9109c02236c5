"""The journal for an event loop."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from weightsync.orchestrator.core.records import MemorySaved
from weightsync.orchestrator.daemon.compaction import Compaction
from weightsync.orchestrator.daemon.journal import Entry, Journal

T = TypeVar("T")


class AsyncJournal:
    """A Journal behind one thread of its own, because an fsync takes milliseconds that the event loop has not.

    What is asked of it happens in that order.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.journal_id = journal.journal_id
        self._compaction = Compaction(journal)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")

    async def append(self, entries: Sequence[tuple[str, bytes]]) -> list[int]:
        """As ``Journal.append``. A cancelled caller does not stop a commit that has begun."""
        return await self._run(partial(self.journal.append, entries))

    async def entries(self, kinds: Iterable[str] | None = None, newest: int | None = None) -> list[Entry]:
        """As ``Journal.entries``, all at once."""
        return await self._run(lambda: list(self.journal.entries(kinds, newest)))

    async def recall(self) -> list[Entry]:
        """What the fold of everything needs: the newest snapshot and what came after it. Raises JournalLost."""
        return await self._run(lambda: list(self.journal.since(MemorySaved.__name__)))

    async def compact(self) -> bool:
        """As ``Compaction.step``."""
        return await self._run(self._compaction.step)

    async def close(self) -> None:
        """Waits for the commits under way, then closes."""
        await self._run(self.journal.close)
        self._thread.shutdown()

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
