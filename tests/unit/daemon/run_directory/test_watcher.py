"""Wakes: on changes, on the timer, and after the directory was deleted and made again."""

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from watchfiles._rust_notify import WatchfilesRustInternalError
from weightsync.orchestrator.daemon.run_directory import watcher
from weightsync.orchestrator.daemon.run_directory.watcher import Why, wakes

SOON = 20.0
"""Seconds until a test gives up on a wake that must come."""

NEVER = 3600.0


async def wake(source: AsyncGenerator[Why, None]) -> Why:
    async with asyncio.timeout(SOON):
        return await anext(source)


async def until_changed(source: AsyncGenerator[Why, None], path: Path) -> None:
    """Touches ``path`` anew until a change wakes us: inotify is set up at some time of its own."""
    pending = asyncio.ensure_future(anext(source))
    async with asyncio.timeout(SOON):
        for attempt in range(1_000_000):
            await asyncio.to_thread(path.write_text, str(attempt))
            done, _ = await asyncio.wait([pending], timeout=0.05)
            if done and pending.result() == "change":
                return
            if done:
                pending = asyncio.ensure_future(anext(source))


async def test_starts_awake_and_wakes_on_a_change(tmp_path: Path) -> None:
    async with contextlib.aclosing(wakes(tmp_path, NEVER)) as source:
        assert await wake(source) == "start"
        (tmp_path / "broadcasts" / "step_1").mkdir(parents=True)
        await until_changed(source, tmp_path / "broadcasts" / "step_1" / "STABLE")


async def test_wakes_on_the_timer_without_events(tmp_path: Path) -> None:
    async with contextlib.aclosing(wakes(tmp_path, 0.01)) as source:
        assert [await wake(source) for _ in range(3)] == ["start", "timer", "timer"]


async def test_a_directory_that_comes_later_and_comes_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    async with contextlib.aclosing(wakes(run, 0.02)) as source:
        assert [await wake(source) for _ in range(2)] == ["start", "timer"]
        for _ in range(2):
            run.mkdir()
            await until_changed(source, run / "file")
            shutil.rmtree(run)
            await wake(source)


async def test_the_timer_survives_a_watch_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> AsyncGenerator[set[object], None]:
        raise OSError("inotify watch limit reached")

    with monkeypatch.context() as patch:
        patch.setattr(watcher, "awatch", broken)
        source = wakes(tmp_path, 0.01)
        assert [await wake(source) for _ in range(3)] == ["start", "timer", "timer"]
    await until_changed(source, tmp_path / "file")
    await source.aclose()


ODD_NAMES = [b"step_\xff\xfe", b"two\nlines", b"\x1b[2J", b"-rf", b"x" * 255]


def odd_things(directory: Path) -> None:
    """Whatever somebody may leave in a directory that many write to."""
    for name in ODD_NAMES:
        os.mkdir(os.path.join(os.fsencode(directory), name))
        os.mknod(os.path.join(os.fsencode(directory), name, b"\xfe"))
    (directory / "loop").symlink_to(directory)
    (directory / "nowhere").symlink_to(directory / "nothing")
    os.mkfifo(directory / "pipe")


async def test_names_that_are_no_text_end_no_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "RESTART_SECONDS", 0.0)
    odd_things(tmp_path)
    async with contextlib.aclosing(wakes(tmp_path, NEVER)) as source:
        assert await wake(source) == "start"
        await until_changed(source, tmp_path / "STABLE")
        for name in (b"new_\xff", b"and_\xfe"):
            pending = asyncio.ensure_future(wake(source))
            await asyncio.to_thread(os.mkdir, os.path.join(os.fsencode(tmp_path), name))
            assert await pending == "change", "the failure itself wakes, for something did change"
        await until_changed(source, tmp_path / "STABLE")


async def test_a_failure_of_any_kind_leaves_the_timer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object, **__: object) -> AsyncGenerator[set[object], None]:
        raise WatchfilesRustInternalError("error in underlying watcher")
        yield set()

    monkeypatch.setattr(watcher, "awatch", broken)
    async with contextlib.aclosing(wakes(tmp_path, 0.01)) as source:
        assert [await wake(source) for _ in range(3)] == ["start", "timer", "timer"]


async def test_closing_leaves_no_task(tmp_path: Path) -> None:
    source = wakes(tmp_path, 0.01)
    assert await wake(source) == "start"
    assert await wake(source) == "timer"
    await source.aclose()
    assert {task for task in asyncio.all_tasks() if task is not asyncio.current_task()} == set()
