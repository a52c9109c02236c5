"""Logical tensors of all parties as small integers, their declarations checked against each other."""

import hashlib
import re
from operator import attrgetter
from typing import Final, cast

import msgspec
import numpy as np
from weightsync.orchestrator.planner.arrays import Growing, Ids
from weightsync.orchestrator.planner.errors import DtypeMismatch, LayoutError, ShapeMismatch
from weightsync.orchestrator.planner.inputs import Party
from weightsync.orchestrator.protocol.layout import ITEMSIZE, Tensor, pad
from weightsync.orchestrator.protocol.limits import MAX_RANK, MAX_TENSORS
from weightsync.orchestrator.protocol.names import Member

MAX_BYTES: Final = 1 << 50
"""Of one tensor, region or stride: keeps every sum of addresses within int64."""

NO_LAYER: Final = -1
_encoder = msgspec.msgpack.Encoder()
_layer = re.compile(r"\.(\d{1,6})\.").search
_name = attrgetter("name")


class Names:
    """Numbers tensors in order of first appearance; grows only.

    A *kind* is a dtype and a shape, which most tensors share with those of other layers: ``kind_shape`` is padded to
    MAX_RANK dimensions, ``kind_itemsize`` is in bytes.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.kind_shape: list[tuple[int, ...]] = []
        self.kind_itemsize: list[int] = []
        self._index: dict[Tensor, int] = {}
        self._by_name: dict[str, int] = {}
        self._tables: dict[bytes, Ids] = {}
        self._declared_by: list[tuple[int, Member]] = []
        self._kind_index: dict[tuple[str, tuple[int, ...]], int] = {}
        self._kinds = Growing()
        self._layers = Growing()

    def __len__(self) -> int:
        return len(self.tensors)

    def kinds(self) -> Ids:
        """Kind (dtype and shape) of each tensor."""
        return self._kinds.view()

    def layers(self) -> Ids:
        """Layer of each tensor, by the first number between dots of its name; NO_LAYER without one."""
        return self._layers.view()

    def ids(self, party: Party) -> tuple[Ids, bytes]:
        """Number of each tensor of the party's table, and a digest of the table.

        Raises:
            LayoutError: an unknown dtype, too many dimensions, or a size that is none.
            ShapeMismatch, DtypeMismatch: another party declared the tensor differently.
        """
        tensors = party.layout.tensors
        if len(tensors) > MAX_TENSORS:
            raise LayoutError(party.member, f"{len(tensors)} tensors exceed the limit of {MAX_TENSORS}")
        digest = hashlib.sha256(_encoder.encode(tensors)).digest()
        # Ranks of one engine declare the same tensors: equal tables are looked up once.
        known = self._tables.get(digest)
        if known is None:
            numbers = list(map(self._index.get, tensors))
            if None in numbers:
                self._add(party.member, [t for t, number in zip(tensors, numbers, strict=True) if number is None])
                numbers = list(map(self._index.get, tensors))
            known = self._tables[digest] = np.array(numbers, np.int32)
        return known, digest

    def _add(self, member: Member, unknown: list[Tensor]) -> None:
        """Number tensors that no party has declared before, or raise where they contradict an earlier declaration."""
        # Whole lists go through ``map``, which is quick: a large mixture of experts has over 100,000 tensors.
        fresh = list(dict.fromkeys(unknown))
        declared = list(map(self._by_name.get, map(_name, fresh)))
        if any(number is not None for number in declared):
            self._explain_difference(member, fresh, declared)
        known = self._kind_index.get
        kinds = [known((t.dtype, t.shape)) for t in fresh]
        if None in kinds:
            kinds = [self._kind(member, tensor) for tensor in fresh]
        first = len(self.tensors)
        self._declared_by.append((first, member))
        numbers = range(first, first + len(fresh))
        self._by_name.update(zip(map(_name, fresh), numbers, strict=True))
        # Fewer names than tensors: two of them, which differ otherwise, have the same one.
        if len(self._by_name) != first + len(fresh):
            raise LayoutError(member, "its table declares a tensor in two ways", _declared_twice(fresh))
        self._index.update(zip(fresh, numbers, strict=True))
        self.tensors.extend(fresh)
        self._kinds.extend(cast(list[int], kinds))
        self._layers.extend([_layer_of(tensor.name) for tensor in fresh])

    def _kind(self, member: Member, tensor: Tensor) -> int:
        """Number of the tensor's dtype and shape, checked when they are met for the first time."""
        key = (tensor.dtype, tensor.shape)
        known = self._kind_index.get(key)
        if known is not None:
            return known
        itemsize = ITEMSIZE.get(tensor.dtype)
        if itemsize is None:
            raise LayoutError(member, f"dtype {tensor.dtype!r} is not one that may travel", tensor.name)
        if len(tensor.shape) > MAX_RANK:
            raise LayoutError(member, f"{len(tensor.shape)} dimensions; at most {MAX_RANK}", tensor.name)
        # In Python's integers: a product in int64 could wrap around and look small.
        size = itemsize
        for extent in tensor.shape:
            size *= max(extent, 1)
        if min(tensor.shape, default=0) < 0 or size > MAX_BYTES:
            raise LayoutError(member, f"impossible shape {tensor.shape}", tensor.name)
        self._kind_index[key] = len(self.kind_shape)
        self.kind_shape.append(pad(tensor.shape, 1))
        self.kind_itemsize.append(itemsize)
        return self._kind_index[key]

    def _explain_difference(self, member: Member, tensors: list[Tensor], numbers: list[int | None]) -> None:
        """Raise for the first of ``tensors`` whose name another party declared otherwise."""
        tensor, number = next((t, n) for t, n in zip(tensors, numbers, strict=True) if n is not None)
        known = self.tensors[number]
        first = next(who for start, who in reversed(self._declared_by) if start <= number)
        if known.shape != tensor.shape:
            raise ShapeMismatch(tensor.name, first, known.shape, member, tensor.shape)
        raise DtypeMismatch(tensor.name, first, known.dtype, member, tensor.dtype)


def _declared_twice(tensors: list[Tensor]) -> str:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            return tensor.name
        seen.add(tensor.name)
    return ""


def _layer_of(name: str) -> int:
    parts = name.split(".", 3)
    if len(parts) == 4 and parts[2].isdecimal() and not parts[1].isdecimal() and len(parts[2]) < 7:
        return int(parts[2])  # model.layers.N.…: most names, and quicker than the expression.
    found = _layer(name)
    return int(found.group(1)) if found else NO_LAYER
