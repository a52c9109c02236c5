"""The independent check of a plan: every destination byte is written exactly once, with the byte that belongs there.

It reads the decoded layouts, the tables as members will get them, and for each write which row of the target the
planner means; that claim is checked, not believed. Nothing that the planner derived on the way is used.

1. *Place and meaning.* A write's box lies in the box of its own row and in that of the target's row, both of one
   tensor, and its destination address is where the target's row keeps that box. A packed write lands in the
   target's staging, where the target is told to scatter the same box of the same row from.
2. *Once.* The boxes that arrive at a target row add up to the row's box exactly. Measured with random weights: the
   measure of a box is a product over dimensions of G(high) - G(low) modulo 2^64, where G is a fixed random function.
   Measures agree only if the boxes cover each element once, but for a chance of about 2^-60 per row (Schwartz 1980,
   Zippel 1979: the difference is a multilinear polynomial in the weights).
3. *Apart.* No two rows of a target share memory (see ``overlap``), and no two packed boxes share staging.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Final

import numpy as np
import numpy.typing as npt
from weightsync.orchestrator.planner.arrays import Flags, Ids, Ints, mix, starts
from weightsync.orchestrator.planner.decode import Decoded, FormTable, Rows
from weightsync.orchestrator.planner.errors import ProofFailed
from weightsync.orchestrator.planner.overlap import check_overlap
from weightsync.orchestrator.planner.tables import MemberTable
from weightsync.orchestrator.protocol.layout import (
    COPY_BOX,
    COPY_PEER,
    COPY_REMOTE,
    COPY_ROW,
    COPY_STAGED,
    ROW_TENSOR,
)
from weightsync.orchestrator.protocol.limits import MAX_RANK

MAX_TABULATED: Final = 1 << 20
"""Coordinates whose weights are computed once and looked up; beyond the vocabulary of any model."""

Words = npt.NDArray[np.uint64]


class Proof:
    """The check of one plan: ``writes`` for every source, then ``finish``.

    Args:
        targets: the table of every target of the plan.
        forms: of the rows of all members' layouts.

    Raises:
        LayoutError: rows of a target overlap in memory.
        TooComplex: rows of a target interleave in too many pieces to be compared.
    """

    def __init__(self, targets: Sequence[MemberTable], forms: FormTable) -> None:
        self.targets = targets
        self.forms = forms
        # By identity: tables name their peers with the very objects that the targets' own tables hold.
        self.number = {id(table.member): i for i, table in enumerate(targets)}
        self.staging = np.array([table.member.party.layout.staging for table in targets], np.int64)
        self.first = starts(np.array([len(table.member.rows.form) for table in targets], np.int64))
        nothing = np.zeros(0, np.int32)
        self.rows = Rows(
            *(np.concatenate([nothing, *(getattr(t.member.rows, f.name) for t in targets)]) for f in fields(Rows))
        )
        for table in targets:
            check_overlap(table.member, forms)
        self.weights = _Weights(forms)
        self.arrived: Words = np.zeros(len(self.rows.form), np.uint64)
        self.packed: Words = np.zeros(len(targets), np.uint64)
        """Per target, the sum of hashes of (row, box, place in staging) of what its sources pack."""

    def writes(self, source: MemberTable) -> None:
        """Check a source's table, and add the measure of each write to the row that it is meant for.

        Raises:
            ProofFailed: a write that does not carry what its row holds to where the target's row keeps it.
        """
        if len(source.copies) == 0:
            return
        member = source.member.party.member
        own = source.member.rows
        # Transposed, so that each column of the table lies densely in memory and is read as a whole.
        columns = np.ascontiguousarray(source.copies.T)
        peers = np.array([self.number.get(id(peer), -1) for peer in source.peers], np.int64)
        _check_range(source, columns[COPY_ROW], len(own.form))
        _check_range(source, columns[COPY_PEER], len(peers))
        target = peers[columns[COPY_PEER]]
        meant = self.first[target] + source.target_row
        if (target < 0).any() or (source.target_row < 0).any() or (meant >= self.first[target + 1]).any():
            raise ProofFailed(f"a write of {member} is meant for a row that no target of the plan has", member)
        tensor = own.tensor[columns[COPY_ROW]]
        form = self.rows.form[meant]
        packed = columns[COPY_STAGED] >= 0
        # A packed write goes into staging, where ``finish`` follows it; a direct one must be right where it lands.
        good = self._inside(columns, own.form[columns[COPY_ROW]]) & self._inside(columns, form)
        good &= tensor == self.rows.tensor[meant]
        good &= np.where(packed, columns[COPY_REMOTE] == self.staging[target], self._in_place(columns, meant, form))
        if not good.all():
            at = int(np.argmin(good))
            name = source.member.party.layout.tensors[_tensor_of(source.member, int(columns[COPY_ROW, at]))].name
            to = self.targets[int(target[at])].member.party.member
            raise ProofFailed(f"a write of {name!r} from {member} does not arrive where {to} keeps it", member)
        # Not ``arrived[row] +=``, which would count only one of several writes to the same row.
        np.add.at(self.arrived, meant, self.weights.measure(columns))
        if packed.any():
            columns, meant, target = columns[:, packed], meant[packed], target[packed]
            _check_staging(source, columns, self.forms.itemsize[form[packed]])
            np.add.at(self.packed, target, _identity(columns, meant, columns[COPY_REMOTE + 1]))

    def finish(self) -> None:
        """Check the targets' tables, and that all rows have arrived.

        Raises:
            ProofFailed: a byte is not written or written twice; a target scatters what was not packed for it.
        """
        for number, table in enumerate(self.targets):
            self._scatter(number, table)
        self._once()

    def _scatter(self, number: int, table: MemberTable) -> None:
        """Check that what a target scatters is what its sources pack."""
        member = table.member.party.member
        columns = np.ascontiguousarray(table.copies.T)
        _check_range(table, columns[COPY_ROW], int(self.first[number + 1] - self.first[number]))
        row = self.first[number] + columns[COPY_ROW]
        if not self._inside(columns, self.rows.form[row]).all():
            raise ProofFailed(f"{member} is told to scatter elements into a row without them", member)
        _check_staging(table, columns, self.forms.itemsize[self.rows.form[row]])
        if _identity(columns, row, columns[COPY_STAGED]).sum(dtype=np.uint64) != self.packed[number]:
            raise ProofFailed(f"what {member} is told to scatter is not what its sources pack", member)

    def _once(self) -> None:
        """Check that what arrived at each row measures what the row's whole box does."""
        due = self.weights.of_forms()[self.rows.form]
        wrong = np.flatnonzero(due != self.arrived)
        if len(wrong):
            number = int(np.searchsorted(self.first, wrong[0], side="right")) - 1
            member = self.targets[number].member
            row = int(wrong[0] - self.first[number])
            name, who = member.party.layout.tensors[_tensor_of(member, row)].name, member.party.member
            what = "nothing arrives" if self.arrived[wrong[0]] == 0 else "some elements not at all or more than once"
            raise ProofFailed(
                f"{len(wrong)} target rows are not written exactly once; first: {name!r} at {who}: {what}", who
            )

    def _inside(self, columns: Ints, form: Ids) -> Flags:
        """Whether each copy's box is not empty and lies in the box of ``form``."""
        good = np.ones(columns.shape[1], np.bool_)
        for dim in range(MAX_RANK):
            extent = columns[COPY_BOX + 2 * dim + 1]
            skipped = columns[COPY_BOX + 2 * dim] - self.forms.offset[:, dim][form]
            good &= (skipped >= 0) & (extent > 0) & (skipped + extent <= self.forms.extent[:, dim][form])
        return good

    def _in_place(self, columns: Ints, row: Ints, form: Ids) -> Flags:
        """Whether each copy goes to where its target row, of ``form``, keeps the copy's box."""
        place = self.rows.offset[row]
        good = columns[COPY_REMOTE] == self.rows.region[row]
        for dim in range(MAX_RANK):
            # A dimension of one element is never stepped through, so that its stride may say anything.
            stride = self.forms.stride[:, dim][form]
            place += (columns[COPY_BOX + 2 * dim] - self.forms.offset[:, dim][form]) * stride
            good &= (columns[COPY_REMOTE + 2 + dim] == stride) | (columns[COPY_BOX + 2 * dim + 1] == 1)
        return np.asarray(good & (place == columns[COPY_REMOTE + 1]))


