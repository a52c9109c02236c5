"""The audit log: what operators asked for, one JSON line each, appended to a file in the state directory."""

import os
import threading
from pathlib import Path
from typing import Final

import msgspec

NAME: Final = "audit.jsonl"

MAX_BYTES: Final = 64 * 1024 * 1024
"""Then the file becomes ``audit.jsonl.1``, in place of the one before: tens of thousands of verbs in each."""


class AuditLine(msgspec.Struct, frozen=True, kw_only=True):
    """One request. ``who`` is what the command line gave, and proves nothing; ``address`` is the peer's, as we saw it.

    ``credential``: what let it in: its role, and the name that it is bound to. ``result``: what was answered; of a
    refused request, why.
    """

    time: str
    who: str
    address: str
    credential: str
    verb: str
    target: str
    reason: str
    result: str


class Audit:
    """Blocks on the disk: call it in a thread. ``append`` returns when the line is durable."""

    def __init__(self, directory: Path, max_bytes: int = MAX_BYTES) -> None:
        self._path, self._max_bytes = directory / NAME, max_bytes
        self._lock = threading.Lock()

    def append(self, line: AuditLine) -> None:
        """Add one line.

        Raises:
            OSError: it may not be in the file.
        """
        with self._lock:
            if self._path.exists() and self._path.stat().st_size > self._max_bytes:
                self._path.replace(self._path.with_name(f"{NAME}.1"))
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.write(file, msgspec.json.encode(line) + b"\n")
                os.fsync(file)
            finally:
                os.close(file)
