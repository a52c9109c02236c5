"""Landing memory: what both ends of an edge must agree on, and how much of it an engine needs.

An edge's *cargo* is all that it sends by way of the target's landing, one line of bytes that travels in chunks. Its
*berth* is the part of the landing that is the edge's alone.
"""

from collections.abc import Sequence
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from weightsync.orchestrator.protocol.fields import Count
from weightsync.orchestrator.protocol.layout import (
    COPY_BOX,
    COPY_PEER,
    COPY_REMOTE,
    COPY_ROW,
    COPY_STAGED,
    ITEMSIZE,
    ROW_BOX,
    ROW_COLUMNS,
    ROW_OFFSET,
    ROW_REGION,
    ROW_TENSOR,
    Layout,
    Matrix,
    Region,
    dense,
)
from weightsync.orchestrator.protocol.limits import MAX_COUNT

BERTH_ALIGNMENT: Final = 256
"""Of berths and chunks: a cache line pair, and what CUDA's allocations are aligned to."""

PIECE_ALIGNMENT: Final = 16
"""Of each piece of a cargo: what the kernels move at a time. Behind a piece of an odd length all others would go four
bytes at a time."""

RING_CHUNKS: Final = 8
"""A sender's packing region is cut into at least so many chunks: enough to pack, write and wait at the same time."""

_CHUNK_BYTES: Final = {"VRAM": 256 << 20, "DRAM": 8 << 20}
"""Between devices 128 MiB reach 0.94 of one large write, and each chunk costs either end 0.4 ms of Python, in which a
link brings 150 MB: as large as a ring allows. Posting from or to host memory blocks for the copy, at about 5 GB/s:
8 MiB keep an event loop's turn near 2 ms."""

_RING_BYTES: Final = {"VRAM": 2 << 30, "DRAM": 64 << 20}
"""A place between devices is taken for 3.6 ms of the 1.1 that its chunk is on the wire: at the rate of an H100's links,
1.4 GB are on their way. With 1 GiB the wire stood still for 3 to 15 ms of 15 GB."""

PIECES_PER_ROW: Final = 8
"""Of an engine's row, as far as padding is set aside for them; what trainer ranks cut finer takes of SPARE_FRACTION."""

SPARE_FRACTION: Final = 64
"""One part in so many of a landing arena is set aside for padding beyond that."""

SPARE_BYTES: Final = 1 << 20
"""Of a landing arena, beside that: padding of the berths of 4096 trainer ranks."""


Positive = Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNT)]


class Berth(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where an edge's cargo of ``bytes`` lands: ``places`` places of ``chunk_bytes`` each, from ``offset`` bytes of the
    target's region ``region`` on. Chunk k of the cargo lands in place ``k % places``. ``passes``: each chunk is
    scattered as it lands, and a place is written again only when that is done; else the cargo stays where it lands."""

    region: Count
    offset: Count
    chunk_bytes: Positive
    places: Positive
    bytes: Count
    passes: bool = False

    @property
    def chunks(self) -> int:
        """Of the whole cargo."""
        return -(-self.bytes // self.chunk_bytes)

    @property
    def wraps(self) -> bool:
        """Whether places are used again."""
        return self.chunks > self.places

    def place(self, chunk: int) -> int:
        """First byte of ``chunk`` in the region."""
        return self.offset + chunk % self.places * self.chunk_bytes

    @property
    def end(self) -> int:
        """Behind the last byte of the region that the cargo reaches."""
        return self.offset + min(self.bytes, self.places * self.chunk_bytes)


def longest_chunk(memory: Literal["DRAM", "VRAM"]) -> int:
    """Bytes of a chunk where there is memory enough."""
    return _CHUNK_BYTES[memory]


def longest_ring(*, on_device: bool) -> int:
    """Bytes of a ring, at either end, where nobody says how many and a version is longer than that."""
    return _RING_BYTES["VRAM" if on_device else "DRAM"]


def usual_ring(held: int, *, on_device: bool) -> int:
    """Bytes of a ring, at either end, where nobody says how many; ``held``: those that a whole version takes there."""
    return min(longest_ring(on_device=on_device), -(-held // BERTH_ALIGNMENT) * BERTH_ALIGNMENT)


def chunk_bytes(ring: Region) -> int:
    """Bytes of a chunk of a sender's ``ring``; 0 if it is too small for one."""
    part = max(ring.length // RING_CHUNKS // BERTH_ALIGNMENT, 1) * BERTH_ALIGNMENT
    return min(longest_chunk(ring.memory), part) if ring.length >= BERTH_ALIGNMENT else 0


def landing_length(layout: Layout) -> int:
    """Bytes of the landing, 0 without one."""
    return layout.regions[layout.staging].length if layout.staging >= 0 else 0


def arena_bytes(layout: Layout) -> int:
    """Bytes of landing with which a rank of ``layout`` may be copied to (``lands: copy``), whoever sends: all of its
    rows, and padding of each piece and berth. The planner refuses, with what is missing, where pieces are so many and
    so small that their padding takes more."""
    rows = layout.matrix()
    size = 0
    if len(rows):
        item = [ITEMSIZE[tensor.dtype] for tensor in layout.tensors]
        extents = rows[:, ROW_BOX + 1 :: 3].prod(axis=1).tolist()
        size = sum(extent * item[tensor] for extent, tensor in zip(extents, rows[:, ROW_TENSOR].tolist(), strict=True))
    padding = len(rows) * PIECES_PER_ROW * PIECE_ALIGNMENT + size // SPARE_FRACTION + SPARE_BYTES
    return -(-(size + padding) // BERTH_ALIGNMENT) * BERTH_ALIGNMENT


def landed(copies: Matrix, berths: Sequence[Berth | None]) -> Matrix:
    """Copies ``[n, COPY_COLUMNS]`` of a reader with their places in its landing instead of in their edge's cargo; only
    those of edges whose cargo stays there. ``berths`` are those of the peers."""
    whole = np.array([berth is not None and not berth.passes for berth in berths], np.bool_)
    offset = np.array([berth.offset if berth is not None else 0 for berth in berths], np.int64)
    peer = copies[:, COPY_PEER]
    found = copies[whole[peer]].copy()
    found[:, COPY_STAGED] += offset[found[:, COPY_PEER]]
    return found


def landed_layout(layout: Layout, copies: Matrix) -> Layout:
    """What a rank holds in its landing once all of a version is there: of the same regions, with a row for each of
    ``copies``, as from ``landed``, and nothing to pack it by.

    Raises:
        IndexError: a copy of a row that ``layout`` has not.
    """
    tensor = layout.matrix()[copies[:, COPY_ROW], ROW_TENSOR]
    itemsize = np.array([ITEMSIZE[each.dtype] for each in layout.tensors], np.int64)
    extent = copies[:, COPY_BOX + 1 : COPY_REMOTE : 2]
    rows = np.empty((len(copies), ROW_COLUMNS), "<i8")
    rows[:, ROW_TENSOR], rows[:, ROW_REGION], rows[:, ROW_OFFSET] = tensor, layout.staging, copies[:, COPY_STAGED]
    rows[:, ROW_BOX::3], rows[:, ROW_BOX + 1 :: 3] = copies[:, COPY_BOX:COPY_REMOTE:2], extent
    rows[:, ROW_BOX + 2 :: 3] = dense(extent, itemsize[tensor])
    return msgspec.structs.replace(layout, rows=rows.tobytes(), staging=-1, notes=())
