"""The independent check of a plan: every destination byte is written exactly once, with the byte that belongs there.

It reads what the members are told (layouts and tables) and nothing that the planner derived on the way, except the
numbers of the tensors' names. Three parts:

1. *Place and meaning.* Each write's box lies in the box of its own row, and its destination address is where a row of
   the target with the same tensor keeps that box. Packed writes are followed through the target's own scatter table.
2. *Once.* The boxes that arrive at a target row add up to the row's box exactly. Measured with random weights: the
   measure of a box is a product over dimensions of G(high) - G(low) modulo 2^64, where G is a fixed random function.
   Sum of indicators equal to the row's indicator is the only way for the measures to agree, but for a chance of about
   2^-60 per row (Schwartz 1980, Zippel 1979: the difference is a multilinear polynomial in the weights).
3. *Apart.* No two rows of a target share memory, and no two packed runs share staging.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from weightsync.orchestrator.core.plan.arrays import (
    Flags,
    Ids,
    Ints,
    distinct_rows,
    expand,
    extents_of,
    mix,
    offsets_of,
    starts,
    strides_of,
)
from weightsync.orchestrator.core.plan.errors import LayoutError, ProofFailed, TooComplex
from weightsync.orchestrator.core.plan.inputs import Party
from weightsync.orchestrator.protocol.layout import (
    COPY_BOX,
    COPY_PEER,
    COPY_REMOTE,
    COPY_ROW,
    COPY_STAGED,
    ROW_OFFSET,
    ROW_REGION,
    ROW_TENSOR,
)
from weightsync.orchestrator.protocol.limits import MAX_RANK

MAX_INTERLEAVED_RUNS: Final = 1 << 24
"""Contiguous pieces of target rows whose spans interleave; they are compared one by one (16 bytes each)."""

Measure = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Told:
    """What a member is told, and the plan's number of each tensor of its layout."""

    party: Party
    tensor_ids: Ids
    peers: tuple[Party, ...]
    table: Ints


def prove(sources: Sequence[Told], targets: Sequence[Told], itemsize: Ints) -> None:
    """Check a plan.

    Args:
        sources, targets: every member of the plan.
        itemsize: bytes per element by tensor number.

    Raises:
        ProofFailed: a byte is not written, written twice, or written with another's value.
        LayoutError: rows of a target overlap in memory.
        TooComplex: see MAX_INTERLEAVED_RUNS.
    """
    rows = _Targets(targets, itemsize)
    rows.check_apart()
    numbers = {told.party.member: i for i, told in enumerate(targets)}
    arrivals: list[list[Ints]] = [[] for _ in targets]
    for source in sources:
        peers = np.array([numbers[p.member] for p in source.peers], np.int64)
        _check_writes(source, peers, rows, arrivals)
    for number, told in enumerate(targets):
        _check_scatter(number, told, rows, arrivals[number])
    rows.check_once()


