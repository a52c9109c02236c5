"""The digest in NumPy, for tensors on the CPU: exact, and fast enough to run in every round.

Runs are cut at tile boundaries. Long stretches of whole tiles are multiplied where they lie; everything else is
gathered in groups of equal length and equal place in the tile, so that each group is one small matrix product. What is
to be looked at is looked at piece by piece, while it lies in the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from weightsync.kernels.columns import DST_REGION, KINDS, SRC_REGION, Element
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
    element: Element | None


@dataclass(frozen=True, slots=True)
class _PieceGroup:
    """Pieces of ``length`` bytes that begin ``start`` bytes into their tiles; ``outer`` is uint64[n, 4]."""

    region: int
    start: int
    length: int
    offsets: Table
    outer: Words
    element: Element | None


class ReferenceDigest:
    """A digest prepared once and taken many times: calling it reads the regions as they are then."""

    def __init__(self, regions: Sequence[torch.Tensor], table: Table, codes: Table) -> None:
        """``regions`` are uint8[n] on the CPU; ``table`` is int64[n, COLUMNS] and ``codes`` int64[n], checked by the
        caller."""
        self._finite = True
        self._regions = [region.numpy() for region in regions]
        rows = canonical(table)
        region, keys = rows[:, SRC_REGION], outer_keys(rows[:, DST_REGION])
        runs = sheets(rows).unrolled()
        head = np.minimum(-runs.dst % TILE_BYTES, runs.run)
        whole = (runs.run - head) // TILE_BYTES
        long = whole >= STRETCH_TILES
        stretch = runs.take(long).part(head[long], whole[long] * TILE_BYTES)
        self._stretches = [
            _Stretch(
                int(region[row]),
                int(src),
                int(dst) // TILE_BYTES,
                int(run) // TILE_BYTES,
                keys[row : row + 1],
                KINDS[codes[row]],
            )
            for row, src, dst, run in zip(stretch.row, stretch.src, stretch.dst, stretch.run, strict=True)
        ]
        tail = runs.take(long).part((head + whole * TILE_BYTES)[long], (runs.run - head - whole * TILE_BYTES)[long])
        pieces = _cut(concatenate([runs.take(~long), runs.take(long).part(0 * head[long], head[long]), tail]))
        self._groups = _grouped(pieces, region, keys, codes)

    @property
    def parts(self) -> int:
        """One: whatever runs beside it has other cores."""
        return 1

    def launch(self, part: int | None = None) -> None:
        """Nothing to start: the CPU computes in :meth:`result`."""

    def wait(self) -> None:
        """Nothing to wait for."""

    def result(self) -> tuple[int, int]:
        """The two sums over the bytes as they are now."""
        total, finite = np.zeros(2, np.uint64), True
        for stretch in self._stretches:
            more, fine = _stretch_sum(self._regions[stretch.region], stretch)
            total, finite = total + more, finite and fine
        for group in self._groups:
            more, fine = _group_sum(self._regions[group.region], group)
            total, finite = total + more, finite and fine
        self._finite = finite
        return int(total[0]), int(total[1])

    def finite(self) -> bool:
        """Whether all that the last :meth:`result` looked at are finite numbers."""
        return self._finite

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


def _grouped(pieces: Sheets, region: Table, keys: Words, codes: Table) -> list[_PieceGroup]:
    """Pieces of one length, one place in the tile, one kind and one region, together."""
    start, where, code = pieces.dst % TILE_BYTES, region[pieces.row], codes[pieces.row]
    outer = outer_multipliers(keys[pieces.row], pieces.dst // TILE_BYTES)
    order = np.lexsort((pieces.src, code, start, pieces.run, where))
    signature = np.stack([where[order], pieces.run[order], start[order], code[order]])
    breaks = np.flatnonzero((signature[:, 1:] != signature[:, :-1]).any(axis=0)) + 1
    return [
        _PieceGroup(
            int(where[part[0]]),
            int(start[part[0]]),
            int(pieces.run[part[0]]),
            pieces.src[part],
            outer[part],
            KINDS[code[part[0]]],
        )
        for part in np.split(order, breaks)
        if len(part)
    ]


def _stretch_sum(region: Bytes, stretch: _Stretch) -> tuple[Words, bool]:
    """Both sums, and whether all is finite."""
    data = np.frombuffer(region, "<u4", stretch.tiles * TILE_WORDS, stretch.offset).reshape(-1, TILE_WORDS)
    # Each byte counts as its value plus one; the ones of a whole tile are the same for all tiles.
    present = np.uint64(PRESENT) * inner_multipliers().sum(axis=0)
    total, finite = np.zeros(2, np.uint64), True
    for first in range(0, stretch.tiles, CHUNK_TILES):
        chunk = data[first : first + CHUNK_TILES]
        finite = finite and all_finite(chunk, stretch.element)
        inner = _inner_sum(chunk, 0) + present
        tiles = stretch.tile + first + np.arange(len(inner))
        total += _outer_sum(inner, outer_multipliers(stretch.keys, tiles))
    return total, finite


def _group_sum(region: Bytes, group: _PieceGroup) -> tuple[Words, bool]:
    """Both sums, and whether all is finite."""
    skip = group.start % 4
    words = (skip + group.length + 3) // 4
    weights = inner_multipliers()[group.start // 4 : group.start // 4 + words]
    # The ones of the bytes that are there, in words that the piece may cover in part.
    covered = np.zeros(4 * words, np.uint8)
    covered[skip : skip + group.length] = 1
    present = covered.view("<u4").astype(np.uint64) @ weights
    windows = np.lib.stride_tricks.as_strided(region, (len(region) - group.length + 1, group.length), (1, 1))
    step = max(1, CHUNK_TILES * TILE_BYTES // group.length)
    total, finite = np.zeros(2, np.uint64), True
    for first in range(0, len(group.offsets), step):
        gathered = windows[group.offsets[first : first + step]]
        finite = finite and all_finite(gathered, group.element)
        if skip or group.length % 4:
            padded = np.zeros((len(gathered), 4 * words), np.uint8)
            padded[:, skip : skip + group.length] = gathered
            gathered = padded
        inner = _inner_sum(gathered.view("<u4"), group.start // 4) + present
        total += _outer_sum(inner, group.outer[first : first + step])
    return total, finite


@cache
def _columns() -> tuple[Words, Words]:
    """The two inner tables, each contiguous."""
    return np.ascontiguousarray(inner_multipliers()[:, 0]), np.ascontiguousarray(inner_multipliers()[:, 1])


def _inner_sum(words: npt.NDArray[np.uint32], first: int) -> Words:
    """``Σ g[j]·w`` and ``Σ g'[j]·w`` of each row of ``words`` (uint32[n, m]), which begin at word ``first`` of their
    tiles: uint64[n, 2].

    NumPy's matrix product of integers takes its operands by strides, one at a time; two sums of products over
    contiguous memory take two thirds of its time.
    """
    wide = words.astype(np.uint64)
    return np.stack([np.einsum("ij,j->i", wide, g[first : first + words.shape[1]]) for g in _columns()], axis=1)


def all_finite(data: npt.NDArray[np.generic], element: Element | None) -> bool:
    """Whether contiguous memory holds finite numbers only; true of what has no kind."""
    if element is None:
        return True
    # Without its sign a number sorts as its bits do, NaN and infinity above all: as signed integers the positive ones
    # are on top, as unsigned ones the negative. Two maxima write nothing, which a comparison of each element would.
    size, top = element.itemsize, element.exponent | element.sign
    fine = bool(data.view(f"<u{size}").max() < top)
    return fine and not (element.signed and bool(data.view(f"<i{size}").max() >= element.exponent))


def _outer_sum(inner: Words, outer: Words) -> Words:
    """``Σ H_s·D + H'_s·D'`` for both seeds, of uint64[n, 2] and uint64[n, 4]."""
    products = outer.reshape(-1, 2, 2) * inner[:, None, :]
    return np.asarray(products.sum(axis=(0, 2), dtype=np.uint64))
