"""Boxes in two memories as loops around a contiguous run, for whole tables at once."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from weightsync.orchestrator.protocol.layout import Matrix
from weightsync.orchestrator.protocol.limits import MAX_RANK

Column = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Boxes:
    """``n`` boxes in two memories: one region and byte offset a side, and per dimension extent and byte strides."""

    source_region: Column
    source_offset: Column
    source_stride: Matrix
    target_region: Column
    target_offset: Column
    target_stride: Matrix
    extent: Matrix
    itemsize: Column

    def take(self, index: Column) -> "Boxes":
        return Boxes(*(getattr(self, name)[index] for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class Loops:
    """Boxes as loops: the contiguous run in bytes, and MAX_RANK (count, strides) around it, outermost first.

    Loops that do not loop are (1, 0, 0) and come first.
    """

    run: Column
    count: Matrix
    source_stride: Matrix
    target_stride: Matrix


def loops_of(boxes: Boxes) -> Loops:
    """Fold each dimension into the run, or into the loop inside it, where both memories continue there."""
    size = len(boxes.extent)
    run = boxes.itemsize.copy()
    count = np.ones((size, MAX_RANK), dtype=np.int64)
    source, target = np.zeros_like(count), np.zeros_like(count)
    slot = np.full(size, MAX_RANK, dtype=np.int64)
    every = np.arange(size)
    for dim in range(MAX_RANK - 1, -1, -1):
        extent, step, jump = boxes.extent[:, dim], boxes.source_stride[:, dim], boxes.target_stride[:, dim]
        loops = extent != 1  # a dimension of one element never moves, whatever its stride
        flat = loops & (slot == MAX_RANK) & (step == run) & (jump == run)
        run = np.where(flat, run * extent, run)
        # The loop opened last; where none is open the index is any valid one, and ``folds`` masks the answer.
        inner = np.minimum(slot, MAX_RANK - 1)
        continues = (step == count[every, inner] * source[every, inner]) & (
            jump == count[every, inner] * target[every, inner]
        )
        folds = loops & ~flat & (slot < MAX_RANK) & continues
        count[every[folds], inner[folds]] *= extent[folds]
        opens = loops & ~flat & ~folds
        slot = np.where(opens, slot - 1, slot)
        place = (every[opens], slot[opens])
        count[place], source[place], target[place] = extent[opens], step[opens], jump[opens]
    return Loops(run, count, source, target)


def solid(boxes: Boxes) -> Boxes:
    """Without boxes that hold no element."""
    return boxes.take(np.flatnonzero((boxes.extent > 0).all(axis=1)))


def unroll(counts: Matrix) -> tuple[Column, Matrix]:
    """Every iteration of every row's loops: the row's index, and the iteration number per loop."""
    totals = counts.prod(axis=1)
    owner = np.repeat(np.arange(len(counts)), totals)
    rest = np.arange(len(owner)) - np.repeat(np.cumsum(totals) - totals, totals)
    steps = np.empty((len(owner), counts.shape[1]), dtype=np.int64)
    for dim in range(counts.shape[1] - 1, -1, -1):
        rest, steps[:, dim] = np.divmod(rest, counts[owner, dim])
    return owner, steps
