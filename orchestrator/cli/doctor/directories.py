"""The daemon's two directories, tried out: what ``os.access`` believes of a disk, the disk need not."""

import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from weightsync.orchestrator.protocol.findings import Finding

TRIALS: Final = 3
"""Of which the median counts: one slow write says little."""

SLOW_JOURNAL_SECONDS: Final = 0.05
"""A round waits for four records, two of them while its engines stand still."""

SLOW_MARKER_SECONDS: Final = 0.5
"""A marker is written and read once in a version, beside the round."""

SKEW_SECONDS: Final = 2.0
"""A scan opens again what has changed within two seconds of its own clock."""

LOW_BYTES: Final = 1024**3
"""Free space below which a journal of 10,000 rounds and its copy may find no room."""


@dataclass(frozen=True, slots=True)
class Trial:
    """``seconds``: to write a file, sync it and put it in its place; ``skew``: the directory's clock before ours;
    ``free``: bytes that are left on its file system."""

    seconds: float
    skew: float
    free: int


def tried(directory: Path) -> Trial:
    """What the directory does with a file of ours, which is gone afterwards.

    Raises:
        OSError: it takes none.
    """
    trials = sorted((_once(directory) for _ in range(TRIALS)), key=lambda trial: trial[0])
    seconds, skew = trials[TRIALS // 2]
    found = os.statvfs(directory)
    return Trial(seconds, skew, found.f_bavail * found.f_frsize)


def _once(directory: Path) -> tuple[float, float]:
    name = directory / f".weightsync-doctor-{secrets.token_hex(8)}"
    placed = name.with_name(name.name + ".placed")
    began = time.perf_counter()
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, b"weightsync doctor\n")
        now = time.time()
        os.fsync(descriptor)
        skew = os.fstat(descriptor).st_mtime - now
        os.rename(name, placed)
        return time.perf_counter() - began, skew
    finally:
        os.close(descriptor)
        for left in (name, placed):
            left.unlink(missing_ok=True)


def run_directory(path: Path) -> Iterator[Finding]:
    """Whether markers can be written, how fast, and by which clock."""
    yield from _of(path, "run.directory", SLOW_MARKER_SECONDS, "a version waits for its marker so long", 0)


def state_directory(path: Path) -> Iterator[Finding]:
    """Whether records can be written, how fast, and how many more."""
    yield from _of(path, "state_directory", SLOW_JOURNAL_SECONDS, "a round waits for four records", LOW_BYTES)


def _of(path: Path, key: str, slow: float, why: str, enough: int) -> Iterator[Finding]:
    if not path.is_dir():
        return  # what it takes to make it is told without a trial
    try:
        trial = tried(path)
    except OSError as error:
        fix = "give the daemon's user the right to write there, and its unit ReadWritePaths= with that path"
        yield Finding("error", f"a file cannot be written in {path}: {error.strerror}", fix, key)
        return
    yield from judged(trial, path, key, slow, why, enough)


def judged(trial: Trial, path: Path, key: str, slow: float, why: str, enough: int) -> Iterator[Finding]:
    """What is wrong with a trial; that nothing is, otherwise."""
    well = True
    if trial.seconds > slow:
        what = f"a file of 18 bytes takes {trial.seconds * 1e3:.0f} ms to be durable in {path}: {why}"
        yield Finding("warning", what, "put it on a faster disk", key)
        well = False
    if abs(trial.skew) > SKEW_SECONDS:
        what = f"its file system's clock is {abs(trial.skew):.0f} s {'ahead' if trial.skew > 0 else 'behind'}"
        yield Finding("warning", what, "synchronise the clocks of this host and of its file server (chrony, NTP)", key)
        well = False
    if trial.free < enough:
        what = f"{trial.free / 1e9:.1f} GB are free in {path}"
        yield Finding("warning", what, f"make room for {enough / 1e9:.0f} GB, or the daemon ends when it is full", key)
        well = False
    if well:
        yield Finding("ok", f"{path} takes a file in {trial.seconds * 1e3:.1f} ms", check=key)


def room_for_checkpoints(path: Path, version_bytes: int) -> Iterator[Finding]:
    """Whether the run directory holds two more versions, for a transport that saves them there.

    ``version_bytes``: of the last round, 0 where there was none.
    """
    if not version_bytes or not path.is_dir():
        return
    found = os.statvfs(path)
    free = found.f_bavail * found.f_frsize
    if free < 2 * version_bytes:
        what = f"{free / 1e9:.1f} GB are free in {path}, and the last version took {version_bytes / 1e9:.1f} GB"
        yield Finding("error", what, "remove old broadcasts/step_<N>, or use transport: {type: nixl}", "transport")
