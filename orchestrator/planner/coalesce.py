"""Which pieces go straight to their place and which by way of the target's landing, and where in it.

All that one edge sends by way of the landing is its *cargo*: one line of bytes, which travels in chunks. A piece of it
is *packed* if the sender gathers it first; else it leaves its slot as it lies there. Into a shadow engine everything is
cargo. Into the live memory of one, a piece that goes straight costs ``runs * alpha``, as far as its ``bytes / beta`` on
the wire do not hide them; one that is packed costs ``bytes / pack rate`` for gathering and scattering.

Cargo may be longer than both sides' memory for it: it then *passes* its *berth* in the target's landing, whose places
are written again and again. Nothing ends packing but a landing without room for a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from weightsync.orchestrator.planner.arrays import Flags, Floats, Ids, Ints, boundaries, starts
from weightsync.orchestrator.planner.decode import Decoded
from weightsync.orchestrator.planner.errors import LandingTooSmall
from weightsync.orchestrator.planner.inputs import CostModel
from weightsync.orchestrator.protocol.landing import (
    BERTH_ALIGNMENT,
    PIECE_ALIGNMENT,
    Berth,
    chunk_bytes,
    landing_length,
    longest_chunk,
)

PLACES: Final = 4
"""Chunks of a berth that is gone through again: one is packed, one on the wire, one scattered, one on its way back."""


@dataclass(frozen=True, slots=True)
class Loads:
    """Of pieces ``[n]``: ``place`` in their edge's cargo in bytes, -1 for what goes straight to its row, and which are
    ``packed`` by the sender. ``berths [edges]``: None for an edge without cargo."""

    place: Ints
    packed: Flags
    berths: tuple[Berth | None, ...]


def shadow(parties: Sequence[Decoded]) -> Flags:
    """Which parties take everything in their landing, because nothing remote may reach their rows."""
    return np.array([p.party.layout.lands != "live" for p in parties], np.bool_)


def load_cargo(
    edge: Ints, source: Ids, target: Ids, size: Ints, runs: Ints, joins: Flags, cost: CostModel,
    sources: Sequence[Decoded], targets: Sequence[Decoded],
) -> Loads:  # fmt: skip
    """Decide for pieces ``[n]`` that are sorted by edge, and by group within it.

    Args:
        edge: ascending number of each piece's edge; ``source`` and ``target`` are its ends.
        size, runs: bytes, and descriptors if it is not packed.
        joins: that it shares the descriptor of the piece before, if neither is packed.

    Raises:
        LandingTooSmall: a shadow engine's landing is too small for what it must take.
    """
    first = boundaries(edge)
    heads = first[:-1]
    whole = shadow(targets)[target]
    packed = _packed(edge, source, target, size, runs, joins, cost, sources, targets)
    at = np.flatnonzero(packed | whole)
    # Packed pieces lie one behind the other, so that one descriptor carries a chunk of them; and last, because small
    # ones of all layers share a chunk: what is not packed leaves while the last layers are still being converted.
    at = at[np.lexsort((packed[at], edge[at]))]
    place = np.full(len(edge), -1, np.int64)
    padded = _up(size[at], PIECE_ALIGNMENT)
    begins = boundaries(edge[at])[:-1]
    filled = np.cumsum(padded) - padded
    place[at] = filled - np.repeat(filled[begins], np.diff(boundaries(edge[at])))
    number = np.searchsorted(edge[heads], edge[at[begins]]) if len(at) else begins
    length = np.zeros(len(heads), np.int64)
    length[number] = np.add.reduceat(padded, begins) if len(at) else 0
    berths = _berths(source[heads], target[heads], length, sources, targets)
    return Loads(place, packed, berths)


def _packed(
    edge: Ints, source: Ids, target: Ids, size: Ints, runs: Ints, joins: Flags, cost: CostModel,
    sources: Sequence[Decoded], targets: Sequence[Decoded],
) -> Flags:  # fmt: skip
    """Which pieces the sender gathers: of those that share a descriptor all or none."""
    ring = _ring_chunks(sources)
    whole = shadow(targets)
    below = np.array([pack_below(party, cost) for party in sources])[source]
    together = np.cumsum(~joins) - 1
    own, runs = size, np.where(joins, 0, runs)
    size = np.bincount(together, size, together[-1] + 1 if len(together) else 0).astype(np.int64)[together]
    needed = runs[~joins][together]
    wanted = np.flatnonzero((size < needed * below) & (ring[source] > 0))
    # Of a live target's landing each edge has the same part at least. Chunks of it must be longer than the runs.
    rooms = np.array([landing_length(p.party.layout) for p in targets], np.int64)
    pairs = np.unique(edge[wanted], return_index=True)[1]
    edges = np.bincount(target[wanted][pairs], minlength=len(targets))
    part = rooms // np.maximum(edges, 1) // BERTH_ALIGNMENT * BERTH_ALIGNMENT
    chunk = np.where(whole, longest_chunk("VRAM"), np.maximum(part // PLACES, np.minimum(part, BERTH_ALIGNMENT)))
    wanted = wanted[size[wanted] // np.maximum(needed[wanted], 1) < chunk[target[wanted]]]
    wanted = wanted[_worthwhile(edge[wanted], own[wanted], runs[wanted], below[wanted])]
    # An engine's pages, which no transport reads, are left by way of the ring alone.
    paged = np.array([party.party.layout.lands == "flip" for party in sources], np.bool_)
    packed = paged[source] & (ring[source] > 0)
    packed[wanted] = True
    return packed


def _ring_chunks(sources: Sequence[Decoded]) -> Ints:
    """Bytes of a chunk of each source's ring, 0 without one."""
    layouts = [p.party.layout for p in sources]
    return np.array([chunk_bytes(y.regions[y.staging]) if y.staging >= 0 else 0 for y in layouts], np.int64)


