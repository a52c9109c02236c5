"""The run directory, tried out: rank 0 of a trainer puts a marker there for each version."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from weightsync.orchestrator.protocol.findings import Finding

CHECK: Final = "run directory"
MOUNT: Final = "mount the daemon's run.directory here, writable for this user"


def run_directory(path: Path) -> Iterator[Finding]:
    """Whether rank 0 can put a marker there. One that is not there is made by the first publish, if that can be."""
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        _try(there)
    except OSError as error:
        yield Finding("error", f"a file cannot be written in {there}: {error.strerror}", MOUNT, CHECK)
        return
    if there == path:
        yield Finding("ok", f"{path} can be written", check=CHECK)
    else:
        yield Finding("note", f"{path} is not there, so the first publish makes it", MOUNT, CHECK)


def _try(directory: Path) -> None:
    name = directory / f".weightsync-doctor-{secrets.token_hex(8)}"
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.close(descriptor)
    name.unlink()
