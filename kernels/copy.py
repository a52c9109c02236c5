"""Strided copy: pack, scatter, and shadow → live, all runs of a table in one launch."""

from collections.abc import Sequence
from typing import Protocol

import numpy.typing as npt
import torch
from weightsync.kernels.copy_reference import ReferenceCopy
from weightsync.kernels.dispatch import Beside, common_device, use_triton
from weightsync.kernels.strided import as_table, check_bounds, check_regions, slack

__all__ = ["PreparedCopy", "prepare", "strided_copy"]


class PreparedCopy(Protocol):
    """A copy whose table is already where it is needed."""

    def __call__(self, shift: int = 0) -> None:
        """Copy every run, on the current stream; returns at once on CUDA.

        Args:
            shift: bytes by which every destination lies further on, a multiple of 16.

        Raises:
            KernelTableError: so shifted a row reaches outside its region.
        """


def prepare(
    sources: Sequence[torch.Tensor],
    destinations: Sequence[torch.Tensor],
    table: npt.ArrayLike,
    *,
    beside: Beside | None = None,
) -> PreparedCopy:
    """The copies of ``table``, ready to be made many times.

    Args:
        sources: contiguous uint8[n] tensors; their addresses are kept, so they must stay.
        destinations: likewise, on the same device. Runs of one table must not overlap here.
        table: int64[n, COLUMNS] (:mod:`weightsync.kernels.columns`).
        beside: what it must not hold up, see :func:`weightsync.kernels.dispatch.programs_beside`; None: nothing.

    Raises:
        KernelTableError: a row reaches outside its regions.
        KernelUnavailableError: the regions are on CUDA and Triton is missing.
    """
    rows = as_table(table)
    check_regions(sources, "source")
    check_regions(destinations, "destination")
    check_bounds(rows, [region.numel() for region in sources], destination=False)
    check_bounds(rows, [region.numel() for region in destinations], destination=True)
    device = common_device([*sources, *destinations])
    room = slack(rows, [region.numel() for region in destinations])
    if use_triton(device):
        from weightsync.kernels.copy_triton import TritonCopy

        return TritonCopy(sources, destinations, rows, room, beside)
    return ReferenceCopy(sources, destinations, rows, room)


def strided_copy(sources: Sequence[torch.Tensor], destinations: Sequence[torch.Tensor], table: npt.ArrayLike) -> None:
    """Copy every run of ``table`` from ``sources`` to ``destinations``, once. See :func:`prepare`."""
    prepare(sources, destinations, table)()
