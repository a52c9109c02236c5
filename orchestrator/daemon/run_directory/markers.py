"""The markers of one step: read without trusting any name, written whole or not at all.

Every name is opened relative to its directory's descriptor and never through a symbolic link, so that nothing in a
directory which many may write to leads the daemon elsewhere.
"""

import contextlib
import dataclasses
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from weightsync.orchestrator.daemon.run_directory.problems import MarkerProblem
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
    step_name,
)

MAX_STRAYS: Final = 1000
"""Entries of a step directory without STABLE that are looked at for a near miss; checkpoints have hundreds of files."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class MarkerWriteError(OSError):
    """A marker could not be written. The file system's fault; may be retried."""


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


def _covers(outcome: Marker | None, stable: Marker) -> bool:
    if outcome is None:
        return False
    # The same step staged again by a restarted trainer is another version and waits for an outcome of its own.
    if outcome.manifest is not None and stable.manifest is not None:
        # … and so is a FAILED one that the same trainer stages again.
        again = outcome.manifest.restaged < stable.manifest.restaged
        return outcome.manifest.generation == stable.manifest.generation and not again
    return outcome.modified_ns >= stable.modified_ns


@contextlib.contextmanager
def open_broadcasts(run_directory: Path, create: bool = False) -> Iterator[int]:
    """The descriptor of ``broadcasts/``. Raises OSError."""
    run = os.open(run_directory, _DIRECTORY)
    try:
        with open_directory(BROADCASTS, run, create) as broadcasts:
            yield broadcasts
    finally:
        os.close(run)


@contextlib.contextmanager
def open_directory(name: str, parent: int, create: bool = False) -> Iterator[int]:
    """The descriptor of the directory ``name``, which may be no symbolic link. Raises OSError."""
    if create:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=parent)
            os.fsync(parent)
    descriptor = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_marker(run_directory: Path, kind: MarkerKind, manifest: Manifest) -> None:
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
        with (
            open_broadcasts(run_directory, create=True) as root,
            open_directory(name, root, create=True) as directory,
        ):
            _replace(directory, kind, data)
            # The new outcome first, so that no moment shows a step without one.
            for other in OUTCOMES if kind in OUTCOMES else ():
                if other != kind:
                    _remove(directory, other)
            os.fsync(directory)
    except OSError as error:
        path = run_directory / BROADCASTS / name / kind
        raise MarkerWriteError(error.errno, f"{kind} cannot be written: {error.strerror}", str(path)) from error


def read_markers(directory: int, step: int, run_id: str) -> tuple[Step, tuple[MarkerProblem, ...]]:
    """The believable markers in the open ``directory`` of ``step``, and what is wrong with the others."""
    markers: dict[MarkerKind, Marker] = {}
    problems: list[MarkerProblem] = []
    for kind in KINDS:
        try:
            marker = _marker(directory, step, kind, run_id)
        except (MarkerError, OSError) as error:
            problems.append(_disbelieved(step, kind, error))
        else:
            if marker is not None:
                markers[kind] = marker
    # Where a marker is, other names are nobody's concern; where none is, somebody may wonder why nothing happens.
    if not markers and not problems:
        problems.extend(_near_misses(directory, f"{BROADCASTS}/{step_name(step)}"))
    found = Step(
        step, markers.get("STABLE"), markers.get("TRANSFER_READY"), markers.get("COMMITTED"), markers.get("FAILED")
    )
    return found, tuple(problems)


def unreadable(path: str, error: OSError) -> MarkerProblem:
    """The problem that ``path`` cannot be read."""
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return MarkerProblem(path, "is a symbolic link or no directory, ignored", "make it a real directory")
    return MarkerProblem(path, f"cannot be read: {error.strerror}", "check that it exists and its permissions")


def _marker(directory: int, step: int, kind: MarkerKind, run_id: str) -> Marker | None:
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
    if manifest is not None and manifest.run_id != run_id:
        raise MarkerError(f"it belongs to run {manifest.run_id!r}, this daemon serves {run_id!r}")
    if manifest is not None and manifest.step != step:
        raise MarkerError(f"it speaks of step {manifest.step}")
    return Marker(kind, step, manifest, after.st_mtime_ns)


def _disbelieved(step: int, kind: MarkerKind, error: Exception) -> MarkerProblem:
    path = f"{BROADCASTS}/{step_name(step)}/{kind}"
    if isinstance(error, OSError):
        return unreadable(path, error)
    writer = "the trainer" if kind == "STABLE" else "the daemon"
    fix = f"remove it; {writer} writes it whole, by a temporary file and a rename"
    return MarkerProblem(path, f"not believed: {error}", fix)


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
