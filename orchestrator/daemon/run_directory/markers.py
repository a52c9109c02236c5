"""The run directory's markers: a scan that nothing in it can stop, and writes that are whole or absent.

Every name is opened relative to its directory's descriptor and never through a symbolic link, so that nothing in a
directory which many may write to leads the daemon elsewhere.
"""

import contextlib
import dataclasses
import errno
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from weightsync.orchestrator.protocol.limits import MAX_MARKER_BYTES
from weightsync.orchestrator.protocol.markers import (
    BROADCASTS,
    KINDS,
    OUTCOMES,
    Manifest,
    MarkerError,
    MarkerKind,
    decode_manifest,
    encode_manifest,
    parse_step,
    step_name,
)
from weightsync.orchestrator.protocol.text import clean

MAX_STEPS: Final = 100_000
"""Step directories that one scan looks at, newest first: a year of a step every five minutes."""

MAX_STRAYS: Final = 1000
"""Entries of a step directory without STABLE that are looked at for a near miss; checkpoints have hundreds of files."""

SETTLED_NANOSECONDS: Final = 2_000_000_000
"""A directory younger than this is read again, because its time stamp may be too coarse to show another change."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR)

Identity = tuple[int, ...]
"""Inode and change time of the directory, then of its STABLE (and its size)."""


class MarkerWriteError(OSError):
    """A marker could not be written. The file system's fault; may be retried."""


@dataclasses.dataclass(frozen=True, slots=True)
class MarkerProblem:
    """Something in the run directory that cannot be believed: its path, what is wrong, and what to do about it."""

    path: str
    what: str
    fix: str

    def __str__(self) -> str:
        return clean(f"{self.path}: {self.what}. Fix: {self.fix}")


@dataclasses.dataclass(frozen=True, slots=True)
class Marker:
    """One marker; ``manifest`` is None when it is empty; ``modified_ns`` is in the file system's clock."""

    kind: MarkerKind
    step: int
    manifest: Manifest | None
    modified_ns: int


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """The believable markers of one step directory."""

    step: int
    stable: Marker | None = None
    transfer_ready: Marker | None = None
    committed: Marker | None = None
    failed: Marker | None = None

    @property
    def settled(self) -> bool:
        """Whether nothing waits here: no STABLE, or an outcome of the same generation (or, without one, as new)."""
        return self.stable is None or any(_covers(outcome, self.stable) for outcome in (self.committed, self.failed))


@dataclasses.dataclass(frozen=True, slots=True)
class Scan:
    """Steps with a STABLE that has no outcome yet, ascending, and the problems not reported by an earlier scan."""

    waiting: tuple[Step, ...]
    problems: tuple[MarkerProblem, ...]


def _covers(outcome: Marker | None, stable: Marker) -> bool:
    if outcome is None:
        return False
    # The same step staged again by a restarted trainer is another version and waits for an outcome of its own.
    if outcome.manifest is not None and stable.manifest is not None:
        # … and so is a FAILED one that the same trainer stages again.
        again = outcome.manifest.restaged < stable.manifest.restaged
        return outcome.manifest.generation == stable.manifest.generation and not again
    return outcome.modified_ns >= stable.modified_ns


@dataclasses.dataclass(slots=True)
class _Remembered:
    identity: Identity
    step: Step
    problems: tuple[MarkerProblem, ...]


