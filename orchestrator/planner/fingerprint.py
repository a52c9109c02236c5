"""Names of edge sets: equal fingerprints mean equal tables between equal processes with equal memory."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
from weightsync.orchestrator.planner.inputs import Party
from weightsync.orchestrator.protocol.edges import FINGERPRINT_CHARS
from weightsync.orchestrator.protocol.landing import Berth
from weightsync.orchestrator.protocol.names import Member

_encoder = msgspec.msgpack.Encoder()


@dataclass(frozen=True, slots=True)
class PartyDigest:
    """``layout``: what a party's own fingerprint depends on. ``where``: what its peers' do, who and where it is."""

    layout: bytes
    where: bytes


def party_digest(party: Party, tensors: bytes) -> PartyDigest:
    """SHA-256 of both; ``tensors`` is a digest of the layout's tensors. Notes are for people and are left out."""
    layout = party.layout
    where = hashlib.sha256(_encoder.encode((party.member, party.incarnation, layout.regions, layout.staging))).digest()
    digest = hashlib.sha256(tensors + where)
    digest.update(_encoder.encode((layout.derived, layout.expert_map, layout.lands)))
    digest.update(layout.rows)
    return PartyDigest(digest.digest(), where)


def part_fingerprint(
    own: PartyDigest, peers: Sequence[PartyDigest], berths: Sequence[Berth | None], copies: bytes, expected: int
) -> str:
    """Of one member's edge set: its incarnation and layout, its peers' incarnations and memory, and its table."""
    digest = hashlib.sha256(own.layout + expected.to_bytes(8, "little"))
    digest.update(b"".join([peer.where for peer in peers]))
    digest.update(_encoder.encode(berths))
    digest.update(copies)
    return digest.hexdigest()[:FINGERPRINT_CHARS]


def root_fingerprint(parts: Mapping[Member, str] | Iterable[tuple[Member, str]]) -> str:
    """Of a whole plan: over its members' fingerprints, whatever their order."""
    return hashlib.sha256(_encoder.encode(sorted(dict(parts).items()))).hexdigest()[:FINGERPRINT_CHARS]
