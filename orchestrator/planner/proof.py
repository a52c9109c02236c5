"""The independent check of a plan: every destination byte is written exactly once, with the byte that belongs there.

It reads the decoded layouts, the tables as members will get them, and for each write which row of the target the
planner means; that claim is checked, not believed. Nothing that the planner derived on the way is used.

1. *Place and meaning.* A write's box lies in the box of its own row and in that of the target's row, both of one
   tensor, and its destination address is where the target's row keeps that box. Cargo lands, row by row, at a place of
   its edge's berth, from where the target is told to scatter the same box of the same row. Into a shadow engine
   everything is cargo.
2. *Once.* The boxes that arrive at a target row add up to the row's box exactly. Measured with random weights: the
   measure of a box is a product over dimensions of G(high) - G(low) modulo 2^64, where G is a fixed random function.
   Measures agree only if the boxes cover each element once, but for a chance of about 2^-60 per row (Schwartz 1980,
   Zippel 1979: the difference is a multilinear polynomial in the weights).
3. *Apart.* No two rows of a target share memory (see ``overlap``), no two boxes a place in an edge's cargo, and no two
   edges' berths a byte of the landing.
"""

from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt
from weightsync.orchestrator.planner.arrays import Flags, Ids, Ints, dense_strides, mix, starts
from weightsync.orchestrator.planner.decode import Decoded, FormTable, Rows
from weightsync.orchestrator.planner.errors import ProofFailed
from weightsync.orchestrator.planner.overlap import check_overlap
from weightsync.orchestrator.planner.tables import MemberTable
from weightsync.orchestrator.protocol.landing import Berth, landing_length
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
        layouts = [table.member.party.layout for table in targets]
        self.landing = np.array([layout.staging for layout in layouts], np.int64)
        self.shadow = np.array([layout.lands != "live" for layout in layouts], np.bool_)
        self.sources: dict[int, int] = {}
        """The number of each source, likewise."""
        self.berths: dict[tuple[int, int], Berth | None] = {}
        """As the sources know them, by the numbers of source and target."""
        self.first = starts(np.array([len(table.member.rows.form) for table in targets], np.int64))
        nothing = np.zeros(0, np.int32)
        self.rows = Rows(
            *(np.concatenate([nothing, *(getattr(t.member.rows, f.name) for t in targets)]) for f in fields(Rows))
        )
        for table in targets:
            check_overlap(table.member, forms)
        self.weights = _Weights(forms)
        self.arrived: Words = np.zeros(len(self.rows.form), np.uint64)
        self.landed: Words = np.zeros(len(targets), np.uint64)
        """Per target, the sum of hashes of (source, row, box, place in the cargo) of what its sources send there."""

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
        lands = (columns[COPY_REMOTE] == self.landing[target]) & (self.landing[target] >= 0)
        # Cargo is followed to its row by ``finish``; what goes straight there must be right where it arrives.
        good = self._inside(columns, own.form[columns[COPY_ROW]]) & self._inside(columns, form)
        good &= tensor == self.rows.tensor[meant]
        good &= np.where(lands, self._dense(columns, form), self._in_place(columns, meant, form))
        good &= lands | ~(self.shadow[target] | (columns[COPY_STAGED] >= 0))
        if not good.all():
            at = int(np.argmin(good))
            name = source.member.party.layout.tensors[_tensor_of(source.member, int(columns[COPY_ROW, at]))].name
            to = self.targets[int(target[at])].member.party.member
            raise ProofFailed(f"a write of {name!r} from {member} does not arrive where {to} keeps it", member)
        # Not ``arrived[row] +=``, which would count only one of several writes to the same row.
        np.add.at(self.arrived, meant, self.weights.measure(columns))
        number = self.sources.setdefault(id(source.member), len(self.sources))
        self.berths |= {(number, int(peer)): berth for peer, berth in zip(peers, source.berths, strict=True)}
        if lands.any():
            columns, meant, target = columns[:, lands], meant[lands], target[lands]
            place = columns[COPY_REMOTE + 1]
            _check_cargo(source, columns, place, self.forms.itemsize[form[lands]])
            np.add.at(self.landed, target, _identity(columns, meant, place, np.full(len(place), number)))

    def finish(self) -> None:
        """Check the targets' tables, and that all rows have arrived.

        Raises:
            ProofFailed: a byte is not written or written twice; a target scatters what was not sent to it so.
        """
        for number, table in enumerate(self.targets):
            self._scatter(number, table)
            self._apart(number, table)
        self._once()

    def _scatter(self, number: int, table: MemberTable) -> None:
        """Check that what a target scatters is what its sources send to its landing."""
        member = table.member.party.member
        columns = np.ascontiguousarray(table.copies.T)
        _check_range(table, columns[COPY_ROW], int(self.first[number + 1] - self.first[number]))
        row = self.first[number] + columns[COPY_ROW]
        if not self._inside(columns, self.rows.form[row]).all():
            raise ProofFailed(f"{member} is told to scatter elements into a row without them", member)
        _check_range(table, columns[COPY_PEER], len(table.peers))
        _check_cargo(table, columns, columns[COPY_STAGED], self.forms.itemsize[self.rows.form[row]])
        # A source without writes has sent nothing, whatever its number.
        sources = np.array([self.sources.get(id(peer), -1) for peer in table.peers], np.int64)[columns[COPY_PEER]]
        if _identity(columns, row, columns[COPY_STAGED], sources).sum(dtype=np.uint64) != self.landed[number]:
            raise ProofFailed(f"what {member} is told to scatter is not what its sources send there", member)

    def _apart(self, number: int, table: MemberTable) -> None:
        """Check that the berths of a target are in its landing, apart, and those that its sources know."""
        layout, member = table.member.party.layout, table.member.party.member
        known = [self.berths.get((self.sources.get(id(peer), -1), number)) for peer in table.peers]
        berths = sorted((berth for berth in table.berths if berth is not None), key=lambda berth: berth.offset)
        good = known == list(table.berths) and all(berth.region == layout.staging for berth in berths)
        good &= all(left.end <= right.offset for left, right in pairwise(berths))
        good &= not berths or (berths[0].offset >= 0 and berths[-1].end <= landing_length(layout))
        # What is copied stays where it lands; what passes on from there may go through a berth of any length.
        good &= all(berth.passes or not berth.wraps for berth in berths)
        good &= layout.lands != "copy" or not any(berth.passes for berth in berths)
        if not good:
            raise ProofFailed(f"berths of {member} overlap, leave its landing, or are not those of its sources", member)

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

    def _dense(self, columns: Ints, form: Ids) -> Flags:
        """Whether each copy lies row by row at its place of the cargo, which a packed one has at both ends."""
        dense = dense_strides(columns[COPY_BOX + 1 : COPY_REMOTE : 2].T, self.forms.itemsize[form]).T
        good = (columns[COPY_STAGED] < 0) | (columns[COPY_STAGED] == columns[COPY_REMOTE + 1])
        return np.asarray(good & (columns[COPY_REMOTE + 2 :] == dense).all(axis=0))

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