class _Weights:
    """The random function G of each dimension, and the measures made from it; all arithmetic is modulo 2^64."""

    def __init__(self, forms: FormTable) -> None:
        self._forms = forms
        last = (forms.offset + forms.extent).max(axis=0, initial=0).tolist()
        self._table = [_weight_below(np.arange(min(edge, MAX_TABULATED) + 1), dim) for dim, edge in enumerate(last)]

    def measure(self, columns: Ints) -> Words:
        """Measures ``[n]`` of the boxes of copies ``[COPY_COLUMNS, n]``."""
        return self._measure(columns[COPY_BOX:COPY_REMOTE:2], columns[COPY_BOX + 1 : COPY_REMOTE : 2])

    def of_forms(self) -> Words:
        """Measures of the boxes of all forms."""
        return self._measure(self._forms.offset.T, self._forms.extent.T)

    def _measure(self, offset: Ints, extent: Ints) -> Words:
        total = np.ones(offset.shape[1], np.uint64)
        for dim in range(MAX_RANK):
            low, high = offset[dim], offset[dim] + extent[dim]
            # Leading dimensions of padded tensors are 0:1 everywhere and weigh 1.
            if not ((low == 0) & (high == 1)).all():
                total *= self._below(high, dim) - self._below(low, dim)
        return total

    def _below(self, edge: Ints, dim: int) -> Words:
        table = self._table[dim]
        return table[edge] if len(edge) and edge.max() < len(table) else _weight_below(edge, dim)


