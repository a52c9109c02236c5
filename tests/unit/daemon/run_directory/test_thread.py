"""The markers for an event loop: in order, off the loop, and no failure of theirs is anybody else's."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from weightsync.orchestrator.daemon.run_directory import thread
from weightsync.orchestrator.daemon.run_directory.markers import MarkerWriteError
from weightsync.orchestrator.daemon.run_directory.scan import Scan
from weightsync.orchestrator.daemon.run_directory.thread import MarkerThread
from weightsync.orchestrator.protocol.markers import MarkerError
from weightsync.orchestrator.protocol.names import Version

VERSION = Version(7, 5)


@pytest.fixture
async def markers(tmp_path: Path) -> AsyncIterator[MarkerThread]:
    made = MarkerThread(tmp_path, "glm")
    yield made
    made.close()


def written(directory: Path, kind: str) -> Any:
    return json.loads((directory / "broadcasts" / "step_5" / kind).read_bytes())


async def test_a_write_is_whole_once_it_is_closed(tmp_path: Path, markers: MarkerThread) -> None:
    markers.write("COMMITTED", VERSION, {"sequence": 3})
    markers.close()
    told = written(tmp_path, "COMMITTED")
    assert (told["run_id"], told["step"], told["generation"], told["sequence"]) == ("glm", 5, 7, 3)


async def test_a_write_waits_for_no_scan(
    tmp_path: Path, markers: MarkerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first scan of a large directory takes long, and its file system may hang."""
    written_by_then = threading.Event()

    def scan() -> Scan:
        assert written_by_then.wait(20)
        return Scan((), ())

    monkeypatch.setattr(markers.directory, "scan", scan)
    scanning = asyncio.ensure_future(markers.scan())
    await asyncio.sleep(0)  # it is asked
    markers.write("COMMITTED", VERSION, {})
    markers._writes.shutdown()
    assert written(tmp_path, "COMMITTED")["step"] == 5
    written_by_then.set()
    assert await scanning == Scan((), ())


async def test_writes_and_scans_each_happen_in_their_order(tmp_path: Path, markers: MarkerThread) -> None:
    step = tmp_path / "broadcasts" / "step_5"
    step.mkdir(parents=True)
    before = asyncio.ensure_future(markers.scan())
    await asyncio.sleep(0)  # it is asked
    (step / "STABLE").touch()
    after = asyncio.ensure_future(markers.look(5))
    await before
    assert [waiting.step for waiting in (await after).waiting] == [5]
    markers.write("FAILED", VERSION, {"reason": "r"})
    markers.write("COMMITTED", VERSION, {})
    markers.close()
    assert sorted(path.name for path in step.iterdir()) == ["COMMITTED", "STABLE"]


async def test_the_loop_goes_on_while_a_file_system_does_not(
    markers: MarkerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = threading.Event()

    def scan() -> Scan:
        assert free.wait(20)
        return Scan((), ())

    monkeypatch.setattr(markers.directory, "scan", scan)
    scanning = asyncio.ensure_future(markers.scan())
    await asyncio.sleep(0)
    assert not scanning.done()
    free.set()
    assert await scanning == Scan((), ())


@pytest.mark.parametrize("error", [PermissionError(13, "read-only"), MarkerError("too large")])
async def test_a_failed_write_is_logged_and_nothing_else(
    markers: MarkerThread, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(thread, "write_marker", fail)
    with structlog.testing.capture_logs() as logs:
        markers.write("FAILED", VERSION, {"reason": "r"})
        markers.close()
    assert [(line["event"], line["marker"], line["version"], line["reason"]) for line in logs] == [
        ("marker not written", "FAILED", str(VERSION), str(error))
    ]


async def test_what_a_full_disk_refused_is_a_problem_until_it_is_written(
    tmp_path: Path, markers: MarkerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said once, tried again with each scan, and nothing of it is lost."""
    real = thread.write_marker

    def full(directory: Path, kind: Any, told: Any) -> None:
        raise MarkerWriteError(28, f"{kind} cannot be written: No space left on device", f"step_{told.step}/{kind}")

    async def scanned() -> None:
        await markers.scan()
        await asyncio.wrap_future(markers._writes.submit(lambda: None))  # what came before it is done

    monkeypatch.setattr(thread, "write_marker", full)
    with structlog.testing.capture_logs() as logs:
        markers.write("TRANSFER_READY", VERSION, {})
        markers.write("COMMITTED", VERSION, {"sequence": 3})
        markers.write("COMMITTED", Version(7, 6), {"sequence": 4})
        await scanned()
        await scanned()
        monkeypatch.setattr(thread, "RETRY_SECONDS", 0.0)
        (problem,) = markers.problems
        assert problem.path == "broadcasts/step_6/COMMITTED"
        assert "No space left on device" in problem.what
        assert problem.what.endswith("nor 1 more markers")
        assert "make room in the run directory" in problem.fix
        monkeypatch.setattr(thread, "write_marker", real)
        monkeypatch.setattr(thread, "RETRY_SECONDS", 60.0)
        await scanned()
        assert markers.problems == (problem,), "its own tries wake it, and are not to be endless"
        monkeypatch.setattr(thread, "RETRY_SECONDS", 0.0)
        await scanned()
    assert markers.problems == ()
    assert written(tmp_path, "COMMITTED")["sequence"] == 3
    assert (tmp_path / "broadcasts/step_6/COMMITTED").exists()
    assert [(line["event"], line["marker"]) for line in logs] == [
        ("marker not written", "TRANSFER_READY"), ("marker not written", "COMMITTED"),
        ("marker not written", "COMMITTED"), ("marker written after all", "COMMITTED"),
        ("marker written after all", "COMMITTED"),
    ]  # fmt: skip


async def test_what_is_owed_is_bounded(markers: MarkerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise MarkerWriteError(28, "full")

    monkeypatch.setattr(thread, "write_marker", full)
    for step in range(thread.MAX_OWED + 5):
        markers.write("COMMITTED", Version(7, step), {})
    markers.close()
    assert [version.step for version in markers._owed] == list(range(5, thread.MAX_OWED + 5))


async def test_problems_are_those_of_the_last_scan(tmp_path: Path, markers: MarkerThread) -> None:
    (tmp_path / "broadcasts" / "step_x").mkdir(parents=True)
    assert markers.problems == ()
    scan = await markers.scan()
    assert markers.problems == scan.problems
    assert [problem.path for problem in markers.problems] == ["broadcasts/step_x"]
