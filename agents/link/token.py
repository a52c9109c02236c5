"""The agent's token, read from a file: never from arguments or the environment, which other users can see."""

from pathlib import Path
from typing import Final

MAX_TOKEN_BYTES: Final = 4096
"""A token is a line of text; the limit keeps a wrong path from being read whole."""


class TokenError(ValueError):
    """The token file cannot serve. The operator's fault; worth a retry only after the file has changed."""


def read_token(path: Path) -> str:
    """The token in ``path``: one line of printable ASCII without blanks; white space around it is dropped.

    Raises:
        TokenError: no readable file, empty, too long, or no such line.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TOKEN_BYTES + 1)
    except OSError as error:
        raise TokenError(f"token file {path}: {error.strerror}") from error
    token = data.decode("ascii", errors="replace").strip()
    if not token or len(data) > MAX_TOKEN_BYTES or not token.isascii() or not token.isprintable() or " " in token:
        raise TokenError(
            f"token file {path} must hold one line of at most {MAX_TOKEN_BYTES} printable ASCII characters"
        )
    return token
