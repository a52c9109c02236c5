"""What memory holds in the simulation: a few chunks, each of one version, with digests that cover place and size."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from weightsync.orchestrator.core.commands import Announced, MakePlan
from weightsync.orchestrator.core.events import PlanFacts
from weightsync.orchestrator.planner import Party
from weightsync.orchestrator.planner.fingerprint import PartyDigest, part_fingerprint, party_digest, root_fingerprint
from weightsync.orchestrator.protocol.edges import Peer, reached_fingerprint
from weightsync.orchestrator.protocol.messages import Connect
from weightsync.orchestrator.protocol.names import Digest, Member, Version, add_digests

SIZES: Final = (101, 211, 307, 401)
"""Bytes of each chunk of a worker's memory; which rank writes which depends on how many ranks the trainer has."""

CHECKPOINT: Final = Version(0, 0)
"""What an engine has loaded from disk."""

GARBAGE: Final = Version(0, 1)
"""What no trainer has ever staged."""

_MASK: Final = 2**64 - 1


def chunks_of(writer: int, writers: int) -> tuple[int, ...]:
    """The chunks of each target that one of so many trainer ranks writes."""
    return tuple(range(writer, len(SIZES), writers))


def digest_of(chunk: int, held: Version, rank: int) -> Digest:
    """Of one chunk, which all engines hold alike. The hash of a tuple of integers is the same in every process."""
    place = (chunk, SIZES[chunk], held.generation, held.step, rank)
    return hash((1, *place)) & _MASK, hash((2, *place)) & _MASK


def memory_digest(memory: list[Version], target: Member) -> Digest:
    """Of all of a worker's memory."""
    return owed(tuple(enumerate(memory)), target.rank)[0]


@lru_cache(maxsize=10_000)
def owed(contents: tuple[tuple[int, Version], ...], rank: int) -> tuple[Digest, int]:
    """Digest and bytes of chunks, each with what is in it, in the memory of a ``rank``."""
    digest = add_digests(*(digest_of(chunk, held, rank) for chunk, held in contents))
    return digest, sum(SIZES[chunk] for chunk, _ in contents)


def lent_chunks(lender: Member, target: Member, lenders: Sequence[str]) -> tuple[int, ...]:
    """What a rank of one of so many lenders writes: its part of the same rank of the other engine."""
    return chunks_of(sorted(lenders).index(lender.engine), len(lenders)) if lender.rank == target.rank else ()


def plan_of(wanted: MakePlan) -> PlanFacts:
    """Each trainer rank sends its chunks to every target, each lender's rank to the same ranks of who borrows.

    Fingerprints are the planner's: of who is told, of its table, and of where its peers are; so a plan tells those of
    whom nothing has changed nothing.
    """
    lenders = sorted({party.member.engine for party in wanted.sources})
    owed = {
        (source.member, target.member): lent_chunks(source.member, target.member, lenders)
        if wanted.lends
        else chunks_of(source.member.rank, len(wanted.sources))
        for source in wanted.sources
        for target in wanted.targets
    }
    flows = {edge: sum(SIZES[chunk] for chunk in chunks) for edge, chunks in owed.items() if chunks}
    parties = {party.member: party for party in (*wanted.sources, *wanted.targets)}
    peers: dict[Member, list[Announced]] = {member: [] for member in parties}
    moved = dict.fromkeys(parties, 0)
    for (source, target), size in flows.items():
        peers[source].append(parties[target])
        peers[target].append(parties[source])
        moved[source] += size
        moved[target] += size
    writers = {party.member for party in wanted.sources}
    parts = {
        member: part_fingerprint(
            _digest(party), [_digest(peer) for peer in peers[member]], (), _table(member, owed), moved[member]
        )
        for member, party in parties.items()
    }
    root = root_fingerprint(parts)
    connects = {}
    for member, part in parts.items():
        told = tuple(_peer(peer, wanted.lends and peer.member in writers) for peer in peers[member])
        connects[member] = Connect(
            fingerprint=reached_fingerprint(part, told),
            root=root,
            peers=told,
            copies=",".join(lenders).encode(),
            expected_bytes=moved[member],
            lends=wanted.lends and member in writers,
        )
    return PlanFacts(root, connects, flows, True)


def _digest(party: Announced) -> PartyDigest:
    return party_digest(Party(party.member, party.incarnation, party.announce.layout), b"")


def _table(member: Member, owed: dict[tuple[Member, Member], tuple[int, ...]]) -> bytes:
    return repr([chunks for edge, chunks in owed.items() if member in edge]).encode()


def _peer(party: Announced, writes: bool) -> Peer:
    """Where a peer is; one that lends is where it writes from."""
    said = party.announce
    return Peer(party.member, party.incarnation, said.lends_name if writes else said.endpoint_name, b"", ())
