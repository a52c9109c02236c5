"""Strided copies on the CPU: a whole table in a few NumPy and torch calls."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from weightsync.kernels.columns import (
    COUNTS,
    DST_OFFSET,
    DST_REGION,
    DST_STRIDE,
    RUN_BYTES,
    SRC_OFFSET,
    SRC_REGION,
    SRC_STRIDE,
)
from weightsync.kernels.strided import (
    Table,
    canonical,
    check_shift,
    sheets,
)

LARGE_BYTES: Final = 64 * 1024
"""Rows from this size on get a copy of their own; smaller ones are gathered by length."""


@dataclass(frozen=True, slots=True)
class _RunGroup:
    """Runs of one length between one pair of regions."""

    src_region: int
    dst_region: int
    length: int
    src: Table
    dst: Table


class ReferenceCopy:
    """A copy prepared once and made many times."""

    def __init__(
        self, sources: Sequence[torch.Tensor], destinations: Sequence[torch.Tensor], table: Table, room: int
    ) -> None:
        """Regions are uint8[n] on the CPU; ``table`` is int64[n, COLUMNS], checked by the caller; ``room``: bytes by
        which a copy may be shifted."""
        self._room = room
        self._sources, self._destinations = list(sources), list(destinations)
        rows = canonical(table)
        size = rows[:, RUN_BYTES] * np.prod(rows[:, list(COUNTS)], axis=1)
        self._large = rows[size >= LARGE_BYTES]
        small = rows[(size > 0) & (size < LARGE_BYTES)]
        runs = sheets(small).unrolled()
        pair = small[runs.row][:, [SRC_REGION, DST_REGION]]
        order = np.lexsort((runs.src, runs.run, pair[:, 1], pair[:, 0]))
        signature = np.column_stack([pair, runs.run])[order]
        breaks = np.flatnonzero((signature[1:] != signature[:-1]).any(axis=1)) + 1
        self._groups = [
            _RunGroup(
                int(pair[part[0], 0]), int(pair[part[0], 1]), int(runs.run[part[0]]), runs.src[part], runs.dst[part]
            )
            for part in np.split(order, breaks)
            if len(part)
        ]

    def __call__(self, shift: int = 0) -> None:
        """Copy every run. Runs of one table must not overlap in the destination."""
        check_shift(shift, self._room)
        for row in self._large:
            _copy_row(self._sources[int(row[SRC_REGION])], self._destinations[int(row[DST_REGION])][shift:], row)
        for group in self._groups:
            source = self._sources[group.src_region].numpy()
            destination = self._destinations[group.dst_region].numpy()[shift:]
            # Every offset as the beginning of a window of one run's length: one index then moves all runs at once.
            windows = (len(source) - group.length + 1, group.length)
            gathered = np.lib.stride_tricks.as_strided(source, windows, (1, 1))[group.src]
            windows = (len(destination) - group.length + 1, group.length)
            np.lib.stride_tricks.as_strided(destination, windows, (1, 1))[group.dst] = gathered


def _copy_row(source: torch.Tensor, destination: torch.Tensor, row: Table) -> None:
    """One row with all its loops as one strided copy."""
    shape = [*(int(row[column]) for column in COUNTS), int(row[RUN_BYTES])]
    src = source.as_strided(
        shape,
        [*(int(row[column + SRC_STRIDE]) for column in COUNTS), 1],
        source.storage_offset() + int(row[SRC_OFFSET]),
    )
    dst = destination.as_strided(
        shape,
        [*(int(row[column + DST_STRIDE]) for column in COUNTS), 1],
        destination.storage_offset() + int(row[DST_OFFSET]),
    )
    dst.copy_(src)
