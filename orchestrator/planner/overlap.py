"""Refuse layouts in which two elements share a byte: such memory cannot be written exactly once.

First each form by itself (do its strides fold it onto itself?), then the rows of a layout against each other by their
spans from first to last byte. Only where spans overlap, as those of column-wise slices of one matrix do, are rows
compared run by run.
"""

from typing import Final

import numpy as np
from weightsync.orchestrator.planner.arrays import Flags, Ints, expand, starts
from weightsync.orchestrator.planner.decode import Decoded, FormTable
from weightsync.orchestrator.planner.errors import LayoutError, TooComplex
from weightsync.orchestrator.protocol.layout import ROW_TENSOR
from weightsync.orchestrator.protocol.limits import MAX_RANK

MAX_INTERLEAVED_RUNS: Final = 1 << 24
"""Contiguous pieces of one target's rows whose spans interleave; they are compared one by one (16 bytes each)."""


def check_overlap(member: Decoded, forms: FormTable) -> None:
    """Check the rows of one layout.

    Raises:
        LayoutError: two rows, or two elements of one row, share a byte.
        TooComplex: more interleaved pieces than MAX_INTERLEAVED_RUNS.
    """
    rows = member.rows
    used = np.flatnonzero(np.bincount(rows.form, minlength=1))
    folded = used[_folds(forms.extent[used], forms.stride[used], forms.itemsize[used])]
    if len(folded):
        _refuse(member, int(np.argmax(rows.form == folded[0])), "has elements that share memory")
    # Regions are laid end to end, which makes one line of addresses of all of them.
    base = starts(np.array([r.length for r in member.party.layout.regions], np.int64))
    address = base[rows.region] + rows.offset
    order = np.argsort(address, kind="stable")
    order = order[forms.elements[rows.form[order]] > 0]
    # How far any row so far reaches. A row that begins before that meets an earlier one.
    reach = np.maximum.accumulate((address + forms.span[rows.form])[order])
    meets = np.concatenate([[False], address[order][1:] < reach[:-1]])
    if meets.any():
        # Its predecessor belongs to the cluster, too; two clusters in one go are compared as well as one.
        meets |= np.concatenate([meets[1:], [False]])
        _check_interleaved(member, order[meets[: len(order)]], address, forms)


def _folds(extent: Ints, stride: Ints, itemsize: Ints) -> Flags:
    """Which forms ``[n]`` may have two elements on one byte: each stride must step over all that smaller ones reach.

    ``extent`` and ``stride`` (bytes) are ``[n, MAX_RANK]``. Strict: strides that interleave without a clash are
    refused, too.
    """
    stride = np.where(extent > 1, stride, 0)
    order = np.argsort(stride, axis=1, kind="stable")
    stride = np.take_along_axis(stride, order, axis=1)
    extent = np.take_along_axis(extent, order, axis=1)
    reach = itemsize.copy()
    folds = np.zeros(len(extent), np.bool_)
    for dim in range(MAX_RANK):
        moves = extent[:, dim] > 1
        folds |= moves & (stride[:, dim] < reach)
        reach = reach + np.where(moves, (extent[:, dim] - 1) * stride[:, dim], 0)
    return folds


def _check_interleaved(member: Decoded, cluster: Ints, address: Ints, forms: FormTable) -> None:
    """Compare the contiguous runs of the rows ``cluster``, whose spans overlap, by sorting all of them by address."""
    form = member.rows.form[cluster]
    extent, stride, item = forms.extent[form], forms.stride[form], forms.itemsize[form]
    joined = (stride[:, -1] == item) | (extent[:, -1] == 1)
    length = np.where(joined, item * extent[:, -1], item)
    outer = extent.copy()
    outer[:, -1] = np.where(joined, 1, extent[:, -1])
    count = outer.prod(axis=1)
    if count.sum() > MAX_INTERLEAVED_RUNS:
        who = member.party.member
        raise TooComplex(f"{who}: {int(count.sum())} interleaved pieces; limit {MAX_INTERLEAVED_RUNS}", who)
    row, rest = expand(count)
    # Count through the outer dimensions like an odometer, innermost first: the address of each run.
    place = address[cluster][row]
    for dim in range(MAX_RANK - 1, -1, -1):
        place += rest % outer[row, dim] * stride[row, dim]
        rest = rest // outer[row, dim]
    by_place = np.argsort(place, kind="stable")
    end = place[by_place] + length[row[by_place]]
    clash = np.flatnonzero(place[by_place][1:] < end[:-1])
    if len(clash):
        first, second = cluster[row[by_place[clash[0] : clash[0] + 2]]].tolist()
        other = member.party.layout.tensors[_tensor_of(member, first)].name
        _refuse(member, second, f"shares memory with tensor {other!r}")


def _tensor_of(member: Decoded, row: int) -> int:
    return int(member.party.layout.matrix()[row, ROW_TENSOR])


def _refuse(member: Decoded, row: int, why: str) -> None:
    raise LayoutError(member.party.member, why, member.party.layout.tensors[_tensor_of(member, row)].name)
