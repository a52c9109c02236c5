"""Disks that are full, and a journal on one that takes long: nobody is told what is not durable.

The journal's full one ends the daemon (exit code 74) before it has told anybody; a slow one makes a round longer and
nothing else. Markers that the run directory has no room for are owed, and told of, until there is.
What the engines' steps read is judged at the end of each test (``Several.judge``).
"""

import contextlib
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from several import NAMES, ORDINARY, SETTINGS, Several, StandIn

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

CANNOT_WRITE = 74
SLOW_COMMIT = 0.3
"""Seconds of each commit on the slow disk; a round has four before its engines go on."""


@pytest.fixture
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Several]:
    directory = tmp_path_factory.mktemp("several")
    several = Several(directory, [StandIn(name, directory) for name in NAMES], SETTINGS)
    try:
        yield several
        several.judge()
    finally:
        several.close()


@contextlib.contextmanager
def mounted(several: Several, name: str) -> Iterator[Path]:
    """This directory of the daemon's, on a file system of 2 MiB."""
    directory = several.whole.directory / name
    directory.mkdir(mode=0o700, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "tmpfs", str(directory)], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"no file system may be mounted here: {done.stderr.decode().strip()}")
    try:
        yield directory
    finally:
        several.close()
        subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.fixture
def small_disk(several: Several) -> Iterator[Path]:
    with mounted(several, "state") as state:
        yield state


@pytest.fixture
def small_run_directory(several: Several) -> Iterator[Path]:
    with mounted(several, "run") as run:
        yield run


def fill(disk: Path) -> Path:
    """Until nothing more fits; the file to remove."""
    ballast, free = disk / "ballast", os.statvfs(disk)
    with ballast.open("wb", buffering=0) as filled, contextlib.suppress(OSError):
        while filled.write(bytes(free.f_frsize)):
            pass
    return ballast


@pytest.mark.parametrize(
    "phase", ["before LiveDirty", pytest.param("before Decided", marks=pytest.mark.long), "before Committed"]
)
def test_a_full_disk_ends_the_daemon_and_the_next_one_goes_on(several: Several, small_disk: Path, phase: str) -> None:
    several.open()
    with several.stopped_at(phase) as step:
        ballast = fill(small_disk)
    daemon = several.whole.daemon
    assert daemon is not None
    assert daemon.child is not None
    assert daemon.child.wait(30) == CANNOT_WRITE, daemon.tail()
    assert str(small_disk / "journal.sqlite") in daemon.tail()
    assert "full" in daemon.tail()
    ballast.unlink()
    several.start_daemon()
    several.ended(step)
    several.everywhere()


def test_a_slow_disk_makes_rounds_longer_and_nothing_else(several: Several) -> None:
    several.daemon_env["WEIGHTSYNC_TEST_SLOW_COMMIT"] = str(SLOW_COMMIT)
    several.open()
    began = time.monotonic()
    several.publish()
    assert time.monotonic() - began > 3 * SLOW_COMMIT, "the disk was not slow"
    several.keep_going(NAMES, began, 4 * SLOW_COMMIT + ORDINARY)


def test_a_full_run_directory_is_told_of_and_costs_no_version(several: Several, small_run_directory: Path) -> None:
    several.open()
    with several.stopped_at("before Decided") as step:
        ballast = fill(small_run_directory)
    several.ended(step)
    several.everywhere()
    marker = small_run_directory / "broadcasts" / f"step_{step}" / "COMMITTED"

    def told() -> list[str]:
        return [problem["what"] for problem in several.whole.status()["problems"] if "COMMITTED" in problem["what"]]

    (what,) = several.whole.until(told, "status to name the marker")
    assert "cannot be written" in what
    assert "No space left on device" in what
    assert not marker.exists()
    asked = urllib.request.Request(f"{several.whole.url}/metrics", headers=several.whole._operator())
    with urllib.request.urlopen(asked) as answer:
        assert b'weightsync_problems{severity="degraded"} 0.0' not in answer.read()
    with urllib.request.urlopen(f"{several.whole.url}/readyz") as answer:
        assert answer.status == 200, "what is decided is done, and nobody is kept from connecting"
    several.begin()
    refused = several.trainer.hear()
    assert "No space left on device" in refused["error"], refused
    ballast.unlink()
    several.whole.until(marker.exists, "the marker to be written")
    several.whole.until(lambda: not told(), "the problem to be gone")
    several.publish()
