"""Secrets as the daemon and its command line read them: what is wrong with a file is an error of the configuration."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from weightsync.orchestrator.files.ownership import NotOurs
from weightsync.orchestrator.files.secret import read_secret_bytes
from weightsync.orchestrator.protocol.token import TokenError, parse_token, parse_tokens
from weightsync.orchestrator.settings.problems import ConfigError, Problem, not_ours

T = TypeVar("T")


def read_secret(path: Path) -> str:
    """The one-line secret in ``path``, without surrounding white space.

    Raises:
        ConfigError: unreadable, not ours alone to write and to read, empty, too long, or more than one line.
    """
    return _read(path, parse_token)


def read_tokens(path: Path) -> tuple[str, ...]:
    """The one or two tokens in ``path``; the first is the one to present.

    Raises:
        ConfigError: as ``read_secret``.
    """
    return _read(path, parse_tokens)


def _read(path: Path, parse: Callable[[bytes, object], T]) -> T:
    try:
        data = read_secret_bytes(path)
    except NotOurs as error:
        raise not_ours(error) from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        fix = "create it, readable by the daemon's user only (mode 0600)"
        why = getattr(error, "strerror", None) or error
        raise ConfigError(path, Problem("", "", f"secret cannot be read: {why}", fix)) from error
    try:
        return parse(data, path)
    except TokenError as error:
        fix = "write one line, for example: openssl rand -hex 32 > FILE"
        raise ConfigError(path, Problem("", "", f"is no secret: {error}", fix)) from error
