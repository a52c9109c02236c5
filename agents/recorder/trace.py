"""Watches a weight loader at work on tensors without storage and writes down which bytes would have gone where.

Every logical tensor and every parameter is a tensor on torch's meta device: views of it carry exact sizes, strides and
offsets and share its (empty) storage, so torch itself does the arithmetic of every narrow, chunk, transpose and
reshape. Only operations that move, change or make elements need watching (``operations``). What computes with values
makes its result *opaque*, unless it is a chain of elementwise functions (``chains``); a parameter that receives an
opaque value is refused by name later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import torch
from weightsync.agents.errors import AgentError
from weightsync.agents.recorder.boxes import StridedView, TooManyPieces, decompose, dense_strides, is_dense
from weightsync.agents.recorder.chains import Cast, Chain, Function, described, travelling
from weightsync.agents.recorder.contents import (
    Checkpoint,
    Contents,
    Found,
    computed,
    in_bytes,
    moved,
    storage_key,
    view_of,
)

MAX_NAMES: Final = 4
"""Tensors that one reason names; more of them say no more."""


class RecordError(AgentError):
    """The layout of this model cannot be recorded; the engine must not start with it. Retrying does not help."""

    fault = "engine"


@dataclass(frozen=True, slots=True)
class Landing:
    """A box of a checkpoint tensor and the bytes of a storage that it fills.

    ``place`` is in bytes: sizes are those of the box. ``dtype`` is how its elements travel: the checkpoint's when the
    loader copies them as they are, else the parameter's. With a ``program`` what travels is not what the bytes hold:
    the engine makes them from it, and ``dtype`` has the size of the parameter's.
    """

    storage: int
    source: Checkpoint
    corner: tuple[int, ...]
    place: StridedView
    dtype: torch.dtype
    program: Chain = ()


@dataclass(frozen=True, slots=True)
class OpaqueBytes:
    """Bytes of a storage that are computed from the checkpoint's, and how."""

    storage: int
    place: StridedView
    itemsize: int
    reason: str


Mark: TypeAlias = Landing | OpaqueBytes


@dataclass(frozen=True, slots=True)
class Write:
    """One assignment into a storage, in the loader's order. Marks lie inside ``place`` (bytes, of ``itemsize``).

    What of ``place`` no mark covers becomes a constant.
    """

    storage: int
    place: StridedView
    itemsize: int
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class _Assigned:
    """A write into a target, and what was found in its source: for loaders that read a parameter again."""

    write: Write
    founds: tuple[Found, ...]