class _Targets:
    """All rows of all targets, and what has been found to arrive at them."""

    def __init__(self, targets: Sequence[Told], itemsize: Ints) -> None:
        self.told: Sequence[Told] = targets
        self.itemsize: Ints = itemsize
        matrices = [t.party.layout.matrix() for t in targets]
        counts = np.array([len(m) for m in matrices], np.int64)
        self.first = starts(counts)
        self.matrix: Ints = np.concatenate([np.zeros((0, 3 + 3 * MAX_RANK), np.int64), *matrices])
        self.owner: Ints = np.repeat(np.arange(len(targets)), counts)
        self.tensor: Ids = np.concatenate(
            [np.zeros(0, np.int32), *(t.tensor_ids[m[:, ROW_TENSOR]] for t, m in zip(targets, matrices, strict=True))]
        )
        lengths = [r.length for t in targets for r in t.party.layout.regions]
        if sum(lengths) >= 1 << 62:
            raise TooComplex("the targets' regions add up to more than 2^62 bytes")
        self.region_first = starts(np.array([len(t.party.layout.regions) for t in targets], np.int64))
        self.base = starts(np.array(lengths, np.int64))
        region = self.region_first[self.owner] + self.matrix[:, ROW_REGION]
        self.address = self.base[region] + self.matrix[:, ROW_OFFSET]
        self.order = np.argsort(self.address, kind="stable")
        self.sorted_address = self.address[self.order]
        self.arrived = np.zeros(len(self.matrix), np.uint64)

    def name(self, row: int) -> str:
        tensors = self.told[self.owner[row]].party.layout.tensors
        name: str = tensors[int(self.matrix[row, ROW_TENSOR])].name
        return name

    def find(self, target: Ints, table: Ints, tensor: Ids) -> Ints:
        """The row that each direct write goes to; -1 where none has that tensor at that address."""
        if len(table) == 0 or len(self.order) == 0:
            return np.full(len(table), -1, np.int64)
        region = self.region_first[target] + table[:, COPY_REMOTE]
        address = self.base[np.clip(region, 0, len(self.base) - 1)] + table[:, COPY_REMOTE + 1]
        near = self.order[np.maximum(np.searchsorted(self.sorted_address, address, side="right") - 1, 0)]
        found = np.where(self._keeps(near, target, table, tensor), near, -1)
        lost = np.flatnonzero(found < 0)
        if len(lost):
            found[lost] = self._search(target[lost], table[lost], tensor[lost])
        return found

    def _search(self, target: Ints, table: Ints, tensor: Ids) -> Ints:
        """As ``find``, over all rows of the same target and tensor: rows may interleave in memory."""
        width = len(self.itemsize)
        wanted = target * width + tensor
        key = self.owner * width + self.tensor
        order = np.argsort(key, kind="stable")
        low = np.searchsorted(key[order], wanted, side="left")
        counts = np.searchsorted(key[order], wanted, side="right") - low
        write, nth = expand(counts)
        row = order[low[write] + nth]
        good = self._keeps(row, target[write], table[write], tensor[write])
        found = np.full(len(table), -1, np.int64)
        found[write[good]] = row[good]
        return found

    def _keeps(self, row: Ints, target: Ints, table: Ints, tensor: Ids) -> Flags:
        """Whether each ``row`` keeps the write's box of ``tensor`` where the write puts it."""
        rows = self.matrix[row]
        box, extent = table[:, COPY_BOX:COPY_REMOTE:2], table[:, COPY_BOX + 1 : COPY_REMOTE : 2]
        inside = _within(box, extent, rows)
        stride = strides_of(rows)
        place = rows[:, ROW_OFFSET] + ((box - offsets_of(rows)) * stride).sum(axis=1)
        same = ((table[:, COPY_REMOTE + 2 :] == stride) | (extent == 1)).all(axis=1)
        return np.asarray(
            inside & same & (place == table[:, COPY_REMOTE + 1]) & (rows[:, ROW_REGION] == table[:, COPY_REMOTE])
            & (self.owner[row] == target) & (self.tensor[row] == tensor)
        )  # fmt: skip

    def add(self, row: Ints, table: Ints) -> None:
        np.add.at(
            self.arrived, row, _measure(table[:, COPY_BOX:COPY_REMOTE:2], table[:, COPY_BOX + 1 : COPY_REMOTE : 2])
        )

    def check_once(self) -> None:
        due = _measure(offsets_of(self.matrix), extents_of(self.matrix))
        wrong = np.flatnonzero(due != self.arrived)
        if len(wrong):
            row = int(wrong[0])
            what = "nothing arrives" if self.arrived[row] == 0 else "some elements arrive not at all or more than once"
            raise ProofFailed(
                f"{len(wrong)} target rows are not written exactly once; first: tensor {self.name(row)!r} at "
                f"{self.told[self.owner[row]].party.member}: {what}",
                self.told[self.owner[row]].party.member,
            )

    def check_apart(self) -> None:
        """Raise LayoutError where two rows, or two elements of one row, share a byte."""
        extent, stride = extents_of(self.matrix), strides_of(self.matrix)
        item = self.itemsize[self.tensor]
        empty = (extent == 0).any(axis=1)
        shapes, index = distinct_rows(np.concatenate([extent, stride, item[:, None]], axis=1))
        folded = _folds(shapes[:, :MAX_RANK], shapes[:, MAX_RANK:-1], shapes[:, -1])[index] & ~empty
        if folded.any():
            self._refuse(int(np.argmax(folded)), "has elements that share memory")
        span = (((shapes[:, :MAX_RANK] - 1) * shapes[:, MAX_RANK:-1]).sum(axis=1) + shapes[:, -1])[index]
        order = self.order[~empty[self.order]]
        low = self.address[order]
        reach = np.maximum.accumulate(low + span[order]) if len(order) else low
        meets = np.flatnonzero(low[1:] < reach[:-1])
        if len(meets):
            self._check_interleaved(order, low, reach, item)

    def _check_interleaved(self, order: Ints, low: Ints, reach: Ints, item: Ints) -> None:
        inner = np.concatenate([[False], low[1:] < reach[:-1]])
        cluster = order[inner | np.concatenate([inner[1:], [False]])]
        extent, stride = extents_of(self.matrix)[cluster], strides_of(self.matrix)[cluster]
        contiguous = (stride[:, -1] == item[cluster]) | (extent[:, -1] == 1)
        length = np.where(contiguous, item[cluster] * extent[:, -1], item[cluster])
        outer = extent.copy()
        outer[:, -1] = np.where(contiguous, 1, extent[:, -1])
        runs = outer.prod(axis=1)
        if runs.sum() > MAX_INTERLEAVED_RUNS:
            raise TooComplex(f"{int(runs.sum())} interleaved pieces of target rows; limit {MAX_INTERLEAVED_RUNS}")
        row, rest = expand(runs)
        place = self.address[cluster][row]
        for dim in range(MAX_RANK - 1, -1, -1):
            place += rest % outer[row, dim] * stride[row, dim]
            rest = rest // outer[row, dim]
        by_place = np.argsort(place, kind="stable")
        end = place[by_place] + length[row[by_place]]
        clash = np.flatnonzero(place[by_place][1:] < end[:-1])
        if len(clash):
            first, second = cluster[row[by_place[clash[0]]]], cluster[row[by_place[clash[0] + 1]]]
            self._refuse(int(second), f"shares memory with tensor {self.name(int(first))!r}")

    def _refuse(self, row: int, why: str) -> None:
        raise LayoutError(self.told[self.owner[row]].party.member, why, self.name(row))