def pack_below(source: Decoded, cost: CostModel) -> float:
    """``CostModel.pack_below_bytes`` of what a source sends."""
    regions = source.party.layout.regions
    return cost.pack_below_bytes(regions[0].memory if regions else "DRAM")


def _worthwhile(edge: Ints, size: Ints, runs: Ints, below: Floats) -> Flags:
    """Pieces of edges where packing still pays when the packed run's own descriptor is counted."""
    if len(edge) == 0:
        return np.zeros(0, np.bool_)
    first = boundaries(edge)
    saved = np.add.reduceat(runs, first[:-1]) - 1
    worth = np.add.reduceat(size, first[:-1]) < saved * below[first[:-1]]
    return np.repeat(worth, np.diff(first))


def _berths(
    source: Ids, target: Ids, length: Ints, sources: Sequence[Decoded], targets: Sequence[Decoded]
) -> tuple[Berth | None, ...]:
    """The berth of each edge ``[e]`` with a cargo of ``length [e]`` bytes; those of one target lie by source."""
    # What leaves its slot as it lies is cut to what the slot's memory allows.
    regions = [p.party.layout.regions for p in sources]
    slots = np.array([longest_chunk(held[0].memory) if held else 0 for held in regions], np.int64)
    ring = _ring_chunks(sources)
    longest_of = np.where(ring > 0, ring, slots)
    berths: list[Berth | None] = [None] * len(length)
    for number, party in enumerate(targets):
        layout = party.party.layout
        mine = np.flatnonzero((target == number) & (length > 0))
        mine = mine[np.argsort(source[mine], kind="stable")]
        if not len(mine):
            continue
        room = landing_length(layout)
        wants = _up(length[mine], BERTH_ALIGNMENT)
        parts = wants if wants.sum() <= room else _shares(party, wants, room)
        longest = longest_chunk(layout.regions[layout.staging].memory)
        for edge, offset, part in zip(mine.tolist(), starts(parts)[:-1].tolist(), parts.tolist(), strict=True):
            size = int(length[edge])
            chunk = min(int(longest_of[source[edge]]), longest)
            if size > part:
                chunk = min(chunk, max(part // PLACES, BERTH_ALIGNMENT) // BERTH_ALIGNMENT * BERTH_ALIGNMENT)
            places = -(-size // chunk) if size <= part else part // chunk
            berths[edge] = Berth(layout.staging, offset, chunk, places, size, size > part or layout.lands == "flip")
    return tuple(berths)


def _shares(party: Decoded, wants: Ints, room: int) -> Ints:
    """What each edge gets of a landing that is too small for all: as much as it wants, or as the others do."""
    member, lands = party.party.member, party.party.layout.lands
    if lands == "copy":
        raise LandingTooSmall(member, int(wants.sum()), room)
    shares = np.zeros(len(wants), np.int64)
    left = room
    for nth, edge in enumerate(np.argsort(wants, kind="stable").tolist()):
        equal = left // (len(wants) - nth) // BERTH_ALIGNMENT * BERTH_ALIGNMENT
        shares[edge] = min(int(wants[edge]), equal)
        left -= int(shares[edge])
    if not shares.all():
        raise LandingTooSmall(member, len(wants) * BERTH_ALIGNMENT, room)
    return shares


def _up(values: Ints, step: int) -> Ints:
    return -(-values // step) * step