class LoadTracer:
    """What is known of every tensor while ``load_weights`` runs; afterwards ``writes`` says what it did."""

    def __init__(self, targets: Sequence[torch.Tensor], names: Sequence[str] = ()) -> None:
        """``targets``: one meta tensor per storage of the model (any dtype); ``Write.storage`` indexes them.

        ``names`` are what to call them in reasons.
        """
        self.current = ""
        self.computed = ""
        """What the loader computed last: what it looks at, if it does."""
        self._contents: dict[int, Contents] = {}
        self._keepers = list(targets)
        self._targets = {storage_key(tensor): index for index, tensor in enumerate(targets)}
        self._names = names or [f"parameter {index}" for index in range(len(targets))]
        self._assigned: list[list[_Assigned]] = [[] for _ in targets]
        self.writes: list[Write] = []

    def feed(self, checkpoint: Iterable[Checkpoint]) -> Iterator[tuple[str, torch.Tensor]]:
        """The iterator for ``load_weights``: names and meta tensors that are tracked from here on."""
        for entry in checkpoint:
            self.current = entry.name
            tensor = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            self._contents[storage_key(tensor)] = Contents.of(entry, tensor)
            yield entry.name, tensor
        self.current = ""

    # ------------------------------------------------------------------------------------------- what memory holds
    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` lies in a target, or in memory that something of the checkpoint came to."""
        key = storage_key(tensor)
        return key in self._targets or key in self._contents

    def loaded(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` lies outside the targets and holds something of the checkpoint."""
        contents = self._contents.get(storage_key(tensor))
        return contents is not None and bool(contents.names())

    def describe(self, tensors: Sequence[torch.Tensor]) -> str:
        """Names of what ``tensors`` hold."""
        names: list[str] = []
        for tensor in tensors:
            index = self._targets.get(storage_key(tensor))
            if index is None:
                names += self._contents[storage_key(tensor)].names()
            else:
                founds = (found for assigned in self._assigned[index] for found in assigned.founds)
                loaded = dict.fromkeys(f.source.name for f in founds if f.source)
                names.append(f"{self._names[index]}{' with ' if loaded else ''}{_few(list(loaded))}")
        return _few(list(dict.fromkeys(names)))

    def find(self, tensor: torch.Tensor, far: StridedView) -> list[Found]:
        """What the elements of ``tensor`` are, laid out in the memory of ``far`` (same sizes, in elements).

        Raises:
            TooManyPieces: a shuffle of elements.
        """
        if not self.knows(tensor):
            return []
        if tensor.is_neg() or tensor.is_conj():
            return [computed(f"a negated view of {self.describe([tensor])}", far)]
        index = self._targets.get(storage_key(tensor))
        if index is not None:
            return self._find_in_target(index, tensor, far)
        return self._contents[storage_key(tensor)].read(tensor, far)

    def _find_in_target(self, index: int, tensor: torch.Tensor, far: StridedView) -> list[Found]:
        view = view_of(tensor)
        place = in_bytes(view, tensor.element_size())
        base = StridedView(view.sizes, view.strides)
        for assigned in reversed(self._assigned[index]):
            same = assigned.write.place == place and assigned.write.itemsize == tensor.element_size()
            if same and is_dense(base):
                return [again for found in assigned.founds for again in _read_again(found, base, view.offset, far)]
            if same or _may_overlap(assigned.write.place, place):
                break
        return [computed(f"the value of {self.describe([tensor])}", far)]

    # ----------------------------------------------------------------------------------------------- what is assigned
    def derive(
        self, out: torch.Tensor, pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], link: Function | None = None
    ) -> None:
        """``out`` is a new tensor; each pair is a view of it and the tensor whose elements it took (through a step)."""
        if any(self.knows(source) for _, source in pieces):
            self._contents[storage_key(out)] = Contents(out)
            for view, source in pieces:
                self.copied(view, source, link)

    def copied(self, destination: torch.Tensor, source: torch.Tensor, link: Cast | Function | None = None) -> None:
        """``destination.copy_(source)``, or the result of a step; sizes may broadcast."""
        if source.size() != destination.size():
            source = source.expand(destination.size())
        link = link or Cast(source.dtype, destination.dtype)
        view = view_of(destination)
        try:
            founds = [found.then(link) for found in self.find(source, view)]
        except TooManyPieces as error:  # refused later with all others of its kind, each by name
            founds = [computed(f"{self.describe([source])}: {error}", view)]
        self.assign(destination, founds)

    def assign(self, destination: torch.Tensor, founds: Sequence[Found]) -> None:
        """The elements of ``destination`` are ``founds`` now (far: in its memory), and constants elsewhere."""
        key = storage_key(destination)
        index = self._targets.get(key)
        if index is None:
            if founds and key not in self._contents:
                self._contents[key] = Contents(destination)
            if key in self._contents:
                self._contents[key].write(destination, founds)
            return
        size = destination.element_size()
        place = in_bytes(view_of(destination), size)
        try:
            marks = tuple(mark for found in founds for mark in self._marks(index, found, size))
        except TooManyPieces as error:
            names = _few([found.source.name for found in founds if found.source])
            marks = (OpaqueBytes(index, place, size, f"{names}: {error}"),)
        write = Write(index, place, size, marks)
        self.writes.append(write)
        self._assigned[index].append(_Assigned(write, tuple(founds)))

    def spoil(self, destination: torch.Tensor, reason: str) -> None:
        """The elements of ``destination`` are computed now, as ``reason`` says."""
        self.computed = reason
        self.assign(destination, [computed(reason, view_of(destination))])

    def _marks(self, index: int, found: Found, size: int) -> Iterator[Mark]:
        source = found.source
        if source is None:
            yield OpaqueBytes(index, in_bytes(found.far, size), size, found.opaque)
            return
        fate = travelling(source.dtype, found.chain)
        if fate is None or (fate[1] and fate[0].itemsize != size):
            dtype = str(source.dtype).removeprefix("torch.")
            reason = f"{source.name} is converted more than once: {dtype} to {described(found.chain)}"
            yield OpaqueBytes(index, in_bytes(found.far, size), size, reason)
            return
        base = StridedView(source.shape, dense_strides(source.shape))
        for piece in decompose(base, found.near, found.far):
            yield Landing(index, source, piece.corner, in_bytes(piece.as_far_view(), size), *fate)


def _read_again(found: Found, base: StridedView, offset: int, far: StridedView) -> Iterator[Found]:
    """``found`` was assigned to a dense view at ``offset``; the same view is read into ``far``."""
    place = replace(found.far, offset=found.far.offset - offset)
    for piece in decompose(base, place, found.near):
        start = moved(far, (0,) * len(piece.corner), piece.corner)
        yield replace(found, near=piece.as_far_view(), far=StridedView(piece.extent, far.strides, start))


def _may_overlap(place: StridedView, other: StridedView) -> bool:
    (first, last), (begin, end) = _span(place), _span(other)
    return first <= end and begin <= last


def _span(place: StridedView) -> tuple[int, int]:
    return place.offset, place.offset + sum((n - 1) * s for n, s in zip(place.sizes, place.strides, strict=True))


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
