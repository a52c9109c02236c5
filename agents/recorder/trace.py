"""Watches a weight loader at work on tensors without storage and writes down which bytes would have gone where.

Every logical tensor and every parameter is a tensor on torch's meta device: views of it carry exact sizes, strides and
offsets and share its (empty) storage, so torch itself does the arithmetic of every narrow, chunk, transpose and
reshape. Only ``copy_`` and the few operations that make a new tensor out of old elements need watching. Anything that
computes with values makes its result *opaque*; a parameter that receives an opaque value is refused by name later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from weightsync.agents.errors import AgentError
from weightsync.agents.recorder.boxes import (
    BoxPiece,
    StridedView,
    TooManyPieces,
    decompose,
    dense_strides,
    intersection,
)

aten = torch.ops.aten
DtypeChain: TypeAlias = tuple[torch.dtype, ...]


class RecordError(AgentError):
    """The layout of this model cannot be recorded; the engine must not start with it. Retrying does not help."""

    fault = "engine"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A tensor as the checkpoint has it: what the loader is fed."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Landing:
    """A box of a checkpoint tensor and the bytes of a storage that it fills.

    ``place`` is in bytes: sizes are those of the box. ``dtype`` is how its elements travel: the checkpoint's when the
    loader copies them as they are, else the parameter's.
    """

    storage: int
    source: Checkpoint
    corner: tuple[int, ...]
    place: StridedView
    dtype: torch.dtype


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


@dataclass(slots=True)
class _CopiedBox:
    """A box of a temporary tensor and the older tensor that its elements were taken from."""

    corner: tuple[int, ...]
    extent: tuple[int, ...]
    origin: _Origin
    view: StridedView
    chain: DtypeChain


@dataclass(slots=True)
class _Origin:
    """What a tracked storage is: a checkpoint tensor, a parameter's storage, a temporary, or an opaque value."""

    keeper: torch.Tensor
    base: StridedView
    source: Checkpoint | None = None
    target: int | None = None
    opaque: str = ""
    parts: list[_CopiedBox] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _FoundBox:
    """A box of a checkpoint tensor (or of an opaque one) inside some far memory."""

    source: Checkpoint | None
    opaque: str
    piece: BoxPiece
    chain: DtypeChain


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


class LoadTracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode under which ``load_weights`` is run; afterwards ``writes`` says what it did."""

    def __init__(self, targets: Sequence[torch.Tensor]) -> None:
        """``targets``: one meta tensor per storage of the model (any dtype); ``Write.storage`` indexes them."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.writes: list[Write] = []
        self.current = ""
        self._origins: dict[int, _Origin] = {}
        for index, tensor in enumerate(targets):
            self._origins[storage_key(tensor)] = _Origin(tensor, view_of(tensor), target=index)

    def feed(self, checkpoint: Iterable[Checkpoint]) -> Iterator[tuple[str, torch.Tensor]]:
        """The iterator for ``load_weights``: names and meta tensors that are tracked from here on."""
        for entry in checkpoint:
            self.current = entry.name
            tensor = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            base = StridedView(entry.shape, dense_strides(entry.shape))
            # The origin keeps the tensor: a freed storage's key could be given to the next one.
            self._origins[storage_key(tensor)] = _Origin(tensor, base, source=entry)
            yield entry.name, tensor
        self.current = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        handler = _HANDLERS.get(func.overloadpacket)
        if handler is not None:
            return handler(self, func, args, kwargs)
        if getattr(func, "is_view", False):
            return func(*args, **kwargs)  # shares its storage, and with it what is known of it
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        tracked = [t for t in inputs if storage_key(t) in self._origins]
        if not tracked or func.overloadpacket in _MAKERS:
            return func(*args, **kwargs)
        reason = f"{func} of {self._describe(tracked)}"
        out = func(*args, **kwargs)
        known = {storage_key(t) for t in inputs}  # results that alias an input are that input, written below
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and storage_key(leaf) not in known:
                self._origins[storage_key(leaf)] = _Origin(leaf, view_of(leaf), opaque=reason)
        for index, argument in enumerate(func._schema.arguments):
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor):
                self._invalidate(value, reason)
        return out

    def _describe(self, tensors: Sequence[torch.Tensor]) -> str:
        names = []
        for tensor in tensors:
            origin = self._origins[storage_key(tensor)]
            names.append(origin.source.name if origin.source else origin.opaque or "a parameter")
        return ", ".join(dict.fromkeys(names))

    def _invalidate(self, tensor: torch.Tensor, reason: str) -> None:
        """``tensor``'s elements no longer are what they were; without a reason they are constants now."""
        origin = self._origins.get(storage_key(tensor))
        if origin is None:
            return
        if origin.target is not None:
            place = in_bytes(view_of(tensor), tensor.element_size())
            size = tensor.element_size()
            marks = (OpaqueBytes(origin.target, place, size, reason),) if reason else ()
            self.writes.append(Write(origin.target, place, size, marks))
        elif reason:
            origin.opaque = reason

    def find(self, near: torch.Tensor, far: StridedView, chain: DtypeChain) -> list[_FoundBox]:
        """Where the elements of ``near`` come from, laid out in the memory of ``far`` (same sizes, in elements)."""
        origin = self._origins.get(storage_key(near))
        if origin is None:
            return []
        # Strides count elements; a view of another element size does not fit the arithmetic. Targets yield no boxes.
        if near.element_size() != origin.keeper.element_size() and origin.target is None:
            near_name = self._describe([near])
            origin = _Origin(near, view_of(near), opaque=f"{near_name} viewed as {near.dtype}, of another size")
        return list(_resolve(origin, view_of(near), far, (near.dtype, *chain)))

    def derive(self, out: torch.Tensor, pieces: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """``out`` is a new tensor; each pair is a view of it and the tensor whose elements it took."""
        origin = self._origins.get(storage_key(out))
        if origin is None:
            base = StridedView(tuple(out.size()), tuple(out.stride()))
            origin = self._origins[storage_key(out)] = _Origin(out, base)
        for view, source in pieces:
            taken = self._origins.get(storage_key(source))
            if taken is None or not source.numel():
                continue  # untracked elements are constants, and the place of a constant needs no box
            if source.element_size() != taken.keeper.element_size() or view.element_size() != out.element_size():
                taken = _Origin(source, view_of(source), opaque=f"{self._describe([source])} viewed as {source.dtype}")
            chain = (source.dtype, out.dtype)
            # A box of the temporary for each run of the view over it, so that later views intersect boxes only.
            for piece in decompose(origin.base, view_of(view), view_of(source)):
                origin.parts.append(_CopiedBox(piece.corner, piece.extent, taken, piece.as_far_view(), chain))

    def copied(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """``destination.copy_(source)``; sizes may broadcast."""
        if source.size() != destination.size():
            source = source.expand(destination.size())
        origin = self._origins.get(storage_key(destination))
        if origin is None or origin.target is None:  # into a temporary: remembered, but nothing is written yet
            if storage_key(source) in self._origins:
                if origin is None:
                    # Made by an operation that tells nothing of its shape: boxes of its flat storage.
                    flat = (destination.untyped_storage().nbytes() // destination.element_size(),)
                    self._origins[storage_key(destination)] = _Origin(destination, StridedView(flat, (1,)))
                self.derive(destination, [(destination, source)])
            return
        size = destination.element_size()
        place = in_bytes(view_of(destination), size)
        marks: list[Mark] = []
        try:
            for found in self.find(source, view_of(destination), (destination.dtype,)):
                marks.append(self._mark(origin.target, found, destination))
        except TooManyPieces as error:  # refused later with all others of its kind, each by name
            marks = [OpaqueBytes(origin.target, place, size, f"{self._describe([source])}: {error}")]
        self.writes.append(Write(origin.target, place, size, tuple(marks)))

    def _mark(self, target: int, found: _FoundBox, destination: torch.Tensor) -> Mark:
        size = destination.element_size()
        place = in_bytes(found.piece.as_far_view(), size)
        if found.source is None:
            return OpaqueBytes(target, place, size, found.opaque)
        dtype = _travelling_dtype(found.source.dtype, found.chain)
        if dtype is None:
            steps = " to ".join(str(d).removeprefix("torch.") for d in found.chain)
            return OpaqueBytes(target, place, size, f"{found.source.name} is converted more than once: {steps}")
        return Landing(target, found.source, found.piece.corner, place, dtype)


def _travelling_dtype(source: torch.dtype, chain: DtypeChain) -> torch.dtype | None:
    """The wire dtype of elements of ``source`` dtype that pass through ``chain``, None if bytes cannot stand for it.

    ``chain`` lists (dtype seen, dtype stored) pairs flattened, ending with the parameter's.
    """
    distinct = [d for i, d in enumerate(chain) if i == 0 or d != chain[i - 1]]
    if len(distinct) == 1:
        # Copied as it is: under its own dtype, or reinterpreted under one of the same size.
        return source if distinct[0].itemsize == source.itemsize else None
    if len(distinct) == 2 and distinct[0] == source:
        return distinct[1]  # one cast gives the same values at the sender as in the loader
    return None


def _resolve(origin: _Origin, near: StridedView, far: StridedView, chain: DtypeChain) -> Iterator[_FoundBox]:
    if origin.opaque or origin.target is not None:
        reason = origin.opaque or "the value of another parameter"
        yield _FoundBox(None, reason, BoxPiece((0,) * len(far.sizes), far.sizes, far.offset, far.strides), chain)
        return
    for piece in decompose(origin.base, near, far):
        if origin.source is not None:
            yield _FoundBox(origin.source, "", piece, chain)
            continue
        for part in origin.parts:
            shared = intersection(piece.corner, piece.extent, part.corner, part.extent)
            if shared is None:
                continue
            # Both memories are walked from the shared corner on, each by its own strides.
            corner, extent = shared
            yield from _resolve(
                part.origin,
                StridedView(extent, part.view.strides, _moved(part.view, part.corner, corner)),
                StridedView(extent, piece.strides, _moved(piece.as_far_view(), piece.corner, corner)),
                (*part.chain, *chain),
            )


def _moved(view: StridedView, start: Sequence[int], corner: Sequence[int]) -> int:
    return view.offset + sum((c - s) * stride for c, s, stride in zip(corner, start, view.strides, strict=True))


# ------------------------------------------------------------------------------------------------ operations
Handler: TypeAlias = Callable[[LoadTracer, Any, tuple[Any, ...], dict[str, Any]], Any]


def _copy_(tracer: LoadTracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tracer.copied(args[0], args[1])
    return args[0]


def _clone(tracer: LoadTracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args[0].is_meta:
        # A loader may move what it was fed to its device; stand-ins stay where no memory is.
        kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "non_blocking")}
    out = func(*args, **kwargs)
    tracer.derive(out, [(out, args[0])])
    return out


def _cat(tracer: LoadTracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors: Sequence[torch.Tensor] = args[0]
    dim = int(args[1] if len(args) > 1 else kwargs.get("dim", 0))
    out = func(*args, **kwargs)
    pairs, start = [], 0
    for tensor in tensors:
        if tensor.numel():
            pairs.append((out.narrow(dim, start, tensor.size(dim)), tensor))
            start += tensor.size(dim)
    tracer.derive(out, pairs)
    return out


def _stack(tracer: LoadTracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dim = int(args[1] if len(args) > 1 else kwargs.get("dim", 0))
    out = func(*args, **kwargs)
    tracer.derive(out, [(out.select(dim, index), tensor) for index, tensor in enumerate(args[0])])
    return out


def _pad(tracer: LoadTracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    source, padding = args[0], args[1]
    out = func(*args, **kwargs)
    inner_out, inner_source = out, source
    # Pairs of (before, after), the last dimension first; a negative number cuts instead of padding.
    for pair in range(len(padding) // 2):
        before, after, dim = padding[2 * pair], padding[2 * pair + 1], source.dim() - 1 - pair
        kept = source.size(dim) + min(before, 0) + min(after, 0)
        inner_source = inner_source.narrow(dim, max(-before, 0), kept)
        inner_out = inner_out.narrow(dim, max(before, 0), kept)
    tracer.derive(out, [(inner_out, inner_source)])
    return out


def _fill(tracer: LoadTracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tracer._invalidate(args[0], "")
    return func(*args, **kwargs)


_HANDLERS: dict[Any, Handler] = {
    aten.copy_: _copy_,
    aten.clone: _clone,
    aten._to_copy: _clone,
    aten.cat: _cat,
    aten.stack: _stack,
    aten.constant_pad_nd: _pad,
    aten.fill_: _fill,
    aten.zero_: _fill,
}
_MAKERS = frozenset(
    {aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like, aten.new_empty, aten.new_zeros, aten.new_ones,
     aten.new_full, aten.new_empty_strided, aten.empty_strided}
)  # fmt: skip
"""Operations that take a tensor for its shape and dtype only."""
