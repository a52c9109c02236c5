"""What vLLM computes from the weights at load and keeps: found by looking, refreshed by vLLM's own code.

Multi-head latent attention keeps ``kv_b_proj`` split and transposed for its decode path (``W_UV``, ``W_UK_T``; packed
inside the backend on CPU). vLLM computes these in the attention layer's ``process_weights_after_loading``; a refresh
runs that method again and copies its results into the tensors that exist, because CUDA graphs hold their addresses.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn
from weightsync.agents.recorder.contents import storage_key
from weightsync.agents.recorder.interface import Shadow
from weightsync.orchestrator.protocol.layout import Derived

MAX_DEPTH: Final = 3
"""Helper objects inside helper objects (layer, quantisation method, kernel, experts): deeper ones hold no weights."""


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """A tensor that some module or helper object holds: where, and under which attribute."""

    name: str
    holder: Any
    attribute: str
    tensor: torch.Tensor


def held_tensors(model: nn.Module) -> Iterator[HeldTensor]:
    """Every tensor that a module, or a vLLM object that a module holds, has as an attribute. Each holder once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        yield from _held_by(module, path, 0, seen)


def _held_by(holder: Any, path: str, depth: int, seen: set[int]) -> Iterator[HeldTensor]:
    if id(holder) in seen:
        return
    seen.add(id(holder))
    tables = [vars(holder)]
    if isinstance(holder, nn.Module):
        tables += [holder._parameters, holder._buffers]
    for table in tables:
        for attribute, value in list(table.items()):
            name = f"{path}.{attribute}" if path else attribute
            if isinstance(value, torch.Tensor):
                yield HeldTensor(name, holder, attribute, value)
            elif depth < MAX_DEPTH and _is_helper(value):
                yield from _held_by(value, name, depth + 1, seen)


def _is_helper(value: Any) -> bool:
    return (
        not isinstance(value, (nn.Module, type))
        and type(value).__module__.partition(".")[0] == "vllm"  # foreign objects may run code when looked at
        and hasattr(value, "__dict__")
    )


class Census:
    """The tensors that a model holds before post-processing, so that those which appear in it can be told."""

    def __init__(self, model: nn.Module) -> None:
        """Keeps weak references only: what processing drops is freed."""
        self._before = {held.name: weakref.ref(held.tensor) for held in held_tensors(model)}

    def appeared(self, model: nn.Module, accounted: set[int]) -> list[HeldTensor]:
        """Non-empty tensors that are new and share no memory with ``accounted`` storages (data pointers)."""
        new = []
        known = set(accounted)
        for held in held_tensors(model):
            before = self._before.get(held.name)
            # The same object as before: known, and so are other views of its memory.
            if before is not None and before() is held.tensor:
                known.add(_pointer(held.tensor))
            else:
                new.append(held)
        return [h for h in new if h.tensor.numel() and _pointer(h.tensor) not in known]