def _identity(columns: Ints, row: Ints, place: Ints, source: Ints) -> Words:
    """A hash of each copy that lands: source, target row, box, place in the edge's cargo."""
    total = mix(row) + place.astype(np.uint64) * np.uint64(0x9FB21C651E98DF25)
    total += mix((source << 2) + 1)
    for nth, values in enumerate(columns[COPY_BOX:COPY_REMOTE]):
        total += values.astype(np.uint64) * (mix(np.array([nth + 1])) | np.uint64(1))
    return mix(total)


def _tensor_of(member: Decoded, row: int) -> int:
    return int(member.party.layout.matrix()[row, ROW_TENSOR])


def _check_range(table: MemberTable, values: Ints, bound: int) -> None:
    if len(values) and not 0 <= values.min() <= values.max() < bound:
        member = table.member.party.member
        raise ProofFailed(f"the table of {member} points to {values.min()}…{values.max()} of {bound}", member)


def _check_cargo(table: MemberTable, columns: Ints, place: Ints, itemsize: Ints) -> None:
    """Raise where boxes at ``place [n]`` of their edge's cargo overlap or leave it."""
    end = place + columns[COPY_BOX + 1 : COPY_REMOTE : 2].prod(axis=0) * itemsize
    length = np.array([berth.bytes if berth is not None else 0 for berth in table.berths], np.int64)
    peer = columns[COPY_PEER]
    order = np.lexsort((place, peer))
    same = peer[order][1:] == peer[order][:-1]
    if (place < 0).any() or (end > length[peer]).any() or (same & (end[order][:-1] > place[order][1:])).any():
        member = table.member.party.member
        raise ProofFailed(f"boxes overlap in the cargo of an edge of {member}, or leave it", member)
