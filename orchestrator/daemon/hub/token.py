"""Who may open a control connection: the bearer token, read from a file and compared in constant time."""

import hmac
from pathlib import Path
from typing import Final

from aiohttp import hdrs, web
from weightsync.orchestrator.protocol.token import MAX_TOKEN_BYTES, TokenError, parse_token

_SCHEME: Final = "Bearer "


def read_token(path: Path) -> str:
    """The token in ``path`` (see ``parse_token``).

    Raises:
        TokenError: no readable file, or no token in it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TOKEN_BYTES + 1)
    except OSError as error:
        raise TokenError(f"token file {path}: {error.strerror}") from error
    return parse_token(data, path)


def bears(request: web.Request, token: str) -> bool:
    """Whether ``request`` carries ``token`` as a bearer; the time taken tells nothing of the token."""
    header = request.headers.get(hdrs.AUTHORIZATION, "")
    given = header[len(_SCHEME) :] if header.startswith(_SCHEME) else ""
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())
