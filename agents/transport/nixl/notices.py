"""What the two ends of an edge tell each other about chunks, in NIXL's notifications.

A chunk that *landed* is told with its bytes; that it was *scattered* frees its place. Both name the round, so that
those of an earlier attempt, which may come late, are told apart.
"""

from typing import Annotated, Final, Literal

import msgspec
from weightsync.orchestrator.protocol.names import RoundName

MAX_NOTICE_BYTES: Final = 256
"""Of one; anybody who can reach this endpoint may send others."""


class Notice(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Of ``chunk``, in the attempt ``round``."""

    what: Literal["landed", "scattered"]
    round: RoundName
    chunk: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Notice)


def encode(notice: Notice) -> bytes:
    """The notice's bytes."""
    return _encoder.encode(notice)


def decode(message: bytes) -> Notice | None:
    """A notice; None for what is none."""
    if len(message) > MAX_NOTICE_BYTES:
        return None
    try:
        return _decoder.decode(message)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
