"""The names and shapes in which transformers would save a model, each with the trainer's tensor that it comes from.

transformers 5 keeps some models in memory otherwise than in their checkpoints: renamed, with other prefixes, experts
stacked, gate and up in one tensor. ``save_pretrained`` undoes that by ``revert_weight_conversion``. We run the same
function on tensors without storage and watch, as the recorder watches an engine's loader, which box of which tensor
ends up where. So whatever it does is followed, or said to be too much by name.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.recorder.operations import Watching
from weightsync.agents.recorder.trace import Landing, LoadTracer
from weightsync.agents.trainer.errors import UnroutableTensors
from weightsync.agents.trainer.slots.conversion import Source

INSIDE: Final = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Attributes in which wrappers (DDP, torch.compile, FSDP1, activation checkpointing) hold the model."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a tensor of the checkpoint is made of: ``sources``, joined along ``cat_dim``.

    With ``expert``, the one source stacks experts along its first dimension, and this tensor is that one of them;
    ``Source.dim`` then counts the dimensions behind.
    """

    sources: tuple[Source, ...]
    cat_dim: int = 0
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Saved:
    """What ``save_pretrained`` would write: ``origins`` by name, and ``too_much``: why some cannot be followed."""

    origins: Mapping[str, Origin] = field(default_factory=dict)
    too_much: Mapping[str, str] = field(default_factory=dict)


def saved_as(model: nn.Module | None, state: Mapping[str, torch.Tensor]) -> Saved:
    """Every name under which transformers would save a tensor of ``state``; nothing for other libraries' models.

    Args:
        model: the trainer's, wrapped or not; its weights are not read. None: no model is known.
        state: the trainer's tensors; only global shapes and dtypes are read.

    Raises:
        UnroutableTensors: transformers' own mapping fails on this state.
    """
    plain = _pretrained(model)
    if plain is None:
        return Saved()
    from transformers.core_model_loading import revert_weight_conversion

    tensors = ((name, value) for name, value in state.items() if isinstance(value, torch.Tensor))  # else extra state
    entries = [Checkpoint(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]
    try:
        # Once to learn the shapes: the tracer must know the tensors that are written before it watches.
        empty = {e.name: torch.empty(e.shape, dtype=e.dtype, device="meta") for e in entries}
        shapes = revert_weight_conversion(plain, empty)
        targets = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in shapes.items()}
        tracer = LoadTracer(list(targets.values()))
        with torch.no_grad(), Watching(tracer):
            for name, tensor in revert_weight_conversion(plain, dict(tracer.feed(entries))).items():
                targets[name].copy_(tensor)
    except Exception as error:  # a library's, of any kind: what it cannot do with this state is the trainer's to know
        raise UnroutableTensors(
            f"transformers' conversion mapping of {type(plain).__name__} fails on the trainer's tensors"
            f" ({type(error).__name__}: {error}); pass a table (docs/adding-a-model.md)"
        ) from error
    whole = {entry.name: entry.shape for entry in entries}
    origins: dict[str, Origin] = {}
    too_much: dict[str, str] = {}
    landings: dict[int, list[Landing]] = defaultdict(list)
    for write in tracer.writes:
        landings[write.storage] += [mark for mark in write.marks if isinstance(mark, Landing)]
    for number, (name, target) in enumerate(targets.items()):
        found = _origin(tuple(target.shape), target.element_size(), landings[number], whole)
        if isinstance(found, Origin):
            origins[name] = found
        else:
            too_much[name] = found
    return Saved(origins, too_much)


