"""How the runs of one edge are cut into descriptors and grouped into transfer handles. Pure NumPy."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from weightsync.agents.tables.runs import (
    RUN_LENGTH,
    RUN_LOCAL_OFFSET,
    RUN_LOCAL_REGION,
    RUN_REMOTE_OFFSET,
    RUN_REMOTE_REGION,
)
from weightsync.agents.transport.filling import ALL
from weightsync.agents.transport.nixl.errors import EdgeError
from weightsync.orchestrator.protocol.layout import Matrix, Region

Memory = Literal["DRAM", "VRAM"]

HOST_CHUNK_BYTES: Final = 8 << 20
"""Per handle when either end is host memory. Posting blocks for the copy there (about 5 GB/s through the kernel's
cross-memory call), so this is what keeps an event loop's turn near 2 ms."""

DEVICE_CHUNK_BYTES: Final = 1 << 30
"""Per handle between devices. Posting does not block, and every cut costs a descriptor (about 13 µs); what is filled
first can leave first."""

CHUNK_DESCRIPTORS: Final = 256
"""Descriptors per handle: 100 handles in flight then are 25,600 operations in UCX's queue."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One handle's share of a lane: descriptors ``first … last`` (exclusive), the bytes they carry, and how much of
    region 0 must be filled before they are read (ALL if another region is)."""

    first: int
    last: int
    bytes: int
    needs: int = 0

    @property
    def descriptors(self) -> int:
        """How many it posts, before NIXL merges neighbours."""
        return self.last - self.first


@dataclass(frozen=True, slots=True)
class Lane:
    """Descriptors of one edge between one kind of memory at each end: NIXL's lists hold one kind only.

    ``local`` and ``remote`` are uint64 ``[n, 3]`` (address, bytes, device) and match row by row; ``places`` is int64
    ``[n, 2]`` (local region, local offset), for error messages.
    """

    local_memory: Memory
    remote_memory: Memory
    local: npt.NDArray[np.uint64]
    remote: npt.NDArray[np.uint64]
    places: Matrix
    chunks: tuple[Chunk, ...]


def lanes(
    runs: Matrix, local: Sequence[Region], remote: Sequence[Region], chunk_bytes: int | None = None
) -> list[Lane]:
    """The lanes of one edge.

    Args:
        runs: int64 ``[n, RUN_COLUMNS]``, all of one peer.
        local: this agent's regions, indexed by RUN_LOCAL_REGION.
        remote: the peer's, indexed by RUN_REMOTE_REGION.
        chunk_bytes: bytes per handle; None for HOST_CHUNK_BYTES or DEVICE_CHUNK_BYTES by the lane's memory.

    Raises:
        EdgeError: a run outside its region on either side.
    """
    here = local_spans(local, runs)
    there = Addresses(remote, runs[:, RUN_REMOTE_REGION], runs[:, RUN_REMOTE_OFFSET], runs[:, RUN_LENGTH], "remote")
    made = []
    for local_memory in ("DRAM", "VRAM"):
        for remote_memory in ("DRAM", "VRAM"):
            index = np.flatnonzero((here.vram == (local_memory == "VRAM")) & (there.vram == (remote_memory == "VRAM")))
            if len(index):
                device = local_memory == remote_memory == "VRAM"
                limit = chunk_bytes or (DEVICE_CHUNK_BYTES if device else HOST_CHUNK_BYTES)
                spans = here.take(index), there.take(index)
                made.append(_lane(runs[index], *spans, (local_memory, remote_memory), limit))
    return made


def local_spans(regions: Sequence[Region], runs: Matrix) -> "Addresses":
    """This agent's side of ``runs``.

    Raises:
        EdgeError: a run outside its region.
    """
    return Addresses(regions, runs[:, RUN_LOCAL_REGION], runs[:, RUN_LOCAL_OFFSET], runs[:, RUN_LENGTH], "local")


class Addresses:
    """Absolute addresses of one side of the runs, checked against the regions."""

    def __init__(self, regions: Sequence[Region], index: Matrix, offset: Matrix, length: Matrix, side: str) -> None:
        if len(index) and (index.min() < 0 or index.max() >= len(regions)):
            raise EdgeError(f"runs name {side} regions {index.min()} … {index.max()} of {len(regions)}")
        base = np.array([r.base for r in regions], dtype=np.int64)
        size = np.array([r.length for r in regions], dtype=np.int64)
        outside = (offset < 0) | (length <= 0) | (offset + length > size[index])
        if outside.any():
            at = int(np.flatnonzero(outside)[0])
            raise EdgeError(
                f"run {at}: bytes {int(offset[at])} … +{int(length[at])} are outside {side} region {int(index[at])}"
                f" of {int(size[index[at]])} bytes"
            )
        self.address = base[index] + offset
        self.device = np.array([r.device for r in regions], dtype=np.int64)[index]
        self.vram = np.array([r.memory == "VRAM" for r in regions], dtype=bool)[index]

    def descriptors(self, length: Matrix) -> npt.NDArray[np.uint64]:
        """``[n, 3]``: address, ``length`` in bytes, device."""
        return np.stack([self.address, length, self.device], axis=1).astype(np.uint64)

    def take(self, index: Matrix) -> npt.NDArray[np.int64]:
        return np.stack([self.address[index], self.device[index]], axis=1)


def _lane(runs: Matrix, here: Matrix, there: Matrix, memories: tuple[Memory, Memory], limit: int) -> Lane:
    pieces = -(-runs[:, RUN_LENGTH] // limit)
    owner = np.repeat(np.arange(len(runs)), pieces)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = number * limit
    length = np.minimum(runs[owner, RUN_LENGTH] - begin, limit)
    places = np.stack([runs[owner, RUN_LOCAL_REGION], runs[owner, RUN_LOCAL_OFFSET] + begin], axis=1)
    needs = filled_before(places[:, 0], places[:, 1] + length)
    return Lane(
        *memories,
        _descriptors(here[owner], begin, length),
        _descriptors(there[owner], begin, length),
        places,
        tuple(replace(chunk, needs=int(needs[chunk.first : chunk.last].max())) for chunk in _chunks(length, limit)),
    )


def filled_before(region: Matrix, end: Matrix) -> Matrix:
    """How much of region 0 must be filled before bytes up to ``end`` of ``region`` are read."""
    needs: Matrix = np.where(region == 0, end, ALL)
    return needs


def _descriptors(place: Matrix, begin: Matrix, length: Matrix) -> npt.NDArray[np.uint64]:
    table = np.empty((len(length), 3), dtype=np.uint64)
    table[:, 0] = place[:, 0] + begin
    table[:, 1] = length
    table[:, 2] = place[:, 1]
    return table


def _chunks(length: Matrix, limit: int) -> list[Chunk]:
    """Greedy cuts of at most ``limit`` bytes and CHUNK_DESCRIPTORS descriptors."""
    ends = np.cumsum(length)
    chunks = []
    first, done = 0, 0
    while first < len(length):
        last = int(np.searchsorted(ends, done + limit, side="right"))
        last = max(first + 1, min(last, first + CHUNK_DESCRIPTORS, len(length)))
        chunks.append(Chunk(first, last, int(ends[last - 1]) - done))
        first, done = last, int(ends[last - 1])
    return chunks
