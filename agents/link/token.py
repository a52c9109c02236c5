"""The agent's token, read from a file: never from arguments or the environment, which other users can see."""

from pathlib import Path

from weightsync.orchestrator.protocol.token import MAX_TOKEN_BYTES, TokenError, parse_tokens


def read_token(path: Path) -> str:
    """The token to present of those in ``path``.

    Raises:
        TokenError: as ``read_tokens``.
    """
    return read_tokens(path)[0]


def read_tokens(path: Path) -> tuple[str, ...]:
    """All tokens in ``path`` (see ``parse_tokens``).

    Raises:
        TokenError: no readable file, or no token in it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TOKEN_BYTES + 1)
    except OSError as error:
        raise TokenError(f"token file {path}: {error.strerror}") from error
    return parse_tokens(data, path)
