"""The journal for an event loop: in order, off the loop."""

import asyncio
from pathlib import Path

import pytest
from weightsync.orchestrator.core.memory import Memory, saved
from weightsync.orchestrator.core.records import encode_record
from weightsync.orchestrator.daemon.journal import Journal
from weightsync.orchestrator.daemon.journal_thread import AsyncJournal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.sqlite"


async def test_behind_a_thread(path: Path) -> None:
    journal = AsyncJournal(Journal.open(path))
    sequences = await asyncio.gather(*(journal.append([("A", b"{}")]) for _ in range(20)))
    assert sorted(sequences) == [[number] for number in range(1, 21)]
    assert await journal.append([("B", b"{}")]) == [21]
    assert [entry.sequence for entry in await journal.entries(["B"])] == [21]
    await journal.close()
    Journal.open(path).close()


async def test_a_cancelled_caller_does_not_stop_the_commit(path: Path) -> None:
    journal = AsyncJournal(Journal.open(path))
    task = asyncio.create_task(journal.append([("A", b"{}")]))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await journal.append([("B", b"{}")])
    assert [entry.kind for entry in await journal.entries()][-1] == "B"
    await journal.close()


async def test_a_start_reads_no_further_back_than_the_newest_snapshot(path: Path) -> None:
    journal = AsyncJournal(Journal.open(path))
    await journal.append([("A", b"{}"), ("MemorySaved", encode_record(saved(Memory()))), ("B", b"{}")])
    assert [entry.kind for entry in await journal.recall()] == ["MemorySaved", "B"]
    assert not await journal.compact(), "there is little to be gained"
    await journal.close()
