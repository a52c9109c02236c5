"""The audit log: what operators asked for, what was committed, who was turned away: one JSON line each, in a file of
the state directory that is only appended to.

Each line has its number and the SHA-256 of the line before it, as it stands in the file. So a line that was changed,
taken out, put in or moved breaks the chain at that place, and whoever has noted the hash of one line (the daemon's log
shows each, ``audit verify`` the last) can tell whether that line and all before it are still there.
"""

import contextlib
import hashlib
import itertools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

NAME: Final = "audit.jsonl"

MAX_BYTES: Final = 64 * 1024 * 1024
"""Then the file becomes ``audit.jsonl.1``, in place of the one before: tens of thousands of verbs in each."""

MAX_LINE_BYTES: Final = 64 * 1024
"""A line has a few hundred; longer ones are none of ours."""

NOTHING: Final = "0" * 64
"""In the first line of all, in the place of a hash."""

MAX_NEWEST_BYTES: Final = 256 * 1024
"""Read from the end of a file to show its newest lines."""

MAX_SHOWN: Final = 20
"""Problems that a verification names."""


class AuditLine(msgspec.Struct, frozen=True, kw_only=True):
    """One request, or what the daemon did itself (``trail``). ``who`` is what the command line gave, and proves
    nothing; ``address`` is the peer's, as we saw it.

    ``credential``: what let it in: its role, and the name that it is bound to. ``result``: what was answered; of a
    refused request, why. ``number`` and ``before``, its place in the chain, are the log's to give.
    """

    number: int = 0
    before: str = ""
    time: str
    who: str
    address: str
    credential: str
    verb: str
    target: str
    reason: str
    result: str


@dataclass(frozen=True, slots=True)
class AuditReport:
    """``first`` and ``last``: numbers of the lines that are there, 0 without any. ``head``: hash of the last one."""

    first: int
    last: int
    head: str
    problems: tuple[str, ...]


class Audit:
    """Blocks on the disk: call it in a thread. ``append`` returns when the line is durable."""

    def __init__(self, directory: Path, max_bytes: int = MAX_BYTES) -> None:
        self._path, self._max_bytes = directory / NAME, max_bytes
        self._lock = threading.Lock()

    def append(self, line: AuditLine) -> str:
        """Add one line, and return the hash to note.

        Raises:
            OSError: it may not be in the file.
        """
        with self._lock:
            # Read anew each time: verbs are rare, and what is in the file is what the next line has to follow.
            number, before, is_whole = _end_of(self._path)
            if is_whole and self._path.exists() and self._path.stat().st_size > self._max_bytes:
                self._path.replace(self._path.with_name(f"{NAME}.1"))
            data = msgspec.json.encode(msgspec.structs.replace(line, number=number + 1, before=before))
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(self._path, flags, 0o600)
            try:
                # A line that was cut off when the disk was full, or the machine stopped, is a line all the same.
                _write(file, (b"" if is_whole else b"\n") + data + b"\n")
                os.fsync(file)
            finally:
                os.close(file)
            return _hash(data)


def verify(directory: Path, noted: str = "") -> AuditReport:
    """Follow the chain through both files.

    Args:
        noted: the hash of a line that has to be there, too.

    Raises:
        OSError: a file cannot be read.
    """
    problems: list[str] = []
    first, number, before, seen = 0, 0, NOTHING, not noted
    for place, data in _lines(directory):
        try:
            line = msgspec.json.decode(data, type=AuditLine)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            problems.append(f"{place}: is no line of the audit log")
            number, before = number + 1, _hash(data)
            continue
        if not first:
            first, number = line.number, line.number - 1
            if line.number == 1 and line.before != NOTHING:
                problems.append(f"{place}: is the first line, and names one before it")
            if line.number != 1 and not (directory / f"{NAME}.1").exists():
                problems.append(f"{place}: is line {line.number}, and {NAME}.1 with those before it is not there")
        elif line.number != number + 1:
            problems.append(f"{place}: is line {line.number}, and follows line {number}")
        elif line.before != before:
            problems.append(f"{place}: line {line.number - 1} is not what it was when this one was written")
        number, before = line.number, _hash(data)
        seen = seen or before == noted
    if not seen:
        problems.append(f"no line has the hash {noted}: it, and what came after it, are gone or were changed")
    more = len(problems) - MAX_SHOWN
    shown = [*problems[:MAX_SHOWN], *([f"… and {more} more"] if more > 0 else [])]
    return AuditReport(first, number if first else 0, before if first else "", tuple(shown))


def newest(directory: Path, count: int) -> list[AuditLine]:
    """The last ``count`` lines, oldest first; what is none is left out. Reads the ends of the files only.

    Raises:
        OSError: a file cannot be read.
    """
    found: list[AuditLine] = []
    for name in (NAME, f"{NAME}.1"):
        try:
            with open(os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - MAX_NEWEST_BYTES))
                data = stream.read()
        except FileNotFoundError:
            continue
        lines = []
        for text in data.splitlines()[-(count - len(found)) :]:
            with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                lines.append(msgspec.json.decode(text, type=AuditLine))
        found = lines + found
        if len(found) >= count:
            break
    return found


def _end_of(path: Path) -> tuple[int, str, bool]:
    """Number and hash of the last line, of this file or of the one before it; whether it ends as lines do."""
    for file in (path, path.with_name(f"{NAME}.1")):
        try:
            with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(max(0, size - 2 * MAX_LINE_BYTES))
                data = stream.read()
        except FileNotFoundError:
            continue
        lines = data.removesuffix(b"\n").split(b"\n")
        for back, text in enumerate(reversed(lines)):
            try:
                number = msgspec.json.decode(text, type=AuditLine).number + back
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                continue
            return number, _hash(lines[-1]), data.endswith(b"\n")
        if data:
            return len(lines), _hash(lines[-1]), data.endswith(b"\n")
    return 0, NOTHING, True


def _lines(directory: Path) -> Iterator[tuple[str, bytes]]:
    """Each line with its place, oldest first."""
    for name in (f"{NAME}.1", NAME):
        path = directory / name
        if not path.exists():
            continue
        with path.open("rb") as stream:
            for number in itertools.count(1):
                data = stream.readline(MAX_LINE_BYTES)
                if not data:
                    break
                yield f"{name} line {number}", data.removesuffix(b"\n")


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()
