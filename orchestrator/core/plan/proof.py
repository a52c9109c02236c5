"""The independent check of a plan: every destination byte is written exactly once, with the byte that belongs there.

It reads what the members are told (layouts and tables) and, for each write, which row of the target the planner means;
that claim is checked, not believed. Of the planner's own work it shares the numbers of the tensors' names only.

1. *Place and meaning.* A write's box lies in the box of its own row and in that of the target's row, both of one
   tensor, and its destination address is where the target's row keeps that box. A packed write lands in the
   target's staging, where the target is told to scatter the same box of the same row from.
2. *Once.* The boxes that arrive at a target row add up to the row's box exactly. Measured with random weights: the
   measure of a box is a product over dimensions of G(high) - G(low) modulo 2^64, where G is a fixed random function.
   Measures agree only if the boxes cover each element once, but for a chance of about 2^-60 per row (Schwartz 1980,
   Zippel 1979: the difference is a multilinear polynomial in the weights).
3. *Apart.* No two rows of a target share memory (see ``apart``), and no two packed boxes share staging.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from weightsync.orchestrator.core.plan.apart import check_apart
from weightsync.orchestrator.core.plan.arrays import Flags, Ids, Ints, mix, starts
from weightsync.orchestrator.core.plan.errors import ProofFailed
from weightsync.orchestrator.core.plan.inputs import Party
from weightsync.orchestrator.protocol.layout import (
    COPY_BOX,
    COPY_PEER,
    COPY_REMOTE,
    COPY_ROW,
    COPY_STAGED,
    ROW_BOX,
    ROW_COLUMNS,
    ROW_OFFSET,
    ROW_REGION,
    ROW_TENSOR,
)
from weightsync.orchestrator.protocol.limits import MAX_RANK

MAX_TABULATED: Final = 1 << 20
"""Coordinates whose weights are computed once and looked up; beyond the vocabulary of any model."""

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Told:
    """What a member is told, the plan's number of each tensor of its layout, and for a source's writes the row of the
    peer's layout that each is meant for."""

    party: Party
    tensor_ids: Ids
    peers: tuple[Party, ...]
    table: Ints
    meant: Ids


def prove(sources: Sequence[Told], targets: Sequence[Told], itemsize: Ints) -> None:
    """Check a plan.

    Args:
        sources, targets: every member of the plan.
        itemsize: bytes per element by tensor number.

    Raises:
        ProofFailed: a byte is not written, written twice, or written with another's value.
        LayoutError: rows of a target overlap in memory.
        TooComplex: rows of a target interleave in too many pieces to be compared.
    """
    check = _Check(targets, itemsize)
    for source in sources:
        check.writes(source)
    for number, told in enumerate(targets):
        check.scatter(number, told)
    check.once()


