"""Secrets: one line in one file each, never in the configuration, the environment, the command line or the log."""

from pathlib import Path
from typing import Final

from weightsync.orchestrator.settings.problems import ConfigError, Problem

MAX_SECRET_BYTES: Final = 4096
"""A bearer token; longer files are something else."""


def read_secret(path: Path) -> str:
    """The one-line secret in ``path``, without surrounding white space.

    Raises:
        ConfigError: unreadable, empty, too long, or more than one line.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_SECRET_BYTES + 1)
    except OSError as error:
        fix = "create it, readable by the daemon's user only (mode 0600)"
        raise ConfigError(path, Problem("", "", f"secret cannot be read: {error.strerror or error}", fix)) from error
    text = data.decode("utf-8", "replace").strip()
    if not text or len(data) > MAX_SECRET_BYTES or not text.isprintable() or " " in text or not text.isascii():
        fix = "write one line, for example: openssl rand -hex 32 > FILE"
        raise ConfigError(path, Problem("", "", "is no secret of one line of printable ASCII without spaces", fix))
    return text
