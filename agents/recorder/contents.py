"""What the memory of a tensor holds while a loader runs: which boxes of it came from where.

A write replaces what was known of its bytes, whatever view it goes through: with another tensor's elements, with
something computed, or with constants, of which nothing is kept. Reading gives what is there at that moment; what
happens to the source afterwards does not change it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from weightsync.agents.recorder.boxes import (
    Ints,
    StridedView,
    TooManyPieces,
    decompose,
    dense_strides,
    intersection,
    is_dense,
    outside,
)
from weightsync.agents.recorder.chains import Cast, Chain, Function

MAX_PARTS: Final = 65_536
"""Boxes that one tensor may fall apart into while it is edited; see ``boxes.MAX_PIECES``."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A tensor as the checkpoint has it: what the loader is fed."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Found:
    """Elements of a checkpoint tensor (``near``, a view of its dense memory) at ``far`` in some other memory.

    Without a ``source`` they are computed in a way that no program repeats; ``opaque`` says how.
    """

    source: Checkpoint | None
    opaque: str
    near: StridedView
    far: StridedView
    chain: Chain

    def then(self, link: Cast | Function) -> Found:
        """The same elements after one more link."""
        return replace(self, chain=(*self.chain, link))


def computed(reason: str, far: StridedView) -> Found:
    """Elements at ``far`` that are computed; ``reason`` says how."""
    return Found(None, reason, far, far, ())


@dataclass(frozen=True, slots=True)
class _Part:
    """A box of a memory and what it holds: ``found.near`` has the box's sizes."""

    corner: Ints
    extent: Ints
    found: Found


class Contents:
    """One storage: boxes of ``base``, dense over it. Views must have the size of element that it was made with."""

    def __init__(self, keeper: torch.Tensor) -> None:
        """``keeper`` is any view of the storage, which must not be freed: another one could get its key."""
        self._keeper = keeper
        self._base = base_of(keeper)
        self._itemsize = keeper.element_size()
        self._parts: list[_Part] = []

    @classmethod
    def of(cls, source: Checkpoint, tensor: torch.Tensor) -> Contents:
        """``tensor``, contiguous, has just been fed as ``source``."""
        made = cls(tensor)
        whole = StridedView(source.shape, dense_strides(source.shape))
        made._parts = [_Part((0,) * len(source.shape), source.shape, Found(source, "", whole, whole, ()))]
        return made

    def names(self) -> list[str]:
        """Of everything that is in here."""
        return list(dict.fromkeys(p.found.source.name if p.found.source else p.found.opaque for p in self._parts))

    def read(self, tensor: torch.Tensor, far: StridedView) -> list[Found]:
        """What the elements of ``tensor``, a view of this memory, are, each at its place in ``far`` (same sizes)."""
        if tensor.element_size() != self._itemsize:
            # Strides count elements; a view of another element size does not fit the arithmetic.
            names = ", ".join(self.names())
            return [computed(f"{names} viewed as {tensor.dtype}, of another size", far)] if names else []
        return list(self._read(view_of(tensor), far))

    def _read(self, near: StridedView, far: StridedView) -> Iterator[Found]:
        for piece in decompose(self._base, near, far):
            for part in self._parts:
                shared = intersection(piece.corner, piece.extent, part.corner, part.extent)
                if shared is None:
                    continue
                # Both memories are walked from the shared corner on, each by its own strides.
                corner, extent = shared
                there = StridedView(extent, part.found.near.strides, moved(part.found.near, part.corner, corner))
                here = StridedView(extent, piece.strides, moved(piece.as_far_view(), piece.corner, corner))
                yield replace(part.found, near=there, far=here)

    def write(self, tensor: torch.Tensor, founds: Sequence[Found]) -> None:
        """``tensor``, a view of this memory, was assigned: ``founds`` (far: in here), and constants elsewhere."""
        place = view_of(tensor)
        try:
            if tensor.element_size() != self._itemsize:
                raise TooManyPieces(f"written as {tensor.dtype}, of another size")
            for hole in decompose(self._base, place, place):
                self._parts = [left for part in self._parts for left in _without(part, hole.corner, hole.extent)]
            for found in founds:
                for piece in decompose(self._base, found.far, found.near):
                    self._parts.append(_Part(piece.corner, piece.extent, replace(found, near=piece.as_far_view())))
            if len(self._parts) > MAX_PARTS:
                raise TooManyPieces(f"edited into more than {MAX_PARTS} boxes")
        except TooManyPieces as error:
            names = dict.fromkeys([*self.names(), *(f.source.name if f.source else f.opaque for f in founds)])
            whole = StridedView(self._base.sizes, self._base.strides)
            reason = f"{', '.join(names)}: {error}"
            self._parts = [_Part((0,) * len(whole.sizes), whole.sizes, computed(reason, whole))]


def _without(part: _Part, corner: Ints, extent: Ints) -> Iterator[_Part]:
    """What remains of ``part`` outside a box."""
    if intersection(part.corner, part.extent, corner, extent) is None:
        yield part
        return
    near = part.found.near
    for start, size in outside(part.corner, part.extent, corner, extent):
        left = StridedView(size, near.strides, moved(near, part.corner, start))
        yield _Part(start, size, replace(part.found, near=left))


def base_of(tensor: torch.Tensor) -> StridedView:
    """A dense view of the storage under ``tensor``: its own if that covers all of it, else the flat one."""
    view = view_of(tensor)
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    if view.offset == 0 and tensor.numel() == elements and is_dense(view):
        return view
    return StridedView((elements,), (1,))


def moved(view: StridedView, start: Sequence[int], corner: Sequence[int]) -> int:
    """The offset of ``corner`` in the memory of ``view``, whose first element is at ``start``."""
    return view.offset + sum((c - s) * stride for c, s, stride in zip(corner, start, view.strides, strict=True))


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of the storage that ``tensor`` is a view of; valid while the storage lives."""
    # data_ptr() would be 0 for every meta tensor.
    return int(tensor.untyped_storage()._cdata)


def view_of(tensor: torch.Tensor) -> StridedView:
    """Geometry of ``tensor`` in its storage, in elements."""
    return StridedView(tuple(tensor.size()), tuple(tensor.stride()), int(tensor.storage_offset()))


def in_bytes(view: StridedView, itemsize: int) -> StridedView:
    """``view`` with strides and offset in bytes instead of elements."""
    return StridedView(view.sizes, tuple(s * itemsize for s in view.strides), view.offset * itemsize)
