"""Layouts and tables: boxes over logical tensors, in columns of int64, as they travel.

A *logical tensor* is a tensor of the checkpoint. A *row* says that one box of it lies at one place of one registered
region: element ``i`` of the box (counted from the box's corner) is at ``base + offset + sum(i[d] * stride[d])`` bytes.
Tensors have up to ``MAX_RANK`` dimensions; lower ranks are padded on the left with offset 0, extent 1, stride 0.
"""

import hashlib
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from weightsync.orchestrator.protocol.fields import Count, Name, Nonce, Reason, Spoken
from weightsync.orchestrator.protocol.limits import (
    MAX_DEVICE,
    MAX_DIMENSIONS,
    MAX_LANDS_CHARS,
    MAX_LEFT_OUT,
    MAX_LEFT_OUT_CHARS,
    MAX_LEFT_OUT_REASONS,
    MAX_RANK,
    MAX_TENSORS,
    MAX_UNREAD,
)

Matrix = npt.NDArray[np.int64]

ITEMSIZE: Final[dict[str, int]] = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "float8_e8m0fnu": 1, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
"""Bytes per element of every dtype that may travel (torch names without the ``torch.`` prefix)."""

# Columns of Layout.rows.
ROW_TENSOR, ROW_REGION, ROW_OFFSET = 0, 1, 2
ROW_BOX: Final = 3
"""First of 3 × MAX_RANK columns: (box offset in elements, box extent in elements, memory stride in bytes) per dim."""
ROW_COLUMNS: Final = 3 + 3 * MAX_RANK

# Columns of a copy table: one sub-box of one of the reader's own rows, and where its bytes are at the peer.
COPY_PEER, COPY_ROW, COPY_GROUP, COPY_STAGED = 0, 1, 2, 3
"""peer: index into Connect.peers; row: index into the agent's own layout; group: pipelining group (layer), ascending;
staged: of a writer, the place in the edge's cargo of what it packs, -1 of what it does not; of a reader, the place in
the cargo of what it scatters."""
COPY_BOX: Final = 4
"""First of 2 × MAX_RANK columns: (absolute offset in the logical tensor, extent), in elements, per dim."""
COPY_REMOTE: Final = 4 + 2 * MAX_RANK
"""Remote region index, then remote byte offset of the sub-box's corner, then MAX_RANK remote byte strides. Where the
region is the peer's landing, the offset is the place in the edge's cargo."""
COPY_COLUMNS: Final = COPY_REMOTE + 2 + MAX_RANK


