"""What the daemon and its child process say to each other while the child is rank 0 of a StatelessProcessGroup.

Each message is a msgpack body behind a length of LENGTH_BYTES, big-endian. The daemon says one command and reads
answers up to Done or Failed. Announce, Connect and Ready travel inside as the codec's bytes.
"""

from typing import Final

import msgspec
from weightsync.orchestrator.protocol.limits import MAX_FRAME_BYTES

LENGTH_BYTES: Final = 4

MAX_PIPE_BYTES: Final = MAX_FRAME_BYTES + 1024
"""One message of the codec and its envelope."""


class Join(msgspec.Struct, frozen=True, tag=True):
    """Listen at ``host``:``port`` and wait until ``world`` − 1 agents have joined. The first command."""

    host: str
    port: int
    world: int
    timeout_seconds: float


class Gather(msgspec.Struct, frozen=True, tag=True):
    """Take one message from every agent; answered by one PipePiece for each, in rank order, and Done."""

    timeout_seconds: float


class Deliver(msgspec.Struct, frozen=True, tag=True):
    """Give ``data`` to agent ``rank`` and to no other."""

    rank: int
    data: bytes


class Barrier(msgspec.Struct, frozen=True, tag=True):
    """Wait until every agent has arrived, let them go, and wait until they have left."""

    timeout_seconds: float


class PipePiece(msgspec.Struct, frozen=True, tag=True):
    """What agent ``rank`` said."""

    rank: int
    data: bytes


class Done(msgspec.Struct, frozen=True, tag=True):
    """The command was carried out."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The command failed; the child is of no more use."""

    reason: str


Command = Join | Gather | Deliver | Barrier
Answer = PipePiece | Done | Failed

_encoder = msgspec.msgpack.Encoder()
commands: Final[msgspec.msgpack.Decoder[Command]] = msgspec.msgpack.Decoder(Command)
answers: Final[msgspec.msgpack.Decoder[Answer]] = msgspec.msgpack.Decoder(Answer)


def packed(message: Command | Answer) -> bytes:
    """``message`` behind its length.

    Raises:
        ValueError: longer than MAX_PIPE_BYTES.
    """
    body = _encoder.encode(message)
    return checked_length(len(body)).to_bytes(LENGTH_BYTES) + body


def checked_length(length: int) -> int:
    """``length``, if it is one that may be sent.

    Raises:
        ValueError: longer than MAX_PIPE_BYTES.
    """
    if length > MAX_PIPE_BYTES:
        raise ValueError(f"a message of {length} bytes exceeds the limit of {MAX_PIPE_BYTES}")
    return length