def _pretrained(model: nn.Module | None) -> Any:
    """The transformers model inside wrappers, as a class that the mapping knows; None for another library's."""
    try:
        from transformers import PreTrainedModel
    except ImportError:
        return None
    inside: Any = model
    while inside is not None and not isinstance(inside, PreTrainedModel):
        inside = next((part for name in INSIDE if (part := getattr(inside, name, None)) is not None), None)
    if inside is None or getattr(inside, "_weight_conversions", None) is not None:
        return inside
    if not any("FSDPModule" in {cls.__name__ for cls in type(m).__mro__} for m in inside.modules()):
        return inside
    # fully_shard replaces classes, by whose names the mapping is looked up: a skeleton without memory has the old ones.
    original = next(cls for cls in type(inside).__mro__ if cls.__module__.startswith("transformers."))
    return skeleton(original, inside.config)


def skeleton(model_class: Any, config: Any) -> Any:
    """A model of ``model_class`` without memory."""
    with torch.device("meta"):
        return model_class._from_config(config)


def skeleton_of(config: Any) -> Any:
    """A model without memory for a transformers configuration: of its first architecture, else a causal one."""
    import transformers

    named = next(iter(getattr(config, "architectures", None) or ()), "")
    model_class = getattr(transformers, named, None)
    if model_class is not None:
        return skeleton(model_class, config)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


# ------------------------------------------------------------------------------------------------- boxes as sources
def _origin(
    shape: tuple[int, ...], itemsize: int, landings: Sequence[Landing], whole: Mapping[str, tuple[int, ...]]
) -> Origin | str:
    """``landings`` in a dense tensor of ``shape`` as sources; why not, where they are more than that."""
    if sum(math.prod(each.place.sizes) for each in landings) != math.prod(shape):
        return "it is computed, not only moved"
    parts = []
    for landing in landings:
        if landing.program:
            return "it is computed, not only moved"
        part = _part(shape, itemsize, landing, whole[landing.source.name])
        if part is None:
            return f"elements of {landing.source.name!r} are turned round or interleaved"
        parts.append(part)
    if len(parts) == 1:
        return Origin((parts[0].source,), 0, parts[0].expert)
    if any(part.expert is not None for part in parts):
        return "it is put together of several experts"
    dims = {dim for part in parts for dim, extent in enumerate(part.extent) if extent != shape[dim]}
    if len(dims) != 1:
        return "it is put together along several dimensions"
    (dim,) = dims
    ordered = sorted(parts, key=lambda part: part.corner[dim])
    return Origin(tuple(part.source for part in ordered), dim)


@dataclass(frozen=True, slots=True)
class _Filled:
    """A source, and the box of the checkpoint's tensor that it fills."""

    source: Source
    corner: tuple[int, ...]
    extent: tuple[int, ...]
    expert: int | None


def _part(shape: tuple[int, ...], itemsize: int, landing: Landing, whole: tuple[int, ...]) -> _Filled | None:
    sizes, strides = landing.place.sizes, tuple(stride // itemsize for stride in landing.place.strides)
    stacked = len(whole) - len(shape)
    if stacked not in (0, 1) or (stacked and sizes[0] != 1):
        return None
    sizes, strides = sizes[stacked:], strides[stacked:]
    dense = _dense(shape)
    # In the same order and dense: anything else is a transposition or an interleaving. One element has no stride.
    if any(size > 1 and stride != step for size, stride, step in zip(sizes, strides, dense, strict=True)):
        return None
    cuts = list(_cuts(landing.corner[stacked:], sizes, whole[stacked:]))
    if len(cuts) > 1:
        return None
    source = Source(landing.source.name, *(cuts[0] if cuts else ()))
    corner = tuple(_unravelled(landing.place.offset // itemsize, dense))
    return _Filled(source, corner, sizes, landing.corner[0] if stacked else None)


def _cuts(corner: Sequence[int], sizes: Sequence[int], whole: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    for dim, (start, length, full) in enumerate(zip(corner, sizes, whole, strict=True)):
        if length != full:
            yield dim, start, length


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _unravelled(offset: int, dense: Sequence[int]) -> Iterator[int]:
    for step in dense:
        yield offset // max(step, 1)
        offset %= max(step, 1)
