"""Some bytes of every page of weights that are there twice: they tell at once which of the two sets is served."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from weightsync.agents.tables.spans import REGION_BITS, Spans
from weightsync.kernels.columns import (
    COLUMNS,
    COUNTS,
    DST_OFFSET,
    DST_REGION,
    DST_STRIDE,
    RUN_BYTES,
    SRC_OFFSET,
    SRC_REGION,
    SRC_STRIDE,
)
from weightsync.kernels.digest import prepare
from weightsync.orchestrator.protocol.layout import Matrix
from weightsync.orchestrator.protocol.names import NO_BYTES

SAMPLE_BYTES: Final = 256
PAGE_BITS: Final = 21
"""2 MiB: the pages of a GPU's memory, and what lies between two samples. Of 15 GB, 2 MB are read."""


class Samples:
    """Of both sets, taken by digests. ``take`` and ``agree`` wait for the device.

    Args:
        live: what is served, at its addresses: uint8 tensors, the regions that ``table`` names.
        standby: the same of the other set, at its own.
        table: of the bytes that rounds write, as the digest of the weights reads them; others may change at any time.
    """

    def __init__(self, live: Sequence[torch.Tensor], standby: Sequence[torch.Tensor], table: Matrix) -> None:
        samples = sample_table(table)
        self._live, self._standby = prepare(live, samples), prepare(standby, samples)
        self._of_live = self._of_standby = NO_BYTES

    def take(self) -> None:
        """Each set is what it is now."""
        self._live.launch()
        self._standby.launch()
        self._of_live, self._of_standby = self._live.result(), self._standby.result()

    def exchange(self) -> None:
        """What was standby is to be served, and what was served is to be standby."""
        self._of_live, self._of_standby = self._of_standby, self._of_live

    def agree(self) -> bool:
        """Whether what is served is what is to be."""
        return self._live() == self._of_live


def sample_table(table: Matrix) -> Matrix:
    """Of what the kernel table ``table`` reads: the first SAMPLE_BYTES in each page, if they lie in one piece; a kernel
    table too, int64 ``[n, COLUMNS]``."""
    spans = Spans.of(table)
    sizes, pages = spans.ends - spans.starts, spans.starts >> PAGE_BITS
    first = np.append(True, pages[1:] != pages[:-1])[: len(pages)] | (sizes >> PAGE_BITS > 0)
    starts, sizes = spans.starts[first], sizes[first]
    samples = np.zeros((len(starts), COLUMNS), dtype=np.int64)
    samples[:, RUN_BYTES] = np.minimum(sizes, SAMPLE_BYTES)
    samples[:, [SRC_REGION, DST_REGION]] = (starts >> REGION_BITS)[:, None]
    samples[:, [SRC_OFFSET, DST_OFFSET]] = (starts & ((1 << REGION_BITS) - 1))[:, None]
    samples[:, list(COUNTS)] = 1
    pieces = COUNTS[-1]
    samples[:, pieces] = np.maximum(0, sizes - SAMPLE_BYTES) >> PAGE_BITS
    samples[:, pieces] += 1
    several = samples[:, pieces] > 1
    samples[several, pieces + SRC_STRIDE] = samples[several, pieces + DST_STRIDE] = 1 << PAGE_BITS
    return samples
