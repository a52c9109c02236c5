"""Secrets: one line in one file each, never in the configuration, the environment, the command line or the log."""

from pathlib import Path

from weightsync.orchestrator.protocol.token import MAX_TOKEN_BYTES, TokenError, parse_token
from weightsync.orchestrator.settings.problems import ConfigError, Problem


def read_secret(path: Path) -> str:
    """The one-line secret in ``path``, without surrounding white space.

    Raises:
        ConfigError: unreadable, empty, too long, or more than one line.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_TOKEN_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        fix = "create it, readable by the daemon's user only (mode 0600)"
        why = getattr(error, "strerror", None) or error
        raise ConfigError(path, Problem("", "", f"secret cannot be read: {why}", fix)) from error
    try:
        return parse_token(data, path)
    except TokenError as error:
        fix = "write one line, for example: openssl rand -hex 32 > FILE"
        problem = Problem("", "", "is no secret of one line of printable ASCII without spaces", fix)
        raise ConfigError(path, problem) from error
