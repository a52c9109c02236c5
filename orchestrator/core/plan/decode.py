"""Layouts in columns: tensor names and row forms as small integers, checked as they come in.

A *form* is what rows of many layers have in common: the kind of tensor (dtype and shape), the box and the strides. A
model has hundreds of thousands of rows and a few hundred forms, so that geometry is computed per form only.
"""

import re
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

import numpy as np
from weightsync.orchestrator.core.plan.arrays import Flags, Ids, Ints, distinct_rows, extents_of, offsets_of, strides_of
from weightsync.orchestrator.core.plan.errors import DtypeMismatch, LayoutError, ShapeMismatch
from weightsync.orchestrator.core.plan.inputs import Party
from weightsync.orchestrator.protocol.layout import (
    ITEMSIZE,
    ROW_BOX,
    ROW_COLUMNS,
    ROW_OFFSET,
    ROW_REGION,
    ROW_TENSOR,
    Tensor,
    pad,
)
from weightsync.orchestrator.protocol.limits import MAX_RANK, MAX_ROWS, MAX_TENSORS
from weightsync.orchestrator.protocol.names import Member

MAX_BYTES: Final = 1 << 50
"""Of one tensor or region: keeps every sum of addresses within int64."""

NO_LAYER: Final = -1
_layer = re.compile(r"\.(\d+)\.")
_name = attrgetter("name")


class Names:
    """Logical tensors of all parties, numbered in order of first appearance; grows only."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._index: dict[str, int] = {}
        self._declared_by: list[tuple[int, Member]] = []
        self._kind_index: dict[tuple[str, tuple[int, ...]], int] = {}
        self._kinds: list[int] = []
        self._kind_array: Ids = np.zeros(0, np.int32)
        self._layers: list[int] = []
        self.kind_shape: list[tuple[int, ...]] = []
        self.kind_itemsize: list[int] = []

    def __len__(self) -> int:
        return len(self.tensors)

    def kinds(self) -> Ids:
        """Kind (dtype and shape) of each tensor."""
        if len(self._kind_array) != len(self._kinds):
            self._kind_array = np.array(self._kinds, np.int32)
        return self._kind_array

    def itemsize(self) -> Ints:
        """Bytes per element of each tensor."""
        return np.array(self.kind_itemsize, np.int64)[self.kinds()]

    def layers(self) -> Ids:
        """Layer of each tensor, by the first number between dots of its name; NO_LAYER without one."""
        return np.array(self._layers, np.int32)

    def ids(self, party: Party) -> Ids:
        """Number of each tensor of the party's table.

        Raises:
            LayoutError: an unknown dtype, too many dimensions, or a size that is none.
            ShapeMismatch, DtypeMismatch: another party declared the tensor differently.
        """
        tensors = party.layout.tensors
        if len(tensors) > MAX_TENSORS:
            raise LayoutError(party.member, f"{len(tensors)} tensors exceed the limit of {MAX_TENSORS}")
        ids = list(map(self._index.get, map(_name, tensors)))
        if None in ids:
            self._add(party.member, [t for t, known in zip(tensors, ids, strict=True) if known is None])
            ids = list(map(self._index.get, map(_name, tensors)))
        numbers = np.array(ids, np.int32)
        if list(map(self.tensors.__getitem__, numbers.tolist())) != list(tensors):
            self._explain_difference(party.member, tensors, numbers)
        return numbers

    def _add(self, member: Member, tensors: list[Tensor]) -> None:
        self._declared_by.append((len(self.tensors), member))
        for tensor in tensors:
            if tensor.name in self._index:
                continue
            self._kinds.append(self._kind(member, tensor))
            self._index[tensor.name] = len(self.tensors)
            self.tensors.append(tensor)
            found = _layer.search(tensor.name)
            self._layers.append(min(int(found.group(1)), 1 << 30) if found else NO_LAYER)

    def _kind(self, member: Member, tensor: Tensor) -> int:
        key = (tensor.dtype, tensor.shape)
        known = self._kind_index.get(key)
        if known is not None:
            return known
        itemsize = ITEMSIZE.get(tensor.dtype)
        if itemsize is None:
            raise LayoutError(member, f"dtype {tensor.dtype!r} is not one that may travel", tensor.name)
        if len(tensor.shape) > MAX_RANK:
            raise LayoutError(member, f"{len(tensor.shape)} dimensions; at most {MAX_RANK}", tensor.name)
        size = itemsize
        for extent in tensor.shape:
            size *= extent
        if min(tensor.shape, default=1) < 0 or size > MAX_BYTES:
            raise LayoutError(member, f"impossible shape {tensor.shape}", tensor.name)
        self._kind_index[key] = len(self.kind_shape)
        self.kind_shape.append(pad(tensor.shape, 1))
        self.kind_itemsize.append(itemsize)
        return self._kind_index[key]

    def _explain_difference(self, member: Member, tensors: tuple[Tensor, ...], numbers: Ids) -> None:
        for tensor, number in zip(tensors, numbers.tolist(), strict=True):
            known = self.tensors[number]
            if known == tensor:
                continue
            first = next(who for start, who in reversed(self._declared_by) if start <= number)
            if known.shape != tensor.shape:
                raise ShapeMismatch(tensor.name, first, known.shape, member, tensor.shape)
            raise DtypeMismatch(tensor.name, first, known.dtype, member, tensor.dtype)


class Forms:
    """The distinct (kind, box, strides) of rows, numbered in order of first appearance; grows only."""

    def __init__(self) -> None:
        self._index: dict[bytes, int] = {}
        self._rows: list[Ints] = []

    def __len__(self) -> int:
        return len(self._index)

    def ids(self, keys: Ints) -> Ids:
        """Number of each row of ``keys`` ``[n, 1 + 3 * MAX_RANK]`` (kind, then box and strides as in a layout)."""
        rows, index = distinct_rows(keys)
        numbers = np.empty(len(rows), np.int32)
        for i, form in enumerate(rows):
            numbers[i] = self._index.setdefault(form.tobytes(), len(self._index))
            if numbers[i] == len(self._rows):
                self._rows.append(form)
        return numbers[index]

    def table(self) -> "FormTable":
        """All forms so far, as columns."""
        width = 1 + 3 * MAX_RANK
        matrix = np.array(self._rows, np.int64).reshape(-1, width)
        padded = np.concatenate([np.zeros((len(matrix), ROW_BOX - 1), np.int64), matrix], axis=1)
        return FormTable(matrix[:, 0].copy(), offsets_of(padded), extents_of(padded), strides_of(padded))


@dataclass(frozen=True, slots=True)
class FormTable:
    """``kind [n]``; ``offset``, ``extent`` in elements and ``stride`` in bytes, each ``[n, MAX_RANK]``."""

    kind: Ints
    offset: Ints
    extent: Ints
    stride: Ints


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one layout in columns ``[n]``: tensor number, form, region, byte offset, index in the layout."""

    tensor: Ids
    form: Ids
    region: Ids
    offset: Ints
    index: Ids


