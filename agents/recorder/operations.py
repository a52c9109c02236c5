"""What each operation of a loader does to where elements come from.

Operations are known, views, makers of fresh tensors, or none of these: then their results are opaque, and so is all
that they write to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from weightsync.agents.recorder.chains import functional, step_of
from weightsync.agents.recorder.contents import storage_key
from weightsync.agents.recorder.trace import LoadTracer

aten = torch.ops.aten
Handler: TypeAlias = Callable[[LoadTracer, Any, tuple[Any, ...], dict[str, Any]], Any]


class Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The mode under which ``load_weights`` runs: tells ``tracer`` of every operation."""

    def __init__(self, tracer: LoadTracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tracer = tracer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _perform(self._tracer, func, args, dict(kwargs or {}))


def _perform(tracer: LoadTracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    handler = _HANDLERS.get(func.overloadpacket)
    if handler is not None:
        return _into(tracer, handler, func, args, kwargs) if "out" in kwargs else handler(tracer, func, args, kwargs)
    if getattr(func, "is_view", False) or func.overloadpacket in _RESHAPERS:
        return func(*args, **kwargs)  # shares its storage, and with it what is known of it
    inputs = leaves(args, kwargs)
    tracked = [tensor for tensor in inputs if tracer.knows(tensor)]
    if not tracked or func.overloadpacket in _MAKERS:
        return func(*args, **kwargs)
    if len(inputs) == 1 and step_of(functional(func) or func, args, kwargs, inputs[0].dtype) is not None:
        return _elementwise(tracer, func, args, kwargs)
    reason = f"{func} of {tracer.describe(tracked)}"
    out = func(*args, **kwargs)
    known = {storage_key(tensor) for tensor in inputs}  # results that alias an input are that input, written below
    for leaf in leaves(out):
        if storage_key(leaf) not in known:
            tracer.spoil(leaf, reason)
    for tensor in written(func, args, kwargs):
        tracer.spoil(tensor, reason)
    return out


def leaves(*values: Any) -> list[torch.Tensor]:
    """Every tensor in nested arguments."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The arguments of ``func``, lists of them too, that it writes to according to its schema."""
    found: list[torch.Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += leaves(args[index] if index < len(args) else kwargs.get(argument.name))
    return found


def _elementwise(tracer: LoadTracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """A function of one element at a time, in place or not."""
    in_place = functional(func)
    plain, tensor = in_place or func, args[0]
    # On the meta device: memory that is only tracked holds no values to compute with.
    fresh: torch.Tensor = plain(torch.empty_like(tensor, device="meta"), *args[1:], **kwargs)
    tracer.derive(fresh, [(fresh, tensor)], step_of(plain, args, kwargs, fresh.dtype))
    if in_place is None:
        return fresh
    tracer.copied(tensor, fresh)
    return tensor  # type: ignore[no-any-return]


def _into(tracer: LoadTracer, handler: Handler, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func(..., out=tensor)``: the function, then a copy."""
    out = kwargs.pop("out")
    result = handler(tracer, func.overloadpacket.default, args, kwargs)
    if out.size() == result.size():
        tracer.copied(out, result)
    else:
        tracer.spoil(out, f"{func} into a tensor of another size")
    return out


def _copy_(tracer: LoadTracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    destination, source = args[0], args[1]
    if not (tracer.knows(destination) or tracer.knows(source) or destination.is_meta or source.is_meta):
        return func(*args, **kwargs)  # a table of the loader's own
    tracer.copied(destination, source)
    return destination


def _copy_all(tracer: LoadTracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for destination, source in zip(args[0], args[1], strict=True):
        _copy_(tracer, aten.copy_.default, (destination, source), {})


def _clone(tracer: LoadTracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args[0].is_meta:
        # A loader may move what it was fed to its device; stand-ins stay where no memory is.
        kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "non_blocking")}
    out = func(*args, **kwargs)
    tracer.derive(out, [(out, args[0])])
    return out


def _joined(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The result of ``func`` over a list; constants of the loader's own join stand-ins without their memory."""
    tensors: Sequence[torch.Tensor] = args[0]
    if any(tensor.is_meta for tensor in tensors):
        tensors = [tensor if tensor.is_meta else torch.empty_like(tensor, device="meta") for tensor in tensors]
    out: torch.Tensor = func(tensors, *args[1:], **kwargs)
    return out


def _cat(tracer: LoadTracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dim = int(args[1] if len(args) > 1 else kwargs.get("dim", 0))
    out = _joined(func, args, kwargs)
    pairs, start = [], 0
    for tensor in args[0]:
        if tensor.numel():
            pairs.append((out.narrow(dim, start, tensor.size(dim)), tensor))
            start += tensor.size(dim)
    tracer.derive(out, pairs)
    return out


def _stack(tracer: LoadTracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dim = int(args[1] if len(args) > 1 else kwargs.get("dim", 0))
    out = _joined(func, args, kwargs)
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
    """``fill_`` and ``zero_``; the value of ``fill_`` may be a tensor."""
    values = leaves(args[1:], kwargs)
    if not any(tracer.knows(tensor) for tensor in (args[0], *values)):
        return func(*args, **kwargs)
    if values:
        tracer.copied(args[0], values[0])
    else:
        tracer.assign(args[0], [])
    return args[0]


_HANDLERS: Final[dict[Any, Handler]] = {
    aten.copy_: _copy_,
    aten._foreach_copy_: _copy_all,
    aten.clone: _clone,
    aten._to_copy: _clone,
    aten.cat: _cat,
    aten.stack: _stack,
    aten.constant_pad_nd: _pad,
    aten.fill_: _fill,
    aten.zero_: _fill,
}
_RESHAPERS: Final = frozenset(
    {aten.detach_, aten.squeeze_, aten.swapaxes_, aten.swapdims_, aten.t_, aten.transpose_, aten.unsqueeze_}
)
"""Operations in place that change how a tensor looks at its memory, and nothing in there."""
_MAKERS: Final = frozenset(
    {aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like, aten.new_empty, aten.new_zeros, aten.new_ones,
     aten.new_full, aten.new_empty_strided, aten.empty_strided}
)  # fmt: skip
"""Operations that take a tensor for its shape and dtype only."""