def _weight_below(edge: Ints, dim: int) -> Words:
    """Sum of the weights of the coordinates below ``edge``; the first weighs 1, so flat dimensions cost nothing."""
    return np.where(edge <= 1, edge.astype(np.uint64), mix((edge << 2) + dim))


def _identity(columns: Ints, row: Ints, place: Ints) -> Words:
    """A hash of each packed copy: target row, box, place in the target's staging."""
    total = mix(row) + place.astype(np.uint64) * np.uint64(0x9FB21C651E98DF25)
    for nth, values in enumerate(columns[COPY_BOX:COPY_REMOTE]):
        total += values.astype(np.uint64) * (mix(np.array([nth + 1])) | np.uint64(1))
    return mix(total)


def _tensor_of(member: Decoded, row: int) -> int:
    return int(member.party.layout.matrix()[row, ROW_TENSOR])


def _check_range(table: MemberTable, values: Ints, bound: int) -> None:
    if len(values) and not 0 <= values.min() <= values.max() < bound:
        member = table.member.party.member
        raise ProofFailed(f"the table of {member} points to {values.min()}…{values.max()} of {bound}", member)


def _check_staging(table: MemberTable, columns: Ints, itemsize: Ints) -> None:
    """Raise where packed boxes overlap in the member's own staging region or leave it."""
    place = columns[COPY_STAGED]
    end = place + columns[COPY_BOX + 1 : COPY_REMOTE : 2].prod(axis=0) * itemsize
    order = np.argsort(place, kind="stable")
    place, end = place[order], end[order]
    layout, member = table.member.party.layout, table.member.party.member
    room = layout.regions[layout.staging].length if layout.staging >= 0 else 0
    if len(place) and (place[0] < 0 or end[-1] > room or (end[:-1] > place[1:]).any()):
        raise ProofFailed(f"packed boxes overlap in the staging of {member} or leave it", member)
