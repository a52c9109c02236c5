"""Names of edge sets: equal fingerprints mean equal tables between equal processes with equal memory."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from weightsync.orchestrator.core.plan.inputs import Party
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.names import Member

_encoder = msgspec.msgpack.Encoder()


def layout_digest(layout: Layout) -> bytes:
    """SHA-256 over all that a layout says: tensors, regions, rows, staging, expert map."""
    return hashlib.sha256(_encoder.encode(layout)).digest()


def part_fingerprint(party: Party, own_layout: bytes, peers: Sequence[Party], copies: bytes, expected: int) -> str:
    """Of one member's edge set: its incarnation and layout, its peers' incarnations and regions, and its table."""
    head = (
        party.member, party.incarnation, own_layout, expected,
        [(p.member, p.incarnation, p.layout.regions, p.layout.staging) for p in peers],
    )  # fmt: skip
    digest = hashlib.sha256(_encoder.encode(head))
    digest.update(copies)
    return digest.hexdigest()[:32]


def root_fingerprint(parts: Mapping[Member, str] | Iterable[tuple[Member, str]]) -> str:
    """Of a whole plan: over its members' fingerprints, whatever their order."""
    return hashlib.sha256(_encoder.encode(sorted(dict(parts).items()))).hexdigest()[:32]