def _measure(offset: Ints, extent: Ints) -> Measure:
    """Random-weight measure of boxes ``[n, MAX_RANK]``; additive over disjoint boxes."""
    total = np.ones(len(offset), np.uint64)
    for dim in range(MAX_RANK):
        low, high = offset[:, dim], offset[:, dim] + extent[:, dim]
        if not ((low == 0) & (high == 1)).all():
            total *= _weight_below(high, dim) - _weight_below(low, dim)
    return total


def _weight_below(edge: Ints, dim: int) -> Measure:
    """Sum of the weights of the coordinates below ``edge``; the first weighs 1, so that flat dimensions cost nothing."""
    return np.where(edge <= 1, edge.astype(np.uint64), mix((edge << 2) + dim))


def _within(box: Ints, extent: Ints, rows: Ints) -> Flags:
    """Whether each box lies in its row's box and is not empty."""
    offset = offsets_of(rows)
    inside = (box >= offset) & (extent > 0) & (box + extent <= offset + extents_of(rows))
    return np.asarray(inside.all(axis=1))


def _folds(extent: Ints, stride: Ints, item: Ints) -> Flags:
    """Whether strides let two elements of a box share a byte: each stride must step over all smaller ones."""
    stride = np.where(extent > 1, stride, 0)
    order = np.argsort(stride, axis=1, kind="stable")
    stride = np.take_along_axis(stride, order, axis=1)
    extent = np.take_along_axis(extent, order, axis=1)
    reach = item.copy()
    folds = np.zeros(len(extent), np.bool_)
    for dim in range(MAX_RANK):
        moves = extent[:, dim] > 1
        folds |= moves & (stride[:, dim] < reach)
        reach = reach + np.where(moves, (extent[:, dim] - 1) * stride[:, dim], 0)
    return folds


