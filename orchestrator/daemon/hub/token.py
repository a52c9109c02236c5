"""Who may open a control connection: the bearer token, read from a file and compared in constant time."""

import hmac
from pathlib import Path
from typing import Final

from aiohttp import hdrs, web

MAX_TOKEN_BYTES: Final = 4096
"""A token is a line of text; the limit keeps a wrong path (a log, a checkpoint) from being read whole."""

_SCHEME: Final = "Bearer "


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
    if len(data) > MAX_TOKEN_BYTES:
        raise TokenError(f"token file {path} is longer than {MAX_TOKEN_BYTES} bytes")
    token = data.decode("ascii", errors="replace").strip()
    if not token:
        raise TokenError(f"token file {path} is empty")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise TokenError(f"token file {path} holds more than one line of printable ASCII without blanks")
    return token


def bears(request: web.Request, token: str) -> bool:
    """Whether ``request`` carries ``token`` as a bearer; the time taken tells nothing of the token."""
    header = request.headers.get(hdrs.AUTHORIZATION, "")
    given = header[len(_SCHEME) :] if header.startswith(_SCHEME) else ""
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())
