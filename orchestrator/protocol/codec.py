"""msgpack both ways, with caps; a frame that is not a message becomes one typed error and nothing else."""

from typing import TypeVar

import msgspec
from weightsync.orchestrator.protocol.limits import MAX_FRAME_BYTES, SCHEMA_VERSION
from weightsync.orchestrator.protocol.messages import FromAgent, FromDaemon, Hello, Message

T = TypeVar("T")


class ProtocolError(ValueError):
    """A frame that the peer should not have sent. The peer's fault; not to be retried with the same bytes."""


class SchemaMismatch(ProtocolError):
    """A Hello of another release. Of the configuration: the same release has to be installed on both sides."""

    def __init__(self, schema: int) -> None:
        both = "install the same release on both sides"
        super().__init__(f"it speaks schema {schema}, the daemon {SCHEMA_VERSION}; {both}")


class _AnyHello(msgspec.Struct, tag="Hello"):
    """The one field of Hello that no schema may change."""

    schema: int


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


def decode_first(data: bytes, limit: int) -> Hello:
    """The Hello in an agent's first frame. One that can be decoded may be of another schema; its reader looks.

    Raises:
        SchemaMismatch: a Hello that is none of ours, because another schema made it.
        ProtocolError: longer than ``limit``, no well-formed message, or another message.
    """
    try:
        message = decode_from_agent(data, limit)
    except ProtocolError:
        _explain_schema(data[:limit])
        raise
    if not isinstance(message, Hello):
        raise ProtocolError(f"the first message is {type(message).__name__} and not Hello")
    return message


def _explain_schema(data: bytes) -> None:
    """Raise SchemaMismatch if ``data`` is a Hello of another schema."""
    try:
        schema = msgspec.msgpack.decode(data, type=_AnyHello).schema
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return  # It is no Hello of any schema: what the real decoder said of it stands.
    if schema != SCHEMA_VERSION:
        raise SchemaMismatch(schema)


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
