"""The agent's token, read from a file: never from arguments or the environment, which other users can see."""

from pathlib import Path

from weightsync.orchestrator.files.ownership import NotOurs
from weightsync.orchestrator.files.secret import read_secret_bytes
from weightsync.orchestrator.protocol.token import TokenError, parse_tokens


def read_token(path: Path) -> str:
    """The token to present of those in ``path``.

    Raises:
        TokenError: as ``read_tokens``.
    """
    return read_tokens(path)[0]


def read_tokens(path: Path) -> tuple[str, ...]:
    """All tokens in ``path`` (see ``parse_tokens``).

    Raises:
        TokenError: no readable file, one that others can write or read too, or no token in it.
    """
    try:
        data = read_secret_bytes(path)
    except NotOurs as error:
        raise TokenError(f"token file {error}") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise TokenError(f"token file {path}: {getattr(error, 'strerror', None) or error}") from error
    return parse_tokens(data, path)
