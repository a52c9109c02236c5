"""Strided tables: many runs of bytes, each row up to three loops around one contiguous run.

A row (:mod:`weightsync.kernels.columns`) is
``run_bytes, src_region, src_offset, dst_region, dst_offset, c0, s0, d0, c1, s1, d1, c2, s2, d2``: for every
``(i0, i1, i2)`` below the counts, ``run_bytes`` bytes at ``src_offset + i0*s0 + i1*s1 + i2*s2`` of the source region
belong to ``dst_offset + i0*d0 + i1*d1 + i2*d2`` of the destination. Offsets and strides are bytes. For a digest the
destination is logical: ``dst_region`` is a tensor's key, ``dst_offset`` an offset in the full tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from weightsync.kernels.columns import (
    COLUMNS,
    COUNTS,
    DST_OFFSET,
    DST_REGION,
    DST_STRIDE,
    ELEMENTS,
    LOOP_COLUMNS,
    LOOPS,
    RUN_BYTES,
    SRC_OFFSET,
    SRC_REGION,
    SRC_STRIDE,
    UNSEEN,
)
from weightsync.kernels.errors import KernelTableError

Table = npt.NDArray[np.int64]

MAX_LOGICAL_BYTES: Final = 1 << 44
"""Of one logical tensor; the digest numbers its 8 KiB tiles in 32 bits. The largest known are under 2**35."""


SHIFT_UNIT: Final = 16
"""Of a copy's shift: what is aligned to it stays so."""


