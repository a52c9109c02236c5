"""A journal on a disk that is full, and on one that takes long: nobody is told what is not durable.

A full one ends the daemon (exit code 74) before it has told anybody; a slow one makes a round longer and nothing else.
What the engines' steps read is judged at the end of each test (``Several.judge``).
"""

import os
import subprocess
import time
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


@pytest.fixture
def small_disk(several: Several) -> Iterator[Path]:
    """The daemon's state directory on a file system of 2 MiB."""
    state = several.whole.directory / "state"
    state.mkdir(mode=0o700)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "tmpfs", str(state)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield state
    finally:
        several.close()
        subprocess.run(["umount", "-l", str(state)], check=True)


@pytest.mark.parametrize(
    "phase", ["before LiveDirty", pytest.param("before Decided", marks=pytest.mark.long), "before Committed"]
)
def test_a_full_disk_ends_the_daemon_and_the_next_one_goes_on(several: Several, small_disk: Path, phase: str) -> None:
    several.open()
    ballast = small_disk / "ballast"
    with several.stopped_at(phase) as step, ballast.open("wb", buffering=0) as filled:
        free = os.statvfs(small_disk)
        try:
            while filled.write(bytes(free.f_frsize)):
                pass
        except OSError:
            pass
    daemon = several.whole.daemon
    assert daemon is not None
    assert daemon.child is not None
    assert daemon.child.wait(30) == CANNOT_WRITE, daemon.tail()
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