class _Check:
    """All rows of all targets, and what has been found to arrive at them."""

    def __init__(self, targets: Sequence[Told], itemsize: Ints) -> None:
        self.targets: Sequence[Told] = targets
        self.itemsize: Ints = itemsize
        self.number = {told.party.member: i for i, told in enumerate(targets)}
        self.staging: Ints = np.array([told.party.layout.staging for told in targets], np.int64)
        matrices = [told.party.layout.matrix() for told in targets]
        self.first: Ints = starts(np.array([len(m) for m in matrices], np.int64))
        self.rows: Ints = np.concatenate([np.zeros((0, ROW_COLUMNS), np.int64), *matrices])
        tensors = [told.tensor_ids[m[:, ROW_TENSOR]] for told, m in zip(targets, matrices, strict=True)]
        self.tensor: Ids = np.concatenate([np.zeros(0, np.int32), *tensors])
        for told, matrix, tensor in zip(targets, matrices, tensors, strict=True):
            check_apart(told.party, matrix, itemsize[tensor])
        self.weights = _Weights(self.rows)
        self.arrived: Words = np.zeros(len(self.rows), np.uint64)
        self.packed: Words = np.zeros(len(targets), np.uint64)
        """Per target, the sum of hashes of (row, box, place in staging) of what its sources pack."""

    def writes(self, source: Told) -> None:
        """Check a source's table, and count its writes at the rows that they are meant for."""
        if len(source.table) == 0:
            return
        member, columns = source.party.member, np.ascontiguousarray(source.table.T)
        peers = np.array([self.number.get(p.member, -1) for p in source.peers], np.int64)
        own_rows = source.party.layout.matrix()
        _check_range(source, columns[COPY_ROW], len(own_rows))
        _check_range(source, columns[COPY_PEER], len(peers))
        target = peers[columns[COPY_PEER]]
        meant = self.first[target] + source.meant
        if (target < 0).any() or (source.meant < 0).any() or (meant >= self.first[target + 1]).any():
            raise ProofFailed(f"a write of {member} is meant for a row that no target of the plan has", member)
        own = _gather(own_rows, columns[COPY_ROW])
        tensor = source.tensor_ids[own[ROW_TENSOR]]
        rows = _gather(self.rows, meant)
        packed = columns[COPY_STAGED] >= 0
        good = _inside(columns, own) & _inside(columns, rows) & (tensor == self.tensor[meant])
        good &= np.where(packed, columns[COPY_REMOTE] == self.staging[target], _in_place(columns, rows))
        if not good.all():
            at = int(np.argmin(good))
            name = source.party.layout.tensors[int(own[ROW_TENSOR, at])].name
            to = self.targets[int(target[at])].party.member
            raise ProofFailed(f"a write of {name!r} from {member} does not arrive where {to} keeps it", member)
        np.add.at(self.arrived, meant, self.weights.measure(columns))
        if packed.any():
            columns, meant, target, tensor = columns[:, packed], meant[packed], target[packed], tensor[packed]
            _check_staging(source, columns, self.itemsize[tensor])
            np.add.at(self.packed, target, _identity(columns, meant, columns[COPY_REMOTE + 1]))

    def scatter(self, number: int, told: Told) -> None:
        """Check that what a target scatters is what its sources pack."""
        member, columns = told.party.member, np.ascontiguousarray(told.table.T)
        _check_range(told, columns[COPY_ROW], int(self.first[number + 1] - self.first[number]))
        row = self.first[number] + columns[COPY_ROW]
        if not _inside(columns, _gather(self.rows, row)).all():
            raise ProofFailed(f"{member} is told to scatter elements into a row without them", member)
        _check_staging(told, columns, self.itemsize[self.tensor[row]])
        if _identity(columns, row, columns[COPY_STAGED]).sum(dtype=np.uint64) != self.packed[number]:
            raise ProofFailed(f"what {member} is told to scatter is not what its sources pack", member)

    def once(self) -> None:
        """Check that what has arrived is every row, once."""
        due = self.weights.measure_rows(self.rows)
        wrong = np.flatnonzero(due != self.arrived)
        if len(wrong):
            row = int(wrong[0])
            told = self.targets[int(np.searchsorted(self.first, row, side="right")) - 1]
            name = told.party.layout.tensors[int(self.rows[row, ROW_TENSOR])].name
            what = "nothing arrives" if self.arrived[row] == 0 else "some elements arrive not at all or more than once"
            who = told.party.member
            raise ProofFailed(
                f"{len(wrong)} target rows are not written exactly once; first: {name!r} at {who}: {what}",
                told.party.member,
            )


