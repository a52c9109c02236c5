"""The bearer token that daemon and agents share, as the bytes of its file say it. Reading the file is the caller's."""

from typing import Final

MAX_TOKEN_BYTES: Final = 4096
"""A token is a line of text; the limit keeps a wrong path (a log, a checkpoint) from being read whole."""


class TokenError(ValueError):
    """A token file cannot serve. The operator's fault; worth a retry only after the file has changed."""


def parse_token(data: bytes, source: object) -> str:
    """The token in ``data``: one line of printable ASCII without blanks; white space around it is dropped.

    Args:
        data: the first MAX_TOKEN_BYTES + 1 bytes of the file, or all of it if it is shorter.
        source: what the file is called in errors, its path.

    Raises:
        TokenError: empty, longer than MAX_TOKEN_BYTES, or no such line.
    """
    if len(data) > MAX_TOKEN_BYTES:
        raise TokenError(f"token file {source} is longer than {MAX_TOKEN_BYTES} bytes")
    token = data.decode("ascii", errors="replace").strip()
    if not token:
        raise TokenError(f"token file {source} is empty")
    # What is not ASCII has been replaced by U+FFFD, which counts as printable.
    if not token.isascii() or not token.isprintable() or " " in token:
        raise TokenError(f"token file {source} must hold one line of printable ASCII characters without blanks")
    return token
