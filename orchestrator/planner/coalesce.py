"""Which pieces go straight to their place and which are packed into one run per edge, and where they are staged.

A piece that goes straight costs ``runs * alpha``, as far as its ``bytes / beta`` on the wire do not hide them; one that
is packed costs ``bytes / pack rate`` for gathering and scattering. What is packed must fit both sides' staging; the
shortest runs, where packing saves most per staged byte, come first.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from weightsync.orchestrator.planner.arrays import Flags, Ids, Ints, boundaries
from weightsync.orchestrator.planner.inputs import CostModel

STAGING_ALIGNMENT: Final = 256
"""Of each edge's first staged byte: a cache line pair, and what CUDA's allocations are aligned to."""


@dataclass(frozen=True, slots=True)
class StagedRuns:
    """Where each piece is staged, in bytes of its source's and its target's staging region ``[n]``.

    Both are -1 for a piece that goes straight.
    """

    at_source: Ints
    at_target: Ints


def pack(
    edge: Ints, source: Ids, target: Ids, size: Ints, runs: Ints, cost: CostModel, used: Ints, source_room: Ints,
    target_room: Ints,
) -> StagedRuns:  # fmt: skip
    """Decide for pieces ``[n]`` that are sorted by edge, and by group within it.

    Args:
        edge: ascending number of each piece's edge; ``source`` and ``target`` are its ends.
        size, runs: bytes, and descriptors if it goes straight.
        used: bytes of each source's staging that are taken already ``[sources]``; updated in place.
        source_room, target_room: length of the staging regions, 0 without one.
    """
    staged = StagedRuns(np.full(len(edge), -1, np.int64), np.full(len(edge), -1, np.int64))
    wanted = np.flatnonzero(size < runs * cost.pack_below_bytes)
    wanted = wanted[(target_room[target[wanted]] > 0) & (source_room[source[wanted]] > used[source[wanted]])]
    wanted = wanted[_worthwhile(edge[wanted], size[wanted], runs[wanted], cost)]
    # Leaving pieces out for want of room can make an edge not worth packing any more, so that is asked again below.
    density = size // np.maximum(runs, 1)
    wanted = wanted[_within(target[wanted], target[wanted], density[wanted], size[wanted], edge[wanted], target_room)]
    room = source_room - used
    wanted = wanted[_within(source[wanted], target[wanted], density[wanted], size[wanted], edge[wanted], room)]
    wanted = wanted[_worthwhile(edge[wanted], size[wanted], runs[wanted], cost)]
    if len(wanted) == 0:
        return staged
    # From here on per edge: its packed pieces lie one behind the other, so that one descriptor carries them all.
    first = boundaries(edge[wanted])
    lengths = np.add.reduceat(size[wanted], first[:-1])
    heads = wanted[first[:-1]]
    inside = np.cumsum(size[wanted]) - size[wanted]
    inside -= np.repeat(inside[first[:-1]], np.diff(first))
    at_source, ends = _place(source[heads], target[heads], lengths, used)
    # A target's staging begins at 0 for every plan of its engine: no other engine shares it.
    at_target, _ = _place(target[heads], source[heads], lengths, np.zeros_like(target_room))
    staged.at_source[wanted] = np.repeat(at_source, np.diff(first)) + inside
    staged.at_target[wanted] = np.repeat(at_target, np.diff(first)) + inside
    used[:] = ends
    return staged


def _worthwhile(edge: Ints, size: Ints, runs: Ints, cost: CostModel) -> Flags:
    """Pieces of edges where packing still pays when the packed run's own descriptor is counted."""
    if len(edge) == 0:
        return np.zeros(0, np.bool_)
    first = boundaries(edge)
    saved = np.add.reduceat(runs, first[:-1]) - 1
    worth = np.add.reduceat(size, first[:-1]) < saved * cost.pack_below_bytes
    return np.repeat(worth, np.diff(first))


def _within(side: Ids, target: Ids, density: Ints, size: Ints, edge: Ints, room: Ints) -> Flags:
    """Which pieces ``[n]`` fit into the staging of their end ``side [n]``, whose regions have ``room [sides]`` bytes.

    Earlier targets come first, so that a later one never displaces them; of one target the shortest runs do. Room for
    the alignment of each edge is set aside.
    """
    edges = (
        np.bincount(side[boundaries(edge)[:-1]], minlength=len(room)) if len(edge) else np.zeros(len(room), np.int64)
    )
    free = room - edges * STAGING_ALIGNMENT
    if (np.bincount(side, weights=size, minlength=len(room)) <= np.maximum(free, 0)).all():
        return np.ones(len(side), np.bool_)
    # lexsort's last key counts first: by side, then target, then density.
    order = np.lexsort((density, target, side))
    filled = np.cumsum(size[order])
    first = boundaries(side[order])
    # The running sum goes on over all sides: what it was where a side begins is taken off again.
    base = np.repeat((filled - size[order])[first[:-1]], np.diff(first))
    fits = np.empty(len(side), np.bool_)
    fits[order] = filled - base <= free[side[order]]
    return fits


def _place(side: Ids, other: Ids, lengths: Ints, used: Ints) -> tuple[Ints, Ints]:
    """Lay edges ``[e]`` of ``lengths`` bytes behind each other in the staging of ``side``, in the order of ``other``.

    Returns:
        The first byte of each edge ``[e]``, and where the staging of each side ends now ``[sides]``, from ``used``.
    """
    padded = -(-lengths // STAGING_ALIGNMENT) * STAGING_ALIGNMENT
    order = np.lexsort((other, side))
    filled = np.cumsum(padded[order])
    first = boundaries(side[order])
    base = np.repeat((filled - padded[order])[first[:-1]], np.diff(first))
    place = np.empty(len(side), np.int64)
    place[order] = filled - padded[order] - base + used[side[order]]
    ends = used.copy()
    np.maximum.at(ends, side, place + padded)
    return place, ends