@dataclass(frozen=True, slots=True)
class Sheets:
    """Runs grouped by their innermost loop: ``count`` runs of ``run`` bytes, ``src_step`` and ``dst_step`` apart.

    All arrays are int64[n]; ``row`` is the table row each sheet came from.
    """

    row: Table
    run: Table
    src: Table
    dst: Table
    count: Table
    src_step: Table
    dst_step: Table

    def __len__(self) -> int:
        return len(self.row)

    def take(self, index: npt.NDArray[np.bool_] | Table) -> "Sheets":
        """The sheets selected by a mask or by indices."""
        return Sheets(
            self.row[index],
            self.run[index],
            self.src[index],
            self.dst[index],
            self.count[index],
            self.src_step[index],
            self.dst_step[index],
        )

    def unrolled(self) -> "Sheets":
        """The same runs, one per sheet."""
        which, position = _ragged(self.count)
        one = np.ones(len(which), np.int64)
        return Sheets(
            self.row[which],
            self.run[which],
            self.src[which] + position * self.src_step[which],
            self.dst[which] + position * self.dst_step[which],
            one,
            0 * one,
            0 * one,
        )

    def at_most(self, runs: Table) -> "Sheets":
        """The same runs, sheet ``i`` split into sheets of at most ``runs[i]`` runs."""
        which, position = _ragged(-(-self.count // runs))
        first = position * runs[which]
        return Sheets(
            self.row[which],
            self.run[which],
            self.src[which] + first * self.src_step[which],
            self.dst[which] + first * self.dst_step[which],
            np.minimum(self.count[which] - first, runs[which]),
            self.src_step[which],
            self.dst_step[which],
        )

    def part(self, skip: Table, length: Table) -> "Sheets":
        """Of each run, the ``length`` bytes after the first ``skip``; sheets with no such bytes are left out."""
        some = length > 0
        return Sheets(
            self.row[some],
            length[some],
            (self.src + skip)[some],
            (self.dst + skip)[some],
            self.count[some],
            self.src_step[some],
            self.dst_step[some],
        )

    def folded(self, unit: int) -> "Sheets":
        """Single runs whose length is a multiple of ``unit``, as sheets of runs of ``unit`` bytes."""
        step = np.full(len(self), unit, np.int64)
        return Sheets(self.row, step, self.src, self.dst, self.run // unit, step, step)


def concatenate(parts: Sequence[Sheets]) -> Sheets:
    """All sheets of ``parts``."""
    names = ("row", "run", "src", "dst", "count", "src_step", "dst_step")
    return Sheets(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _ragged(counts: Table) -> tuple[Table, Table]:
    """For ``counts`` items in each of n places: the place of every item, and its position within the place."""
    which = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    starts = np.cumsum(counts) - counts
    return which, np.arange(len(which), dtype=np.int64) - np.repeat(starts, counts)


def as_table(table: npt.ArrayLike) -> Table:
    """``table`` as int64[n, COLUMNS].

    Raises:
        KernelTableError: another shape or type, or anything negative but a key (destination region).
    """
    array = np.asarray(table)
    if array.size == 0:
        return np.zeros((0, COLUMNS), np.int64)
    if array.ndim != 2 or array.shape[1] != COLUMNS or array.dtype != np.int64:
        raise KernelTableError(f"a strided table is int64[n, {COLUMNS}]; this is {array.dtype}{list(array.shape)}")
    bad = (np.delete(array, DST_REGION, axis=1) < 0).any(axis=1)
    if bad.any():
        raise KernelTableError(
            f"row {int(np.argmax(bad))} of the strided table has a negative length, offset, count or stride"
        )
    return array


def as_codes(codes: npt.ArrayLike, table: Table) -> Table:
    """``codes`` of the elements of each row of ``table``, as int64[n].

    Raises:
        KernelTableError: another shape or type, a code that there is not, or a row that cuts an element.
    """
    array = np.asarray(codes)
    if array.shape != (len(table),) or array.dtype != np.int64:
        raise KernelTableError(f"codes of {len(table)} rows are int64[{len(table)}]: {array.dtype}{list(array.shape)}")
    wrong = (array < UNSEEN) | (array > len(ELEMENTS))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise KernelTableError(
            f"row {row} has elements of code {int(array[row])}; there are {UNSEEN} to {len(ELEMENTS)}"
        )
    size = np.array([1, *(element.itemsize for element in ELEMENTS.values())], np.int64)[array]
    places = table[:, [RUN_BYTES, DST_OFFSET, *(column + DST_STRIDE for column in COUNTS)]]
    cut = (places % size[:, None] != 0).any(axis=1) & _used(table)
    if cut.any():
        row = int(np.argmax(cut))
        raise KernelTableError(f"row {row} cuts elements of {int(size[row])} bytes")
    return array


def check_bounds(table: Table, lengths: Sequence[int], *, destination: bool) -> None:
    """That every run lies inside its region; ``lengths`` are the regions' bytes, ``destination`` chooses the side.

    Raises:
        KernelTableError: names the first row that does not.
    """
    side = "destination" if destination else "source"
    region = table[:, DST_REGION if destination else SRC_REGION]
    used = _used(table)
    wrong = used & ((region < 0) | (region >= len(lengths)))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise KernelTableError(f"row {row} names {side} region {int(region[row])}; there are {len(lengths)}")
    if not used.any():
        return
    end = _end(table, destination=destination)
    # Rows without bytes may name any region.
    sizes = np.asarray(lengths, np.int64)[np.where(used, region, 0)]
    wrong = used & (end > sizes)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise KernelTableError(
            f"row {row} reaches byte {int(end[row])} of {side} region {int(region[row])}, which has {int(sizes[row])}"
        )


def slack(table: Table, lengths: Sequence[int]) -> int:
    """Bytes by which every destination of a checked table may lie further on; ``lengths`` are the regions' bytes."""
    used = _used(table)
    sizes = np.asarray([0, *lengths], np.int64)[1 + table[used, DST_REGION]]
    return int((sizes - _end(table, destination=True)[used]).min(initial=MAX_LOGICAL_BYTES))


def check_shift(shift: int, room: int) -> None:
    """That destinations may lie ``shift`` bytes further on.

    Raises:
        KernelTableError: that is no multiple of 16, or more than the ``room``.
    """
    if shift % SHIFT_UNIT or not 0 <= shift <= room:
        raise KernelTableError(f"a shift of {shift} bytes is no multiple of {SHIFT_UNIT} up to {room}")


def check_logical(table: Table) -> None:
    """That every logical offset is below ``MAX_LOGICAL_BYTES``.

    Raises:
        KernelTableError: names the first row that reaches further.
    """
    wrong = _used(table) & (_end(table, destination=True) > MAX_LOGICAL_BYTES)
    if wrong.any():
        raise KernelTableError(
            f"row {int(np.argmax(wrong))} reaches past {MAX_LOGICAL_BYTES} bytes of its logical tensor"
        )


def _used(table: Table) -> npt.NDArray[np.bool_]:
    """Which rows name any bytes."""
    return np.asarray((table[:, [RUN_BYTES, *COUNTS]] > 0).all(axis=1))


def _end(table: Table, *, destination: bool) -> Table:
    """The byte after the last one that each row reaches."""
    end = table[:, DST_OFFSET if destination else SRC_OFFSET] + table[:, RUN_BYTES]
    stride = DST_STRIDE if destination else SRC_STRIDE
    for column in COUNTS:
        np.add(end, np.maximum(table[:, column] - 1, 0) * table[:, column + stride], out=end)
    return np.asarray(end, np.int64)


def canonical(table: Table) -> Table:
    """The same runs in fewer, longer ones: adjacent runs merge, chained loops merge, the longest loop goes last.

    Empty rows keep their place with zero counts, so that row numbers stay those of the caller.
    """
    out = table.copy()
    run = out[:, RUN_BYTES]
    empty = ~_used(table)
    for _ in range(LOOPS):  # a merged run may now continue along another loop
        for column in COUNTS:
            joins = (out[:, column] > 1) & (out[:, column + SRC_STRIDE] == run) & (out[:, column + DST_STRIDE] == run)
            run[joins] *= out[joins, column]
            out[joins, column] = 1
    for inner in COUNTS:
        for outer in COUNTS:
            if inner != outer:
                _chain(out, inner, outer)
    # The longest loop last: it stays one sheet, while the outer two are written out row by row.
    order = np.argsort(out[:, list(COUNTS)], axis=1, kind="stable")
    loops = out[:, COUNTS[0] :].reshape(-1, LOOPS, LOOP_COLUMNS)
    out[:, COUNTS[0] :] = np.take_along_axis(loops, order[:, :, None], axis=1).reshape(-1, LOOPS * LOOP_COLUMNS)
    out[empty, COUNTS[0] :] = 0
    return out


def _chain(table: Table, inner: int, outer: int) -> None:
    """Merge loop ``outer`` into ``inner`` (columns of their counts) where it only continues it, in place."""
    count = table[:, inner]
    joins = (count > 1) & (table[:, outer] > 1)
    for side in (SRC_STRIDE, DST_STRIDE):
        joins &= table[:, outer + side] == count * table[:, inner + side]
    table[joins, inner] *= table[joins, outer]
    table[joins, outer] = 1


def sheets(table: Table) -> Sheets:
    """The table's non-empty runs as sheets; the innermost loop is kept, the outer two are written out."""
    outer = table[:, COUNTS[0]] * table[:, COUNTS[1]] * _used(table)
    which, position = _ragged(outer)
    rows = table[which]
    second = position % np.maximum(rows[:, COUNTS[1]], 1)
    first = position // np.maximum(rows[:, COUNTS[1]], 1)
    src = rows[:, SRC_OFFSET] + first * rows[:, COUNTS[0] + SRC_STRIDE] + second * rows[:, COUNTS[1] + SRC_STRIDE]
    dst = rows[:, DST_OFFSET] + first * rows[:, COUNTS[0] + DST_STRIDE] + second * rows[:, COUNTS[1] + DST_STRIDE]
    return Sheets(
        which,
        rows[:, RUN_BYTES],
        src,
        dst,
        rows[:, COUNTS[2]],
        rows[:, COUNTS[2] + SRC_STRIDE],
        rows[:, COUNTS[2] + DST_STRIDE],
    )


def check_regions(regions: Sequence[torch.Tensor], what: str) -> None:
    """That every region is a contiguous one-dimensional uint8 tensor.

    Raises:
        KernelTableError: names the first that is not.
    """
    for index, region in enumerate(regions):
        if region.dtype != torch.uint8 or region.dim() != 1 or not region.is_contiguous():
            raise KernelTableError(
                f"{what} region {index} must be a contiguous uint8[n]; it is {region.dtype}{list(region.shape)}"
            )
