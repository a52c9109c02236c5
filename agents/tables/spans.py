"""Which memory a kernel table reads, as sorted spans, to tell what of it has been looked at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt
from weightsync.agents.tables.boxes import Column, unroll
from weightsync.kernels.columns import COUNTS, RUN_BYTES, SRC_OFFSET, SRC_REGION, SRC_STRIDE
from weightsync.orchestrator.protocol.layout import Matrix

REGION_BITS: Final = 44
"""A region's number stands above this many bits of an offset, so that one number orders all memory; as many as the
kernels allow a tensor (``kernels.strided.MAX_LOGICAL_BYTES``)."""


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """Disjoint ranges of memory, sorted, none of which continues another. Each place is its region's number times
    ``2**REGION_BITS`` plus its byte there; ``ends`` are those after the last byte. int64[n]."""

    starts: Column
    ends: Column

    @classmethod
    def of(cls, table: Matrix) -> Self:
        """What the rows of a kernel table (:mod:`weightsync.kernels.columns`) read."""
        rows = table[(table[:, [RUN_BYTES, *COUNTS]] > 0).all(axis=1)].copy()
        run = rows[:, RUN_BYTES]
        for column in reversed(COUNTS):  # a loop that steps by the run continues it
            joins = rows[:, column + SRC_STRIDE] == run
            run[joins] *= rows[joins, column]
            rows[joins, column] = 1
        owner, steps = unroll(rows[:, list(COUNTS)])
        strides = rows[:, [column + SRC_STRIDE for column in COUNTS]]
        first = (rows[:, SRC_REGION] << REGION_BITS) + rows[:, SRC_OFFSET]
        starts = first[owner] + (steps * strides[owner]).sum(axis=1)
        return cls._sorted(starts, starts + run[owner])

    @classmethod
    def union(cls, parts: Sequence["Spans"]) -> Self:
        """What lies in any of them."""
        none = np.empty(0, np.int64)
        starts, ends = ([none, *(getattr(part, side) for part in parts)] for side in ("starts", "ends"))
        return cls._sorted(np.concatenate(starts), np.concatenate(ends))

    @classmethod
    def _sorted(cls, starts: Column, ends: Column) -> Self:
        order = np.argsort(starts, kind="stable")  # mostly sorted as it is
        starts, ends = starts[order], np.maximum.accumulate(ends[order])
        begins = np.flatnonzero(np.append(True, starts[1:] > ends[:-1])[: len(starts)])
        lasts = np.append(begins[1:], len(starts))[: len(begins)] - 1
        return cls(starts[begins], ends[lasts])

    def hold(self, region: int, offsets: Column, sizes: Column) -> npt.NDArray[np.bool_]:
        """Which ranges of ``region``, each of ``sizes`` bytes from byte ``offsets`` on, are all in them."""
        starts = (region << REGION_BITS) + offsets
        # The last span that begins at the range's first byte or before it; one more in front, which holds nothing.
        place = np.searchsorted(self.starts, starts, side="right")
        return np.asarray(np.concatenate((np.full(1, -1), self.ends))[place] >= starts + sizes)


NOWHERE: Final = Spans.union([])
"""No memory at all."""
