"""Order-sensitive digest of weights: two 64-bit sums over logical bytes, additive over disjoint boxes.

What is computed, and the probability that it misses a fault (below 2**-58), is in
:mod:`weightsync.kernels.digest_multipliers`.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy.typing as npt
import torch
from weightsync.kernels.digest_multipliers import tensor_key
from weightsync.kernels.digest_reference import ReferenceDigest
from weightsync.kernels.dispatch import common_device, use_triton
from weightsync.kernels.strided import as_table, check_bounds, check_logical, check_regions

__all__ = ["PreparedDigest", "digest", "prepare", "tensor_key"]


class PreparedDigest(Protocol):
    """A digest whose table is already where it is needed. The regions are read anew each time."""

    def launch(self) -> None:
        """Start on the current stream; returns at once."""

    def result(self) -> tuple[int, int]:
        """The two sums of the last launch, each in ``range(2**64)``; waits for the device."""

    def __call__(self) -> tuple[int, int]:
        """``launch`` and ``result``."""


def prepare(regions: Sequence[torch.Tensor], table: npt.ArrayLike) -> PreparedDigest:
    """A digest over the runs of ``table``, ready to be taken many times.

    Args:
        regions: contiguous uint8[n] tensors, all on one device; their addresses are kept, so they must stay.
        table: int64[n, COLUMNS] (:mod:`weightsync.kernels.columns`); the destination columns are logical.

    Raises:
        KernelTableError: a row reaches outside its region or past ``MAX_LOGICAL_BYTES`` of its tensor.
        KernelUnavailableError: the regions are on CUDA and Triton is missing.
    """
    rows = as_table(table)
    check_regions(regions, "digest")
    check_bounds(rows, [region.numel() for region in regions], destination=False)
    check_logical(rows)
    device = common_device(list(regions))
    if use_triton(device):
        from weightsync.kernels.digest_triton import TritonDigest

        return TritonDigest(regions, rows)
    return ReferenceDigest(regions, rows)


def digest(regions: Sequence[torch.Tensor], table: npt.ArrayLike) -> tuple[int, int]:
    """The two sums over the runs of ``table``, once. See :func:`prepare`."""
    return prepare(regions, table)()
