"""msgpack both ways, with caps; a frame that is not a message becomes one typed error and nothing else."""

from typing import TypeVar

import msgspec
from weightsync.orchestrator.protocol.limits import MAX_FRAME_BYTES, MAX_REASON_CHARS
from weightsync.orchestrator.protocol.messages import FromAgent, FromDaemon, Message

T = TypeVar("T")


class ProtocolError(ValueError):
    """A frame that the peer should not have sent. The peer's fault; not to be retried with the same bytes."""


_encoder = msgspec.msgpack.Encoder()
_from_agent: msgspec.msgpack.Decoder[FromAgent] = msgspec.msgpack.Decoder(FromAgent)
_from_daemon: msgspec.msgpack.Decoder[FromDaemon] = msgspec.msgpack.Decoder(FromDaemon)


def encode(message: Message) -> bytes:
    """One frame.

    Raises:
        ProtocolError: the frame would exceed MAX_FRAME_BYTES.
    """
    data = _encoder.encode(message)
    if len(data) > MAX_FRAME_BYTES:
        raise ProtocolError(f"{type(message).__name__} of {len(data)} bytes exceeds the limit of {MAX_FRAME_BYTES}")
    return data


def decode_from_agent(data: bytes, limit: int = MAX_FRAME_BYTES) -> FromAgent:
    """The message in a frame that an agent sent.

    Raises:
        ProtocolError: longer than ``limit``, or no well-formed message.
    """
    return _decode(_from_agent, data, limit)


def decode_from_daemon(data: bytes, limit: int = MAX_FRAME_BYTES) -> FromDaemon:
    """The message in a frame that the daemon sent.

    Raises:
        ProtocolError: longer than ``limit``, or no well-formed message.
    """
    return _decode(_from_daemon, data, limit)


def _decode(decoder: msgspec.msgpack.Decoder[T], data: bytes, limit: int) -> T:
    if len(data) > limit:
        raise ProtocolError(f"frame of {len(data)} bytes exceeds the limit of {limit}")
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"malformed frame of {len(data)} bytes: {error}") from error


def cut(text: str) -> str:
    """``text`` within MAX_REASON_CHARS."""
    return text if len(text) <= MAX_REASON_CHARS else text[: MAX_REASON_CHARS - 1] + "…"