def _check_writes(source: Told, peers: Ints, rows: _Targets, arrivals: list[list[Ints]]) -> None:
    """Check a source's table; direct writes are counted at their rows, packed ones handed on in ``arrivals``."""
    table, matrix = source.table, source.party.layout.matrix()
    member = source.party.member
    for column, bound in ((COPY_ROW, len(matrix)), (COPY_PEER, len(peers))):
        if len(table) and not 0 <= table[:, column].min() <= table[:, column].max() < bound:
            raise ProofFailed(f"a write of {member} points outside of what it has (column {column})", member)
    own = matrix[table[:, COPY_ROW]]
    box, extent = table[:, COPY_BOX:COPY_REMOTE:2], table[:, COPY_BOX + 1 : COPY_REMOTE : 2]
    if not _within(box, extent, own).all():
        raise ProofFailed(f"a write of {member} is of elements that its row does not hold", member)
    tensor = source.tensor_ids[own[:, ROW_TENSOR]]
    target = peers[table[:, COPY_PEER]]
    packed = table[:, COPY_STAGED] >= 0
    direct = ~packed
    found = rows.find(target[direct], table[direct], tensor[direct])
    if (found < 0).any():
        at = int(np.flatnonzero(direct)[np.argmin(found)])
        name = source.party.layout.tensors[own[at, ROW_TENSOR]].name
        to = source.peers[table[at, COPY_PEER]].member
        raise ProofFailed(f"a write of {name!r} from {member} to {to} does not arrive where {to} keeps it", member)
    rows.add(found, table[direct])
    if packed.any():
        size = extent[packed].prod(axis=1) * rows.itemsize[tensor[packed]]
        _check_staging(source, table[packed, COPY_STAGED], size)
        arrival = np.column_stack(
            [
                table[packed, COPY_REMOTE + 1],
                size,
                tensor[packed],
                box[packed],
                extent[packed],
                table[packed, COPY_REMOTE],
            ]
        )
        for number in np.unique(target[packed]).tolist():
            arrivals[number].append(arrival[target[packed] == number])


def _check_staging(told: Told, place: Ints, size: Ints) -> None:
    """Raise where packed pieces overlap in the member's staging region or leave it."""
    layout = told.party.layout
    order = np.argsort(place, kind="stable")
    place, end = place[order], (place + size)[order]
    room = layout.regions[layout.staging].length if layout.staging >= 0 else 0
    if len(place) and (place[0] < 0 or end[-1] > room or (end[:-1] > place[1:]).any()):
        raise ProofFailed(f"packed pieces overlap in the staging of {told.party.member} or leave it", told.party.member)


def _check_scatter(number: int, told: Told, rows: _Targets, arrivals: list[Ints]) -> None:
    """Check that what a target scatters is what its sources packed, and count it at its rows."""
    member, layout, table = told.party.member, told.party.layout, told.table
    arrived = np.concatenate([np.zeros((0, 4 + 2 * MAX_RANK), np.int64), *arrivals])
    arrived = arrived[np.argsort(arrived[:, 0], kind="stable")]
    table = table[np.argsort(table[:, COPY_STAGED], kind="stable")]
    count = rows.first[number + 1] - rows.first[number]
    if len(table) and (table[:, COPY_ROW].min() < 0 or table[:, COPY_ROW].max() >= count):
        raise ProofFailed(f"{member} is told to scatter into a row that it does not have", member)
    row = rows.first[number] + table[:, COPY_ROW]
    box, extent = table[:, COPY_BOX:COPY_REMOTE:2], table[:, COPY_BOX + 1 : COPY_REMOTE : 2]
    size = extent.prod(axis=1) * rows.itemsize[rows.tensor[row]]
    _check_staging(told, table[:, COPY_STAGED], size)
    staging = np.full(len(table), layout.staging)
    expected = np.column_stack([table[:, COPY_STAGED], size, rows.tensor[row], box, extent, staging])
    if not np.array_equal(arrived, expected):
        raise ProofFailed(f"what {member} is told to scatter is not what its sources pack", member)
    if not _within(box, extent, rows.matrix[row]).all():
        raise ProofFailed(f"{member} is told to scatter elements into a row without them", member)
    rows.add(row, table)
