"""A model's weights in pages: where the next version lands, and how it becomes what is served.

Bytes of the pages that no round writes (padding, what a loader leaves out) are the engine's own: they are carried from
the served set to the other one in front of each flip.
"""

from collections.abc import Sequence

import numpy as np
import torch
from weightsync.agents.memory.pages.paged import Pages
from weightsync.agents.tables.runs import digest_table
from weightsync.agents.tables.spans import REGION_BITS, Spans
from weightsync.kernels.columns import COLUMNS, COUNTS, DST_OFFSET, DST_REGION, RUN_BYTES, SRC_OFFSET, SRC_REGION
from weightsync.kernels.copy import prepare
from weightsync.orchestrator.protocol.layout import Layout, Matrix


class StandbyPages:
    """The standby set of the regions of one layout.

    Args:
        pages: hold all of ``tensors``.
        tensors: the served memory of the layout's regions: uint8, in their order.

    Attributes:
        tensors: the same of the standby set, at addresses that stay.
        carried_bytes: that no round writes.

    Raises:
        PagesUnavailable: a region does not lie in pages.
    """

    def __init__(self, pages: Pages, layout: Layout, tensors: Sequence[torch.Tensor]) -> None:
        self._pages = pages
        self.tensors = pages.standby_of(tensors)
        table = unwritten(layout)
        self.carried_bytes = int(table[:, RUN_BYTES].sum())
        self._carry = prepare(tuple(tensors), self.tensors, table) if len(table) else None

    def flip(self) -> None:
        """The standby set is served, and the other one is standby when ``settle`` was called; again: back. What is
        derived is to be refreshed then.

        Raises:
            FlipFailed: not flipped; what is served is as it was.
            PagesTorn: served addresses have no memory.
        """
        self.settle()
        if self._carry is not None:
            self._carry()
        self._pages.flip()

    def settle(self) -> None:
        """After a flip, before anything uses ``tensors``.

        Raises:
            StandbyLost: they have no memory; what is served is whole.
        """
        self._pages.settle()


def unwritten(layout: Layout) -> Matrix:
    """What no row of ``layout`` covers, as a kernel table from each region to itself: int64 ``[m, COLUMNS]``."""
    spans = Spans.of(digest_table(layout.matrix(), layout))
    begins = np.arange(len(layout.regions), dtype=np.int64) << REGION_BITS
    ends = begins + np.array([region.length for region in layout.regions], dtype=np.int64)
    # A gap begins where a region or a run of bytes does not go on, and ends where the next run or the region's end is.
    starts = np.sort(np.concatenate([begins, spans.ends]))
    stops = np.sort(np.concatenate([spans.starts, ends]))
    gaps = starts < stops
    table = np.zeros((int(gaps.sum()), COLUMNS), dtype=np.int64)
    table[:, RUN_BYTES] = (stops - starts)[gaps]
    table[:, [SRC_REGION, DST_REGION]] = (starts[gaps] >> REGION_BITS)[:, None]
    table[:, [SRC_OFFSET, DST_OFFSET]] = (starts[gaps] & ((1 << REGION_BITS) - 1))[:, None]
    table[:, list(COUNTS)] = 1
    return table