class Decoder:
    """Turns layouts into Rows; one per plan and its successors, because the numbers are shared."""

    def __init__(self) -> None:
        self.names = Names()
        self.forms = Forms()

    def rows(self, party: Party) -> tuple[Rows, Ids]:
        """The party's rows without empty boxes, each checked against the tables that it points into, and the number of
        each tensor of its table.

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
        numbers = self.names.ids(party)
        lengths = np.array([r.length for r in layout.regions], np.int64)
        _check_regions(party, lengths)
        _check_range(member, "tensor", matrix[:, ROW_TENSOR], len(numbers))
        _check_range(member, "region", matrix[:, ROW_REGION], len(lengths))
        tensor = numbers[matrix[:, ROW_TENSOR]]
        kept = np.flatnonzero((extents_of(matrix) > 0).all(axis=1))
        if len(kept) < len(matrix):
            matrix, tensor = matrix[kept], tensor[kept]
        keys = np.empty((len(matrix), 1 + ROW_COLUMNS - ROW_BOX), np.int64)
        keys[:, 0] = self.names.kinds()[tensor]
        keys[:, 1:] = matrix[:, ROW_BOX:]
        self._check_boxes(member, tensor, matrix, keys, lengths)
        region = matrix[:, ROW_REGION].astype(np.int32)
        form = self.forms.ids(keys)
        return Rows(tensor, form, region, matrix[:, ROW_OFFSET].copy(), kept.astype(np.int32)), numbers

    def _check_boxes(self, member: Member, tensor: Ids, matrix: Ints, keys: Ints, lengths: Ints) -> None:
        if len(matrix) == 0:
            return
        shape = np.array(self.names.kind_shape, np.int64)[keys[:, 0]]
        itemsize = np.array(self.names.kind_itemsize, np.int64)[keys[:, 0]]
        offset, extent, stride = offsets_of(matrix), extents_of(matrix), strides_of(matrix)
        outside = np.asarray(((offset < 0) | (offset > shape) | (extent > shape - offset)).any(axis=1))
        self._refuse(member, tensor, outside, "a box outside of the tensor's shape")
        wild = np.asarray(((stride < 0) | (stride > MAX_BYTES // np.maximum(shape, 1))).any(axis=1))
        self._refuse(member, tensor, wild, "a stride that no region can hold")
        end = matrix[:, ROW_OFFSET] + ((extent - 1) * stride).sum(axis=1) + itemsize
        beyond = (matrix[:, ROW_OFFSET] < 0) | (end > lengths[matrix[:, ROW_REGION]])
        self._refuse(member, tensor, beyond, "bytes outside of its region")

    def _refuse(self, member: Member, tensor: Ids, wrong: Flags, why: str) -> None:
        if wrong.any():
            at = int(np.argmax(wrong))
            raise LayoutError(member, f"row {at} has {why}", self.names.tensors[tensor[at]].name)


def _check_regions(party: Party, lengths: Ints) -> None:
    if len(lengths) and (lengths.min() < 0 or lengths.max() > MAX_BYTES):
        raise LayoutError(party.member, "a region of impossible length")
    if not -1 <= party.layout.staging < len(lengths):
        raise LayoutError(party.member, f"staging is region {party.layout.staging} of {len(lengths)}")


def _check_range(member: Member, what: str, values: Ints, bound: int) -> None:
    if len(values) and (values.min() < 0 or values.max() >= bound):
        raise LayoutError(member, f"a row points to {what} {int(values.min())}…{int(values.max())} of {bound}")
