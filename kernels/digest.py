"""Order-sensitive digest of weights: two 64-bit sums over logical bytes, additive over disjoint boxes.

Because it reads every byte, a digest also says whether all that it read are finite numbers. What is computed, and the
probability that it misses a fault (below 2**-58), is in :mod:`weightsync.kernels.digest_multipliers`.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from weightsync.kernels.columns import UNSEEN
from weightsync.kernels.digest_multipliers import tensor_key
from weightsync.kernels.digest_reference import ReferenceDigest
from weightsync.kernels.dispatch import Beside, common_device, use_triton
from weightsync.kernels.strided import as_codes, as_table, check_bounds, check_logical, check_regions

__all__ = ["PreparedDigest", "digest", "prepare", "tensor_key"]


class PreparedDigest(Protocol):
    """A digest whose table is already where it is needed. The regions are read anew each time.

    Attributes:
        parts: that it can be launched in, each of about a gigabyte: for who leaves the device to others in between.
    """

    @property
    def parts(self) -> int: ...

    def launch(self, part: int | None = None) -> None:
        """Start on the current stream; returns at once.

        Args:
            part: of ``range(parts)``, all of which are launched in their order, instead of everything.
        """

    def wait(self) -> None:
        """Until what was launched is done."""

    def result(self) -> tuple[int, int]:
        """The two sums of what was launched, each in ``range(2**64)``; waits for the device."""

    def finite(self) -> bool:
        """After ``result``: whether all that was looked at are finite numbers."""

    def __call__(self) -> tuple[int, int]:
        """``launch`` and ``result``."""


def prepare(
    regions: Sequence[torch.Tensor],
    table: npt.ArrayLike,
    codes: npt.ArrayLike | None = None,
    *,
    beside: Beside | None = None,
) -> PreparedDigest:
    """A digest over the runs of ``table``, ready to be taken many times.

    Args:
        regions: contiguous uint8[n] tensors, all on one device; their addresses are kept, so they must stay.
        table: int64[n, COLUMNS] (:mod:`weightsync.kernels.columns`); the destination columns are logical.
        codes: int64[n] of ``columns.CODES``, what the elements of each row are; None: none is looked at.
        beside: what it must not hold up, see :func:`weightsync.kernels.dispatch.programs_beside`; None: nothing.

    Raises:
        KernelTableError: a row reaches outside its region or past ``MAX_LOGICAL_BYTES`` of its tensor, or cuts an
            element that is to be looked at.
        KernelUnavailableError: the regions are on CUDA and Triton is missing.
    """
    rows = as_table(table)
    check_regions(regions, "digest")
    check_bounds(rows, [region.numel() for region in regions], destination=False)
    check_logical(rows)
    kinds = as_codes(np.full(len(rows), UNSEEN) if codes is None else codes, rows)
    device = common_device(list(regions))
    if use_triton(device):
        from weightsync.kernels.digest_triton import TritonDigest

        return TritonDigest(regions, rows, kinds, beside)
    return ReferenceDigest(regions, rows, kinds)


def digest(regions: Sequence[torch.Tensor], table: npt.ArrayLike) -> tuple[int, int]:
    """The two sums over the runs of ``table``, once. See :func:`prepare`."""
    return prepare(regions, table)()
