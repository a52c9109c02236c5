"""Secrets: lines in files of their own, never in the configuration, the environment, the command line or the log."""

import os
from pathlib import Path
from typing import Final

from weightsync.orchestrator.files.ownership import require_secret, secret
from weightsync.orchestrator.protocol.token import MAX_TOKEN_BYTES

_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def read_secret_bytes(path: Path) -> bytes:
    """The first MAX_TOKEN_BYTES + 1 bytes of the secret in ``path``, which nobody else can have written, or can read.

    Raises:
        NotOurs: somebody else can, or could turn the name to another file.
        OSError, ValueError: it cannot be read, or is a name that no file can have.
    """
    file = secret(path)
    with open(os.open(file, _FLAGS), "rb") as stream:
        require_secret(file, os.fstat(stream.fileno()))  # another one may have come to its place
        return stream.read(MAX_TOKEN_BYTES + 1)