class _Weights:
    """The random function G of each dimension, and the measures made from it."""

    def __init__(self, rows: Ints) -> None:
        edges = rows[:, ROW_BOX::3] + rows[:, ROW_BOX + 1 :: 3] if len(rows) else np.zeros((0, MAX_RANK), np.int64)
        self._table = [
            _weight_below(np.arange(min(int(edges[:, dim].max(initial=0)), MAX_TABULATED) + 1), dim)
            for dim in range(MAX_RANK)
        ]

    def measure(self, columns: Ints) -> Words:
        """Of the boxes of copies ``[COPY_COLUMNS, n]``."""
        return self._measure(columns[COPY_BOX:COPY_REMOTE:2], columns[COPY_BOX + 1 : COPY_REMOTE : 2])

    def measure_rows(self, rows: Ints) -> Words:
        """Of the boxes of rows ``[n, ROW_COLUMNS]``."""
        return self._measure(rows[:, ROW_BOX::3].T, rows[:, ROW_BOX + 1 :: 3].T)

    def _measure(self, offset: Ints, extent: Ints) -> Words:
        total = np.ones(offset.shape[1], np.uint64)
        for dim in range(MAX_RANK):
            low, high = offset[dim], offset[dim] + extent[dim]
            if not ((low == 0) & (high == 1)).all():
                total *= self._below(high, dim) - self._below(low, dim)
        return total

    def _below(self, edge: Ints, dim: int) -> Words:
        table = self._table[dim]
        return table[edge] if len(edge) and edge.max() < len(table) else _weight_below(edge, dim)


def _weight_below(edge: Ints, dim: int) -> Words:
    """Sum of the weights of the coordinates below ``edge``; the first weighs 1, so flat dimensions cost nothing."""
    return np.where(edge <= 1, edge.astype(np.uint64), mix((edge << 2) + dim))


def _gather(rows: Ints, index: Ints) -> Ints:
    """Layout rows as columns ``[ROW_COLUMNS, n]``."""
    return np.ascontiguousarray(rows[index].T)


def _inside(columns: Ints, rows: Ints) -> Flags:
    """Whether each copy's box is not empty and lies in its row's box."""
    good = np.ones(columns.shape[1], np.bool_)
    for dim in range(MAX_RANK):
        low, extent = columns[COPY_BOX + 2 * dim], columns[COPY_BOX + 2 * dim + 1]
        skipped = low - rows[ROW_BOX + 3 * dim]
        good &= (skipped >= 0) & (extent > 0) & (skipped + extent <= rows[ROW_BOX + 3 * dim + 1])
    return good


def _in_place(columns: Ints, rows: Ints) -> Flags:
    """Whether each copy goes to where its target row keeps the copy's box."""
    place = rows[ROW_OFFSET].copy()
    good = columns[COPY_REMOTE] == rows[ROW_REGION]
    for dim in range(MAX_RANK):
        stride = rows[ROW_BOX + 3 * dim + 2]
        place += (columns[COPY_BOX + 2 * dim] - rows[ROW_BOX + 3 * dim]) * stride
        good &= (columns[COPY_REMOTE + 2 + dim] == stride) | (columns[COPY_BOX + 2 * dim + 1] == 1)
    return np.asarray(good & (place == columns[COPY_REMOTE + 1]))


def _identity(columns: Ints, row: Ints, place: Ints) -> Words:
    """A hash of each packed copy: target row, box, place in the target's staging."""
    total = mix(row) + place.astype(np.uint64) * np.uint64(0x9FB21C651E98DF25)
    for nth, values in enumerate(columns[COPY_BOX:COPY_REMOTE]):
        total += values.astype(np.uint64) * (mix(np.array([nth + 1])) | np.uint64(1))
    return mix(total)


def _check_range(told: Told, values: Ints, bound: int) -> None:
    if len(values) and not 0 <= values.min() <= values.max() < bound:
        member = told.party.member
        raise ProofFailed(f"the table of {member} points to {values.min()}…{values.max()} of {bound}", member)


def _check_staging(told: Told, columns: Ints, itemsize: Ints) -> None:
    """Raise where packed boxes overlap in the member's own staging region or leave it."""
    place = columns[COPY_STAGED]
    end = place + columns[COPY_BOX + 1 : COPY_REMOTE : 2].prod(axis=0) * itemsize
    order = np.argsort(place, kind="stable")
    place, end = place[order], end[order]
    layout, member = told.party.layout, told.party.member
    room = layout.regions[layout.staging].length if layout.staging >= 0 else 0
    if len(place) and (place[0] < 0 or end[-1] > room or (end[:-1] > place[1:]).any()):
        raise ProofFailed(f"packed boxes overlap in the staging of {member} or leave it", member)
