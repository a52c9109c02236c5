"""The run directory, tried out: rank 0 of a trainer puts a marker there for each version."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from weightsync.orchestrator.protocol.findings import Finding


def run_directory(path: Path) -> Iterator[Finding]:
    """Whether rank 0 can put a marker there."""
    name = path / f".weightsync-doctor-{secrets.token_hex(8)}"
    try:
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.close(descriptor)
        name.unlink()
    except OSError as error:
        what = f"a file cannot be written in {path}: {error.strerror}"
        yield Finding("error", what, "mount the daemon's run.directory here, writable for this user", "run directory")
    else:
        yield Finding("ok", f"{path} can be written", check="run directory")
