"""What an endpoint tells its peers: NIXL's metadata in an envelope that proves itself.

NIXL answers truncated metadata by poisoning that agent name for good, so a digest is checked before NIXL sees it.
"""

import hashlib

import msgspec
from weightsync.agents.transport.nixl.errors import MetadataError
from weightsync.orchestrator.protocol.layout import Region

SCHEMA = 1
_DIGEST_BYTES = 32


class Card(msgspec.Struct, frozen=True, array_like=True):
    """``scratch`` is where peers write to warm an edge up: never weights. ``gpu``: whose memory it is that peers write
    into, by the name that no other GPU has; empty for host memory."""

    schema: int
    name: str
    scratch: Region
    metadata: bytes
    gpu: str = ""


def seal(card: Card) -> bytes:
    """The card's bytes behind their SHA-256."""
    body = msgspec.msgpack.encode(card)
    return hashlib.sha256(body).digest() + body


def unseal(sealed: bytes, expected_name: str) -> Card:
    """The card of ``expected_name``.

    Raises:
        MetadataError: truncated, altered, of another schema, or somebody else's.
    """
    digest, body = sealed[:_DIGEST_BYTES], sealed[_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise MetadataError(f"{expected_name}: the card of {len(sealed)} bytes is torn (its digest does not match)")
    try:
        card = msgspec.msgpack.decode(body, type=Card)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MetadataError(f"{expected_name}: no endpoint card: {error}") from error
    if card.schema != SCHEMA:
        raise MetadataError(f"{expected_name}: card of schema {card.schema}, this agent speaks {SCHEMA}")
    if card.name != expected_name:
        raise MetadataError(f"the card given for {expected_name} is that of {card.name}")
    return card
