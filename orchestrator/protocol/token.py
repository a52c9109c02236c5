"""Tokens that daemon and agents share, as the bytes of their file say them. Reading the file is the caller's."""

from typing import Final

MAX_TOKEN_BYTES: Final = 4096
"""A token is a line of text; the limit keeps a wrong path (a log, a checkpoint) from being read whole."""

MIN_TOKEN_CHARS: Final = 16
"""Of a credential: 16 hexadecimal digits are 64 bits. What proves a token can be tried against guesses of it."""

MAX_TOKENS: Final = 2
"""In one file: the one that is presented, and while it takes the place of another one, that one."""


class TokenError(ValueError):
    """A token file cannot serve. The operator's fault; worth a retry only after the file has changed."""


def parse_tokens(data: bytes, source: object) -> tuple[str, ...]:
    """The tokens in ``data``, one or two lines of printable ASCII without blanks; white space around them is dropped.

    The first is the one to present; whoever checks takes both.

    Args:
        data: the first MAX_TOKEN_BYTES + 1 bytes of the file, or all of it if it is shorter.
        source: what the file is called in errors, its path.

    Raises:
        TokenError: empty, longer than MAX_TOKEN_BYTES, or no such lines.
    """
    if len(data) > MAX_TOKEN_BYTES:
        raise TokenError(f"token file {source} is longer than {MAX_TOKEN_BYTES} bytes")
    tokens = tuple(data.decode("ascii", errors="replace").split("\n"))
    tokens = tuple(filter(None, map(str.strip, tokens)))
    if not tokens:
        raise TokenError(f"token file {source} is empty")
    if len(tokens) > MAX_TOKENS:
        raise TokenError(f"token file {source} holds {len(tokens)} lines, of at most {MAX_TOKENS}")
    # What is not ASCII has been replaced by U+FFFD, which counts as printable.
    if not all(token.isascii() and token.isprintable() and " " not in token for token in tokens):
        raise TokenError(f"token file {source} must hold lines of printable ASCII characters without blanks")
    return tokens


def parse_token(data: bytes, source: object) -> str:
    """The one line of ``data``; see ``parse_tokens``.

    Raises:
        TokenError: also for a second line.
    """
    token, *more = parse_tokens(data, source)
    if more:
        raise TokenError(f"token file {source} must hold one line, not {1 + len(more)}")
    return token
