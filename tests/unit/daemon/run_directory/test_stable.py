"""STABLE markers become events: once each, with the generation that their manifest names."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog
from weightsync.orchestrator.core.events import Event, MarkersSeen, StableSeen
from weightsync.orchestrator.daemon.inbox import Inbox
from weightsync.orchestrator.daemon.run_directory import scan
from weightsync.orchestrator.daemon.run_directory.scan import Scan
from weightsync.orchestrator.daemon.run_directory.stable import StableWatch
from weightsync.orchestrator.daemon.run_directory.thread import MarkerThread
from weightsync.orchestrator.protocol.markers import encode_manifest, manifest
from weightsync.orchestrator.protocol.names import Version


class Bench:
    """A watch of one directory and what it posted."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.events: list[Event] = []
        self.posted = asyncio.Event()
        self.markers = MarkerThread(directory, "glm")
        self.watch = StableWatch(self.markers, Inbox(self._decide), directory, rescan_seconds=60.0)

    def _decide(self, events: list[Event]) -> None:
        self.events += events
        self.posted.set()

    def put(self, step: int, content: bytes = b"") -> Path:
        folder = self.directory / "broadcasts" / f"step_{step}"
        folder.mkdir(parents=True)
        (folder / "STABLE").write_bytes(content)
        return folder

    async def seen(self) -> list[tuple[StableSeen, ...]]:
        await asyncio.sleep(0)  # what was posted is decided in a turn of its own
        return [event.stable for event in self.events if isinstance(event, MarkersSeen)]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.markers.close()


async def test_a_scan_posts_only_what_is_new(bench: Bench) -> None:
    await bench.watch.scan()
    bench.put(3)
    await bench.watch.scan()
    await bench.watch.scan()
    bench.put(5, encode_manifest(manifest("glm", Version(9, 5))))
    await bench.watch.scan()
    assert await bench.seen() == [(StableSeen(3),), (StableSeen(3), StableSeen(5, 9))]


async def test_a_look_that_was_asked_for_is_answered_also_without_news(bench: Bench) -> None:
    bench.put(3)
    await bench.watch.scan()
    await bench.watch.look(0.0, 4)
    bench.put(4)
    await bench.watch.look(0.0, 4)
    assert await bench.seen() == [(StableSeen(3),), (StableSeen(3),), (StableSeen(3), StableSeen(4))]


async def test_a_marker_that_has_its_outcome_is_seen_no_more(bench: Bench) -> None:
    folder = bench.put(3)
    await bench.watch.scan()
    (folder / "COMMITTED").touch()
    await bench.watch.scan()
    assert await bench.seen() == [(StableSeen(3),), ()]


async def test_what_cannot_be_believed_is_a_warning_and_no_event(bench: Bench) -> None:
    bench.put(3, b"torn {")
    with structlog.testing.capture_logs() as logs:
        await bench.watch.scan()
    assert [(line["event"], line["log_level"]) for line in logs] == [("marker not believed", "warning")]
    assert "step_3/STABLE" in logs[0]["problem"]


async def test_a_scan_that_breaks_is_told_once_and_ends_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Scan:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "made up")

    bench.put(3)
    await bench.watch.scan()
    with monkeypatch.context() as patch, structlog.testing.capture_logs() as logs:
        patch.setattr(bench.markers.directory, "scan", broken)
        patch.setattr(bench.markers.directory, "look", lambda _: broken())
        await bench.watch.scan()
        await bench.watch.look(0.0, 3)
    assert [line["event"] for line in logs] == ["the run directory cannot be scanned"]
    assert await bench.seen() == [(StableSeen(3),), (StableSeen(3),)], "who asked for a look is answered"
    bench.put(4)
    await bench.watch.scan()
    assert (await bench.seen())[-1] == (StableSeen(3), StableSeen(4))


async def test_it_looks_at_once_and_when_the_directory_changes(bench: Bench) -> None:
    bench.put(3)
    running = asyncio.create_task(bench.watch.run())
    await asyncio.wait_for(bench.posted.wait(), 20)
    bench.posted.clear()
    bench.put(4)
    await asyncio.wait_for(bench.posted.wait(), 20)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert (await bench.seen())[-1] == (StableSeen(3), StableSeen(4))


async def test_it_reads_on_until_everything_was_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece at a time, so that others get their turn."""
    monkeypatch.setattr(scan, "NEWEST", 2)
    monkeypatch.setattr(bench.markers.directory, "_clock", itertools.count().__next__)
    monkeypatch.setattr(scan, "IN_TURN_SECONDS", 2)
    for step in range(1, 30):
        bench.put(step, encode_manifest(manifest("glm", Version(9, step))))
    running = asyncio.create_task(bench.watch.run())
    async with asyncio.timeout(20):
        while not (seen := await bench.seen()) or len(seen[-1]) < 29:
            bench.posted.clear()
            await bench.posted.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert [step.step for step in seen[-1]] == list(range(1, 30))
    assert len(seen) > 5
    assert seen[0][-1].step == 29, "the newest come first"
