"""The digest in NumPy, for tensors on the CPU: exact, and fast enough to run in every round.

Runs are cut at tile boundaries. Long stretches of whole tiles are multiplied where they lie; everything else is
gathered in groups of equal length and equal place in the tile, so that each group is one small matrix product.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from weightsync.kernels.columns import DST_REGION, SRC_REGION
from weightsync.kernels.digest_multipliers import (
    PRESENT,
    TILE_BYTES,
    TILE_WORDS,
    Words,
    inner_multipliers,
    outer_keys,
    outer_multipliers,
)
from weightsync.kernels.strided import Sheets, Table, canonical, concatenate, sheets

Bytes = npt.NDArray[np.uint8]

CHUNK_TILES: Final = 32
"""Tiles multiplied at a time: 256 KiB of data and its 512 KiB of 64-bit words stay in a core's L2 cache."""
STRETCH_TILES: Final = 32
"""Whole tiles in a row from which on gathering costs more than a step of its own in Python."""


@dataclass(frozen=True, slots=True)
class _Stretch:
    """``tiles`` whole tiles in a row, starting at byte ``offset`` of ``region``."""

    region: int
    offset: int
    tile: int
    tiles: int
    keys: Words


@dataclass(frozen=True, slots=True)
class _PieceGroup:
    """Pieces of ``length`` bytes that begin ``start`` bytes into their tiles; ``outer`` is uint64[n, 4]."""

    region: int
    start: int
    length: int
    offsets: Table
    outer: Words


class ReferenceDigest:
    """A digest prepared once and taken many times: calling it reads the regions as they are then."""

    def __init__(self, regions: Sequence[torch.Tensor], table: Table) -> None:
        """``regions`` are uint8[n] on the CPU; ``table`` is int64[n, COLUMNS], checked by the caller."""
        self._regions = [region.numpy() for region in regions]
        rows = canonical(table)
        region, keys = rows[:, SRC_REGION], outer_keys(rows[:, DST_REGION])
        runs = sheets(rows).unrolled()
        head = np.minimum(-runs.dst % TILE_BYTES, runs.run)
        whole = (runs.run - head) // TILE_BYTES
        long = whole >= STRETCH_TILES
        stretch = runs.take(long).part(head[long], whole[long] * TILE_BYTES)
        self._stretches = [
            _Stretch(int(region[row]), int(src), int(dst) // TILE_BYTES, int(run) // TILE_BYTES, keys[row : row + 1])
            for row, src, dst, run in zip(stretch.row, stretch.src, stretch.dst, stretch.run, strict=True)
        ]
        tail = runs.take(long).part((head + whole * TILE_BYTES)[long], (runs.run - head - whole * TILE_BYTES)[long])
        pieces = _cut(concatenate([runs.take(~long), runs.take(long).part(0 * head[long], head[long]), tail]))
        self._groups = _grouped(pieces, region, keys)

    def launch(self) -> None:
        """Nothing to start: the CPU computes in :meth:`result`."""

    def result(self) -> tuple[int, int]:
        """The two sums over the bytes as they are now."""
        total = np.zeros(2, np.uint64)
        for stretch in self._stretches:
            total += _stretch_sum(self._regions[stretch.region], stretch)
        for group in self._groups:
            total += _group_sum(self._regions[group.region], group)
        return int(total[0]), int(total[1])

    def __call__(self) -> tuple[int, int]:
        """``launch`` and ``result``."""
        return self.result()


def _cut(runs: Sheets) -> Sheets:
    """Single runs, cut so that each piece lies in one tile."""
    first = runs.dst // TILE_BYTES
    pieces = np.where(runs.run > 0, (runs.dst + runs.run - 1) // TILE_BYTES - first + 1, 0)
    which = np.repeat(np.arange(len(runs)), pieces)
    tile = first[which] + np.arange(len(which)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    spread = runs.take(which)
    begin = np.maximum(spread.dst, tile * TILE_BYTES)
    end = np.minimum(spread.dst + spread.run, (tile + 1) * TILE_BYTES)
    return spread.part(begin - spread.dst, end - begin)


def _grouped(pieces: Sheets, region: Table, keys: Words) -> list[_PieceGroup]:
    """Pieces of one length, one place in the tile and one region, together."""
    start, where = pieces.dst % TILE_BYTES, region[pieces.row]
    outer = outer_multipliers(keys[pieces.row], pieces.dst // TILE_BYTES)
    order = np.lexsort((pieces.src, start, pieces.run, where))
    signature = np.stack([where[order], pieces.run[order], start[order]])
    breaks = np.flatnonzero((signature[:, 1:] != signature[:, :-1]).any(axis=0)) + 1
    return [
        _PieceGroup(int(where[part[0]]), int(start[part[0]]), int(pieces.run[part[0]]), pieces.src[part], outer[part])
        for part in np.split(order, breaks)
        if len(part)
    ]


def _stretch_sum(region: Bytes, stretch: _Stretch) -> Words:
    data = np.frombuffer(region, "<u4", stretch.tiles * TILE_WORDS, stretch.offset).reshape(-1, TILE_WORDS)
    weights = inner_multipliers()
    # Each byte counts as its value plus one; the ones of a whole tile are the same for all tiles.
    present = np.uint64(PRESENT) * weights.sum(axis=0)
    total = np.zeros(2, np.uint64)
    for first in range(0, stretch.tiles, CHUNK_TILES):
        inner = data[first : first + CHUNK_TILES].astype(np.uint64) @ weights + present
        tiles = stretch.tile + first + np.arange(len(inner))
        total += _outer_sum(inner, outer_multipliers(stretch.keys, tiles))
    return total


def _group_sum(region: Bytes, group: _PieceGroup) -> Words:
    skip = group.start % 4
    words = (skip + group.length + 3) // 4
    weights = inner_multipliers()[group.start // 4 : group.start // 4 + words]
    # The ones of the bytes that are there, in words that the piece may cover in part.
    covered = np.zeros(4 * words, np.uint8)
    covered[skip : skip + group.length] = 1
    present = covered.view("<u4").astype(np.uint64) @ weights
    windows = np.lib.stride_tricks.as_strided(region, (len(region) - group.length + 1, group.length), (1, 1))
    step = max(1, CHUNK_TILES * TILE_BYTES // group.length)
    total = np.zeros(2, np.uint64)
    for first in range(0, len(group.offsets), step):
        gathered = windows[group.offsets[first : first + step]]
        if skip or group.length % 4:
            padded = np.zeros((len(gathered), 4 * words), np.uint8)
            padded[:, skip : skip + group.length] = gathered
            gathered = padded
        inner = gathered.view("<u4").astype(np.uint64) @ weights + present
        total += _outer_sum(inner, group.outer[first : first + step])
    return total


def _outer_sum(inner: Words, outer: Words) -> Words:
    """``Σ H_s·D + H'_s·D'`` for both seeds, of uint64[n, 2] and uint64[n, 4]."""
    products = outer.reshape(-1, 2, 2) * inner[:, None, :]
    return np.asarray(products.sum(axis=(0, 2), dtype=np.uint64))