class MarkerDirectory:
    """The markers of run ``run_id`` below ``run_directory``. Blocking; call it from one thread at a time."""

    def __init__(self, run_directory: Path, run_id: str) -> None:
        self.run_directory = run_directory
        self._run_id = run_id
        self._remembered: dict[int, _Remembered] = {}
        self._reported: frozenset[MarkerProblem] = frozenset()

    @property
    def problems(self) -> tuple[MarkerProblem, ...]:
        """Everything that the last scan could not believe, reported before or not."""
        return tuple(sorted(self._reported, key=str))

    def scan(self) -> Scan:
        """What waits for the daemon. Costs two ``lstat`` per unchanged step directory; never raises OSError."""
        found: list[MarkerProblem] = []
        waiting: list[Step] = []
        seen: set[int] = set()
        try:
            with self._broadcasts() as root:
                for step in self._steps(root, found):
                    seen.add(step)
                    remembered = self._look(root, step)
                    found.extend(remembered.problems)
                    if not remembered.step.settled:
                        waiting.append(remembered.step)
        except OSError as error:
            # A run without broadcasts/ has published nothing yet; that is no problem.
            if error.errno != errno.ENOENT or not self.run_directory.is_dir():
                found.append(self._unreadable(BROADCASTS, error))
        # Steps that somebody removed must not fill the memory.
        for gone in self._remembered.keys() - seen:
            del self._remembered[gone]
        current = frozenset(found)
        new = tuple(sorted(current - self._reported, key=str))
        self._reported = current
        return Scan(tuple(waiting), new)

    def write(self, kind: MarkerKind, manifest: Manifest) -> None:
        """Puts a marker of the daemon's own in place, whole and durable; an outcome takes the place of the other one.

        Raises:
            ValueError: ``kind`` is the trainer's.
            MarkerWriteError: the file system refused; no torn marker is left.
        """
        if kind == "STABLE":
            raise ValueError("STABLE is the trainer's marker")
        data = encode_manifest(manifest)
        name = step_name(manifest.step)
        try:
            with self._broadcasts(create=True) as root, _directory(name, root, create=True) as directory:
                _replace(directory, kind, data)
                # The new outcome first, so that no moment shows a step without one.
                for other in OUTCOMES if kind in OUTCOMES else ():
                    if other != kind:
                        _remove(directory, other)
                os.fsync(directory)
        except OSError as error:
            path = self.run_directory / BROADCASTS / name / kind
            raise MarkerWriteError(error.errno, f"{kind} cannot be written: {error.strerror}", str(path)) from error
        self._remembered.pop(manifest.step, None)

    @contextlib.contextmanager
    def _broadcasts(self, create: bool = False) -> Iterator[int]:
        run = os.open(self.run_directory, _DIRECTORY)
        try:
            with _directory(BROADCASTS, run, create) as broadcasts:
                yield broadcasts
        finally:
            os.close(run)

    def _steps(self, root: int, found: list[MarkerProblem]) -> list[int]:
        steps = []
        with os.scandir(root) as entries:
            for entry in entries:
                step = parse_step(entry.name)
                if step is not None and entry.is_dir(follow_symlinks=False):
                    steps.append(step)
                elif not entry.name.startswith("."):
                    found.append(self._ignored(entry, step is not None))
        steps.sort()
        if len(steps) > MAX_STEPS:
            what, fix = f"{len(steps)} step directories, only the newest {MAX_STEPS} are watched", "remove old ones"
            found.append(MarkerProblem(BROADCASTS, what, fix))
        return steps[-MAX_STEPS:]

    def _ignored(self, entry: os.DirEntry[str], well_named: bool) -> MarkerProblem:
        path = f"{BROADCASTS}/{entry.name}"
        if not well_named:
            fix = "name step directories step_<N>, N of 1 to 18 digits without leading zeros"
            return MarkerProblem(path, "wrongly named, ignored", fix)
        kind = "a symbolic link" if entry.is_symlink() else "no directory"
        return MarkerProblem(path, f"is {kind}, ignored", "make it a real directory")

    def _look(self, root: int, step: int) -> _Remembered:
        remembered = self._remembered.get(step)
        name = step_name(step)
        try:
            identity = _identity(name, root)
            if remembered is not None and remembered.identity == identity:
                return remembered
            with _directory(name, root) as directory:
                fresh = self._read(directory, step, identity)
        except OSError as error:
            problems = () if error.errno == errno.ENOENT else (self._unreadable(f"{BROADCASTS}/{name}", error),)
            return _Remembered((), Step(step), problems)
        newest = max(identity[1::2])  # the change times; inodes stand between them
        if time.time_ns() - newest > SETTLED_NANOSECONDS:
            self._remembered[step] = fresh
        return fresh

    def _read(self, directory: int, step: int, identity: Identity) -> _Remembered:
        markers: dict[MarkerKind, Marker] = {}
        problems: list[MarkerProblem] = []
        for kind in KINDS:
            try:
                marker = self._marker(directory, step, kind)
            except (MarkerError, OSError) as error:
                problems.append(self._disbelieved(step, kind, error))
            else:
                if marker is not None:
                    markers[kind] = marker
        # Where a marker is, other names are nobody's concern; where none is, somebody may wonder why nothing happens.
        if not markers and not problems:
            problems.extend(_near_misses(directory, f"{BROADCASTS}/{step_name(step)}"))
        found = Step(
            step, markers.get("STABLE"), markers.get("TRANSFER_READY"), markers.get("COMMITTED"), markers.get("FAILED")
        )
        return _Remembered(identity, found, tuple(problems))

    def _marker(self, directory: int, step: int, kind: MarkerKind) -> Marker | None:
        try:
            before = os.stat(kind, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if stat.S_ISLNK(before.st_mode):
            raise MarkerError("it is a symbolic link")
        if not stat.S_ISREG(before.st_mode):
            raise MarkerError("it is no regular file")
        if before.st_size > MAX_MARKER_BYTES:
            raise MarkerError(f"it has {before.st_size} bytes, at most {MAX_MARKER_BYTES} are read")
        # Non-blocking, because the name may have become a pipe since it was looked at.
        descriptor = os.open(kind, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        with open(descriptor, "rb") as stream:
            after = os.fstat(stream.fileno())
            if not stat.S_ISREG(after.st_mode):
                raise MarkerError("it is no regular file")
            manifest = decode_manifest(stream.read(MAX_MARKER_BYTES + 1))
        if manifest is not None and manifest.run_id != self._run_id:
            raise MarkerError(f"it belongs to run {manifest.run_id!r}, this daemon serves {self._run_id!r}")
        if manifest is not None and manifest.step != step:
            raise MarkerError(f"it speaks of step {manifest.step}")
        return Marker(kind, step, manifest, after.st_mtime_ns)

    def _disbelieved(self, step: int, kind: MarkerKind, error: Exception) -> MarkerProblem:
        path = f"{BROADCASTS}/{step_name(step)}/{kind}"
        if isinstance(error, OSError):
            return self._unreadable(path, error)
        writer = "the trainer" if kind == "STABLE" else "the daemon"
        fix = f"remove it; {writer} writes it whole, by a temporary file and a rename"
        return MarkerProblem(path, f"not believed: {error}", fix)

    def _unreadable(self, path: str, error: OSError) -> MarkerProblem:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            return MarkerProblem(path, "is a symbolic link or no directory, ignored", "make it a real directory")
        where = path if self.run_directory.is_dir() else str(self.run_directory)
        return MarkerProblem(where, f"cannot be read: {error.strerror}", "check that it exists and its permissions")


@contextlib.contextmanager
def _directory(name: str, parent: int, create: bool = False) -> Iterator[int]:
    if create:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=parent)
            os.fsync(parent)
    descriptor = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _identity(name: str, root: int) -> Identity:
    """Changes when an entry of the directory does, or when STABLE is touched."""
    of_directory = os.stat(name, dir_fd=root, follow_symlinks=False)
    try:
        stable = os.stat(f"{name}/STABLE", dir_fd=root, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        return (of_directory.st_ino, of_directory.st_mtime_ns)
    return (of_directory.st_ino, of_directory.st_mtime_ns, stable.st_ino, stable.st_mtime_ns, stable.st_size)


def _near_misses(directory: int, path: str) -> Iterator[MarkerProblem]:
    with os.scandir(directory) as entries:
        for _, entry in zip(range(MAX_STRAYS), entries, strict=False):
            stem = entry.name.partition(".")[0]
            if stem.upper() in KINDS:
                yield MarkerProblem(f"{path}/{entry.name}", "wrongly named, ignored", f"name it {stem.upper()}")


def _replace(directory: int, name: str, data: bytes) -> None:
    # One fixed name: the journal's lock admits one daemon, and a leftover is replaced instead of piling up.
    temporary = f".{name}.tmp"
    _remove(directory, temporary)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o644, dir_fd=directory)
    with open(descriptor, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)


def _remove(directory: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)
