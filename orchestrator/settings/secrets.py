"""Secrets: lines in files of their own, never in the configuration, the environment, the command line or the log."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from weightsync.orchestrator.protocol.token import MAX_TOKEN_BYTES, TokenError, parse_token, parse_tokens
from weightsync.orchestrator.settings.ownership import followed
from weightsync.orchestrator.settings.problems import ConfigError, Problem

T = TypeVar("T")


def read_secret(path: Path) -> str:
    """The one-line secret in ``path``, without surrounding white space.

    Raises:
        ConfigError: unreadable, not ours alone to write, empty, too long, or more than one line.
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
        with open(os.open(followed(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as stream:
            data = stream.read(MAX_TOKEN_BYTES + 1) or b""
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        fix = "create it, readable by the daemon's user only (mode 0600)"
        why = getattr(error, "strerror", None) or error
        raise ConfigError(path, Problem("", "", f"secret cannot be read: {why}", fix)) from error
    try:
        return parse(data, path)
    except TokenError as error:
        fix = "write one line, for example: openssl rand -hex 32 > FILE"
        raise ConfigError(path, Problem("", "", f"is no secret: {error}", fix)) from error
