"""What memory holds in the simulation: a few chunks, each of one version, with digests that cover place and size."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from weightsync.orchestrator.core.commands import MakePlan
from weightsync.orchestrator.core.events import PlanFacts
from weightsync.orchestrator.protocol.messages import Connect, Peer
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


@lru_cache(maxsize=100_000)
def digest_of(chunk: int, held: Version, target: Member) -> Digest:
    """Of one chunk, which all engines hold alike. The hash of a tuple of integers is the same in every process."""
    place = (chunk, SIZES[chunk], held.generation, held.step, target.rank)
    return hash((1, *place)) & _MASK, hash((2, *place)) & _MASK


def memory_digest(memory: list[Version], target: Member) -> Digest:
    """Of all of a worker's memory."""
    return add_digests(*(digest_of(chunk, held, target) for chunk, held in enumerate(memory)))


def plan_of(wanted: MakePlan) -> PlanFacts:
    """Each source sends its chunks to every target; a fingerprint names all incarnations and the number."""
    if wanted.lends:
        return _feed_of(wanted)
    sources = sorted(party.member.rank for party in wanted.sources)
    parties = (*wanted.sources, *wanted.targets)
    peers = {
        "trainer": tuple(Peer(t.member, t.incarnation, t.announce.endpoint_name, b"", ()) for t in wanted.targets),
        "inference": tuple(Peer(s.member, s.incarnation, "", b"", ()) for s in wanted.sources),
    }
    connects = {
        party.member: Connect(
            fingerprint=f"{wanted.number}:{party.member}:{party.incarnation}",
            root=f"plan {wanted.number}",
            peers=peers[party.member.role],
            copies=b"",
            expected_bytes=sum(SIZES),
        )
        for party in parties
    }
    owed = {rank: sum(SIZES[chunk] for chunk in chunks_of(rank, len(sources))) for rank in sources}
    flows = {(s.member, t.member): owed[s.member.rank] for s in wanted.sources for t in wanted.targets}
    return PlanFacts(f"plan {wanted.number}", connects, flows, True)


def lent_chunks(lender: Member, target: Member, lenders: Sequence[str]) -> tuple[int, ...]:
    """What a rank of one of so many lenders writes: its part of the same rank of the other engine."""
    return chunks_of(sorted(lenders).index(lender.engine), len(lenders)) if lender.rank == target.rank else ()


def _feed_of(wanted: MakePlan) -> PlanFacts:
    lenders = sorted({party.member.engine for party in wanted.sources})
    peers = {source: [t for t in wanted.targets if t.member.rank == source.member.rank] for source in wanted.sources}
    told = {target: [s for s in wanted.sources if target in peers[s]] for target in wanted.targets}
    connects = {
        party.member: Connect(
            fingerprint=f"feed {wanted.number}:{party.member}:{party.incarnation}",
            root=f"feed {wanted.number}",
            peers=tuple(
                Peer(other.member, other.incarnation, other.announce.endpoint_name, b"", ()) for other in others
            ),
            copies=",".join(lenders).encode(),
            expected_bytes=sum(SIZES),
            lends=party in wanted.sources,
            relays=bool(wanted.standby),
            landed=wanted.standby[party.member].fingerprint if party.member in wanted.standby else "",
        )
        for party, others in (*peers.items(), *told.items())
    }
    flows = {
        (source.member, target.member): sum(
            SIZES[chunk] for chunk in lent_chunks(source.member, target.member, lenders)
        )
        for source, targets in peers.items()
        for target in targets
    }
    return PlanFacts(f"feed {wanted.number}", connects, flows, True)