class Tensor(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A logical tensor: its checkpoint name, wire dtype (a key of ITEMSIZE) and full shape."""

    name: Name
    dtype: Name
    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]


class Region(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One registered range of memory. ``base`` is an address in the owner's process, ``length`` in bytes."""

    base: Nonce
    length: Count
    memory: Literal["DRAM", "VRAM"] = "DRAM"
    device: Annotated[int, msgspec.Meta(ge=0, le=MAX_DEVICE)] = 0


class Derived(msgspec.Struct, frozen=True, array_like=True):
    """A parameter or attribute of the engine that is recomputed after a write, not written: its name and by what."""

    name: Name
    refresh: Reason


class Note(Spoken, frozen=True, array_like=True):
    """What rows ``[first_row, end_row)`` are to their owner, for people: the kind of slot and why it is that kind."""

    first_row: Count
    end_row: Count
    slot: Name
    reason: Reason

    spoken = ("reason",)


ScaleFormat = Literal["float32", "ue8m0"]
"""Of a scale's value: any float32, or a power of two (which a scale of one byte cannot but be)."""


class Quantized(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A tensor whose elements are codes: indices of the codes and of their scales, and how the scales come about.

    ``block``: rows and columns that share a scale; the whole extent of a dimension that no scale divides. The scales'
    dtype and shape are those of their own tensor, which may drop dimensions of extent 1.
    """

    tensor: Count
    scales: Count
    block: tuple[Count, Count]
    scale_format: ScaleFormat = "float32"


class LeftOut(msgspec.Struct, frozen=True, array_like=True):
    """Tensors of an engine's rank that rounds leave out, for people: which kind of leaving out, and why.

    ``unwritten``: bytes of its model that stay as the engine's start left them. ``unneeded``: tensors of the
    checkpoint of which this rank needs nothing. ``unprobed``: written, and nobody could look whether they are read.
    ``names`` are the first of ``count``.
    """

    kind: Literal["unwritten", "unneeded", "unprobed"]
    reason: Annotated[str, msgspec.Meta(max_length=MAX_LEFT_OUT_CHARS)]
    names: Annotated[tuple[Name, ...], msgspec.Meta(max_length=MAX_LEFT_OUT)]
    count: Count


Lands = Literal["live", "copy", "flip"]
"""Where remote writes reach an engine and how its weights change: ``live``: they are written while it is paused;
``copy``: a whole version lands beside them and is copied over them; ``flip``: it lands in a second set of pages."""


class Layout(msgspec.Struct, frozen=True):
    """What one rank holds (trainer) or needs (inference).

    ``rows`` is an int64 matrix ``[n, ROW_COLUMNS]`` in little-endian bytes. ``staging`` is the index of the region
    that bytes pass through (-1: none): a trainer rank's ring, an engine's landing; its length is the budget.
    ``expert_map`` is a fingerprint of the expert placement (empty where none can change); with it the plan changes.
    ``notes``, ascending and apart, explain rows; no transfer depends on them. ``quantized`` says which tensors are
    codes; ``quantization`` is the engine's name of its format (empty without one), for people. A trainer leaves both
    empty. ``unread``: of a trainer, names of its own tensors that are part of no row, at most MAX_UNREAD of them; for
    people. ``left_out``: of an engine, likewise.
    ``lands``: of an engine. ``boundary``: its weights may change between two steps while it serves; false where ranks
    meet across engine cores, which must be paused before and resumed after. Neither means anything in a trainer's.
    ``lands_because``: why an engine's rank lands so, for people.
    """

    tensors: Annotated[tuple[Tensor, ...], msgspec.Meta(max_length=MAX_TENSORS)]
    regions: Annotated[tuple[Region, ...], msgspec.Meta(max_length=MAX_TENSORS)]
    rows: bytes
    staging: Annotated[int, msgspec.Meta(ge=-1, le=MAX_TENSORS)] = -1
    derived: Annotated[tuple[Derived, ...], msgspec.Meta(max_length=MAX_TENSORS)] = ()
    expert_map: Name = ""
    notes: Annotated[tuple[Note, ...], msgspec.Meta(max_length=MAX_TENSORS)] = ()
    quantized: Annotated[tuple[Quantized, ...], msgspec.Meta(max_length=MAX_TENSORS)] = ()
    quantization: Name = ""
    unread: Annotated[tuple[Name, ...], msgspec.Meta(max_length=MAX_UNREAD)] = ()
    left_out: Annotated[tuple[LeftOut, ...], msgspec.Meta(max_length=MAX_LEFT_OUT_REASONS)] = ()
    lands: Lands = "live"
    boundary: bool = True
    lands_because: Annotated[str, msgspec.Meta(max_length=MAX_LANDS_CHARS)] = ""

    def matrix(self) -> Matrix:
        """``rows`` as a read-only int64 matrix ``[n, ROW_COLUMNS]``."""
        return as_matrix(self.rows, ROW_COLUMNS)


def as_matrix(data: bytes, columns: int) -> Matrix:
    """Little-endian int64 bytes as a read-only matrix of ``columns`` columns.

    Raises:
        ValueError: the length is no whole number of rows.
    """
    if len(data) % (8 * columns):
        raise ValueError(f"a table of {len(data)} bytes is no whole number of rows of {columns} int64 columns")
    return np.frombuffer(data, dtype="<i8").reshape(-1, columns)


def contents(layout: Layout) -> bytes:
    """The same for ranks that hold the same boxes of the same tensors, in whatever order and wherever they lie.

    Raises:
        ValueError: its rows are no whole number of rows.
    """
    rows = layout.matrix()
    boxes = [column for first in (ROW_BOX, ROW_BOX + 1) for column in range(first, ROW_COLUMNS, 3)]
    sums = []
    for seed in (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03):
        words = np.full(len(rows), seed, np.uint64)
        for column in (ROW_TENSOR, *boxes):
            # The finaliser of SplitMix64 (Steele et al. 2014) after each column.
            words = (words ^ rows[:, column].astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            words ^= words >> np.uint64(31)
        sums.append(int(words.sum(dtype=np.uint64)))
    return hashlib.sha256(msgspec.msgpack.encode((layout.tensors, len(rows), sums))).digest()


def dense(extent: Matrix, itemsize: npt.NDArray[np.int64]) -> Matrix:
    """Byte strides ``[n, MAX_RANK]`` of boxes ``extent [n, MAX_RANK]`` that are packed row by row."""
    strides = np.empty_like(extent)
    strides[:, -1] = itemsize
    for dim in range(MAX_RANK - 2, -1, -1):
        strides[:, dim] = strides[:, dim + 1] * extent[:, dim + 1]
    return strides


def pad(values: tuple[int, ...], fill: int) -> tuple[int, ...]:
    """``values`` padded on the left to MAX_RANK."""
    if len(values) > MAX_RANK:
        raise ValueError(f"a tensor of {len(values)} dimensions; at most {MAX_RANK} are supported")
    return (fill,) * (MAX_RANK - len(values)) + tuple(values)


def row(
    tensor: int, region: int, offset: int, box_offset: tuple[int, ...], extent: tuple[int, ...], stride: tuple[int, ...]
) -> list[int]:
    """One row of ``Layout.rows``. Offsets and extents in elements, ``offset`` and ``stride`` in bytes."""
    interleaved = zip(pad(box_offset, 0), pad(extent, 1), pad(stride, 0), strict=True)
    return [tensor, region, offset, *(value for dim in interleaved for value in dim)]
