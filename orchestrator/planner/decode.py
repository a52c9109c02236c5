"""Layouts in columns, checked as they come in.

A *form* is what rows of many layers have in common: the kind of tensor (dtype and shape), the box and the strides. A
model has hundreds of thousands of rows and a few hundred forms, so that geometry is computed per form only.
"""

from dataclasses import dataclass

import numpy as np
from weightsync.orchestrator.planner.arrays import (
    Flags,
    Ids,
    Ints,
    distinct_rows,
)
from weightsync.orchestrator.planner.errors import LayoutError
from weightsync.orchestrator.planner.fingerprint import PartyDigest, party_digest
from weightsync.orchestrator.planner.inputs import Party
from weightsync.orchestrator.planner.names import MAX_BYTES, Names
from weightsync.orchestrator.protocol.layout import ROW_BOX, ROW_OFFSET, ROW_REGION, ROW_TENSOR
from weightsync.orchestrator.protocol.limits import MAX_RANK, MAX_ROWS
from weightsync.orchestrator.protocol.names import Member

FORM_COLUMNS = 1 + 3 * MAX_RANK


@dataclass(frozen=True, slots=True)
class FormTable:
    """``kind, itemsize [n]``; ``offset``, ``extent`` in elements and ``stride`` in bytes, each ``[n, MAX_RANK]``;
    ``span [n]``: bytes from a box's first to behind its last; ``elements [n]``."""

    kind: Ints
    itemsize: Ints
    offset: Ints
    extent: Ints
    stride: Ints
    span: Ints
    elements: Ints

    def __len__(self) -> int:
        return len(self.kind)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one layout in its order, in columns ``[n]``: tensor number, form, region, byte offset."""

    tensor: Ids
    form: Ids
    region: Ids
    offset: Ints


@dataclass(frozen=True, slots=True)
class Decoded:
    """A party, its layout in columns, and what fingerprints depend on."""

    party: Party
    rows: Rows
    digest: PartyDigest


class Forms:
    """Numbers the distinct (kind, box, strides) of rows in order of first appearance; grows only."""

    def __init__(self) -> None:
        self._index: dict[bytes, int] = {}
        self._rows: list[Ints] = []
        self._table: FormTable | None = None

    def numbers(self, distinct: Ints) -> Ids:
        """Number of each of ``distinct`` forms ``[n, FORM_COLUMNS]``: kind, then box and strides as in a layout."""
        # A loop over a few hundred distinct forms, not over rows.
        numbers = np.empty(len(distinct), np.int32)
        for i, form in enumerate(distinct):
            number = self._index.setdefault(form.tobytes(), len(self._rows))
            if number == len(self._rows):
                self._rows.append(form.copy())
            numbers[i] = number
        return numbers

    def table(self, names: Names) -> FormTable:
        """All forms so far."""
        if self._table is None or len(self._table) != len(self._rows):
            self._table = make_form_table(np.array(self._rows, np.int64).reshape(-1, FORM_COLUMNS), names)
        return self._table


def make_form_table(forms: Ints, names: Names) -> FormTable:
    """Columns of forms ``[n, FORM_COLUMNS]``: the kind, then offset, extent and stride of each dimension in turn."""
    kind = forms[:, 0].copy()
    itemsize = np.array(names.kind_itemsize, np.int64)[kind]
    offset, extent, stride = (np.ascontiguousarray(forms[:, 1 + i :: 3]) for i in range(3))
    elements = extent.prod(axis=1)
    span = np.where(elements > 0, ((extent - 1) * stride).sum(axis=1) + itemsize, 0)
    return FormTable(kind, itemsize, offset, extent, stride, span, elements)


class Decoder:
    """Turns layouts into columns; one per plan and its successors, because the numbers are shared."""

    def __init__(self) -> None:
        self.names = Names()
        self.forms = Forms()

    def form_table(self) -> FormTable:
        """All forms so far."""
        return self.forms.table(self.names)

    def decode(self, party: Party) -> Decoded:
        """The party's rows, each checked against the tables that it points into.

        Raises:
            LayoutError: an index, box, stride or address outside of what the layout declares.
            ShapeMismatch, DtypeMismatch: another party declared a tensor differently.
        """
        member, layout = party.member, party.layout
        try:
            matrix = layout.matrix()
        except ValueError as error:
            raise LayoutError(member, str(error)) from error
        if len(matrix) > MAX_ROWS:
            raise LayoutError(member, f"{len(matrix)} rows exceed the limit of {MAX_ROWS}")
        numbers, table_digest = self.names.ids(party)
        lengths = np.array([r.length for r in layout.regions], np.int64)
        _check_regions(party, lengths)
        _check_range(member, "tensor", matrix[:, ROW_TENSOR], len(numbers))
        _check_range(member, "region", matrix[:, ROW_REGION], len(lengths))
        tensor, region = numbers[matrix[:, ROW_TENSOR]], matrix[:, ROW_REGION].astype(np.int32)
        keys = np.empty((len(matrix), FORM_COLUMNS), np.int64)
        keys[:, 0] = self.names.kinds()[tensor]
        keys[:, 1:] = matrix[:, ROW_BOX:]
        distinct, form = distinct_rows(keys)
        self._check_forms(member, distinct, form, tensor)
        span = make_form_table(distinct, self.names).span[form]
        offset = matrix[:, ROW_OFFSET].copy()
        # ``offset + span`` could wrap around; ``lengths - span`` cannot, for both are bounded by now.
        self._refuse(member, tensor, (offset < 0) | (offset > lengths[region] - span), "bytes outside of its region")
        rows = Rows(tensor, self.forms.numbers(distinct)[form], region, offset)
        return Decoded(party, rows, party_digest(party, table_digest))

    def _check_forms(self, member: Member, forms: Ints, form: Ints, tensor: Ids) -> None:
        """Check ``forms [m, FORM_COLUMNS]``; ``form [n]`` and ``tensor [n]`` of each row serve to name a culprit."""
        shape = np.array(self.names.kind_shape, np.int64).reshape(-1, MAX_RANK)[forms[:, 0]]
        offset, extent, stride = forms[:, 1::3], forms[:, 2::3], forms[:, 3::3]
        outside = (offset < 0) | (offset > shape) | (extent < 0) | (extent > shape - offset)
        self._refuse(member, tensor, np.asarray(outside.any(axis=1))[form], "a box outside of the tensor's shape")
        # With this bound no sum of a box's strides leaves int64.
        wild = (stride < 0) | (stride > MAX_BYTES // np.maximum(shape, 1))
        self._refuse(member, tensor, np.asarray(wild.any(axis=1))[form], "a stride that no region can hold")

    def _refuse(self, member: Member, tensor: Ids, wrong: Flags, why: str) -> None:
        """Raise for the first row that is ``wrong [n]``."""
        if wrong.any():
            row = int(np.argmax(wrong))
            raise LayoutError(member, f"row {row} has {why}", self.names.tensors[int(tensor[row])].name)


def _check_regions(party: Party, lengths: Ints) -> None:
    if len(lengths) and not 0 <= lengths.min() <= lengths.max() <= MAX_BYTES:
        raise LayoutError(party.member, "a region of impossible length")
    if not -1 <= party.layout.staging < len(lengths):
        raise LayoutError(party.member, f"staging is region {party.layout.staging} of {len(lengths)}")


def _check_range(member: Member, what: str, values: Ints, bound: int) -> None:
    if len(values) and not 0 <= values.min() <= values.max() < bound:
        raise LayoutError(member, f"a row points to {what} {int(values.min())}…{int(values.max())} of {bound}")