def _pointer(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass(frozen=True, slots=True)
class AbsorbedProjections:
    """One MLA layer's absorbed projections. ``shadows``: kv_b_proj's parameters that the layer has dropped, by name."""

    name: str
    layer: Any
    dtype: torch.dtype
    shadows: dict[str, torch.Tensor] = field(default_factory=dict)

    def refresh(self) -> None:
        """Recompute from the current kv_b_proj, in place."""
        holders = [self.layer, *([self.layer.impl] if hasattr(self.layer, "impl") else [])]
        projection = self.layer.kv_b_proj
        dropped = {name: getattr(projection, name) for name in self.shadows}
        before = [(holder, _tensors(holder)) for holder in holders]
        try:
            # vLLM's method reads the projection, so what was dropped from it is back for as long as that runs.
            for name, shadow in self.shadows.items():
                setattr(projection, name, nn.Parameter(shadow, requires_grad=False))
            self.layer.process_weights_after_loading(self.dtype)
        finally:
            for name, parameter in dropped.items():
                setattr(projection, name, parameter)
        for holder, tensors in before:
            for attribute, old in tensors.items():
                new = getattr(holder, attribute, None)
                if isinstance(new, torch.Tensor) and new is not old:
                    # CUDA graphs have the old address; so the new values go there and the new tensor is dropped.
                    old.detach().copy_(new.detach())
                    setattr(holder, attribute, old)


def _tensors(holder: Any) -> dict[str, torch.Tensor]:
    found = {k: v for k, v in vars(holder).items() if isinstance(v, torch.Tensor)}
    if isinstance(holder, nn.Module):
        found |= {k: v for k, v in holder._parameters.items() if v is not None}
    return found


def is_mla(module: nn.Module) -> bool:
    """Whether ``module`` is an attention layer that absorbs a ``kv_b_proj`` after loading."""
    return (
        hasattr(module, "kv_b_proj")
        and hasattr(module, "kv_lora_rank")
        and (callable(getattr(module, "process_weights_after_loading", None)))
    )


def dropped_by_mla(model: nn.Module) -> set[int]:
    """ids of the projections whose parameters an MLA backend may drop after packing them (vLLM's AMX backend)."""
    return {
        id(module.kv_b_proj)
        for module in model.modules()
        if is_mla(module) and getattr(module, "is_amx_bmm_enabled", False)
    }


class VllmDerivations:
    """What vLLM derives from the weights of one model; made before post-load processing.

    See :class:`weightsync.agents.recorder.interface.Derivations`.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        """``dtype``: the model's, which ``process_weights_after_loading`` of attention layers takes."""
        self._model = model
        self._dtype = dtype
        self._census = Census(model)

    def refreshes(self, shadows: Sequence[Shadow]) -> list[Callable[[], None]]:
        """One function for each attention layer that absorbs a projection."""
        steps = []
        for path, module in self._model.named_modules():
            if is_mla(module):
                projection: Any = module.kv_b_proj
                own = {s.parameter.attribute: s.tensor for s in shadows if s.parameter.module is projection}
                steps.append(AbsorbedProjections(path, module, self._dtype, own).refresh)
        return steps

    def appeared(self, accounted: set[int]) -> tuple[list[Derived], list[str]]:
        """New tensors of attention layers that absorb a projection; all others but constants are of unknown origin."""
        owners = self._owners()
        known: list[Derived] = []
        unknown: list[str] = []
        for held in self._census.appeared(self._model, accounted):
            if is_constant(held):
                continue
            if id(held.holder) in owners:
                known.append(Derived(held.name, "mla-absorbed-projections"))
            else:
                unknown.append(f"{held.name}: {tuple(held.tensor.shape)} {held.tensor.dtype} appeared")
        return known, unknown

    def refreshed(self) -> set[int]:
        """All tensors of attention layers that absorb a projection, and constants."""
        owners = self._owners()
        return {
            storage_key(held.tensor)
            for held in held_tensors(self._model)
            if id(held.holder) in owners or is_constant(held)
        }

    def _owners(self) -> set[int]:
        """ids of the objects whose tensors ``refreshes`` compute anew."""
        layers: list[Any] = [module for module in self._model.modules() if is_mla(module)]
        return {id(holder) for layer in layers for holder in (layer, getattr(layer, "impl", layer))}


CONSTANTS: Final = frozenset(
    {"workspace", "fake_input_scale", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"}
    | {f"_{which}_scale{where}" for which in ("q", "k", "v", "prob") for where in ("", "_cpu")}
    | {f"{which}_range" for which in ("q", "k", "v")}
)
"""Scratch memory and activation parameters of kernels, and the KV cache's scales and what they are computed with, which
stay as the engine started."""


def is_constant(held: HeldTensor) -> bool:
    """Tensors that processing makes without looking at a weight: the above, and index tables of kernel objects."""
    is_table = not isinstance(held.holder, nn.Module) and not held.tensor.is_floating_point()
    return held.attribute in CONSTANTS or (is_table and held.tensor.element_size() >= MIN_INDEX_BYTES)


MIN_INDEX_BYTES: Final = 4
"""Strides and permutations are int32 or int64; smaller integers may be packed weights."""
