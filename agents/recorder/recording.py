"""One load of one model: what the loader did, and proof of what post-load processing made of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from weightsync.agents.recorder.blueprint import Blueprint, ParameterPlace
from weightsync.agents.recorder.interface import KernelLayout, LayerFacts, Shadow
from weightsync.agents.recorder.located import LoadedParameter, locate, order_sensitive_digest, with_halves_exchanged
from weightsync.agents.recorder.rows import Target
from weightsync.agents.recorder.settled import Unrecorded, judge_unreached, opaque_names, settle
from weightsync.agents.recorder.trace import Checkpoint, Landing, RecordError
from weightsync.orchestrator.protocol.layout import Derived


@dataclass(frozen=True, slots=True)
class _Before:
    """A parameter before processing, and a copy of it if it may end in a kernel layout or be dropped."""

    loaded: LoadedParameter
    copy: torch.Tensor | None

    @property
    def parameter(self) -> ParameterPlace:
        return self.loaded.parameter


@dataclass(slots=True)
class Finished:
    """What a recording comes to: targets, and how to bring everything else of the model up to date after a write."""

    targets: list[Target] = field(default_factory=list)
    refreshes: list[Callable[[], None]] = field(default_factory=list)
    derived: list[Derived] = field(default_factory=list)
    shadows: list[str] = field(default_factory=list)


class Recording:
    """A load, recorded. ``finish`` after post-load processing; ``finished`` then holds the targets."""

    def __init__(self, model: nn.Module, checkpoint: Sequence[Checkpoint], engine: LayerFacts) -> None:
        """Record ``model``, loaded and not yet processed, fed with the tensors of ``checkpoint``.

        Args:
            model: has a ``load_weights`` that takes pairs of name and tensor. Its weights are read, never written.
            checkpoint: every tensor that the engine's own load was fed with, more if it skips some.
            engine: what is to be known about the engine that the model belongs to.

        Raises:
            RecordError: the loader does what bytes cannot follow, or leaves a parameter unfilled.
        """
        self.model = model
        self._engine = engine
        self.finished: Finished | None = None
        self._blueprint = Blueprint(model)
        fed = engine.as_fed(checkpoint, {parameter.name: parameter.dtype for parameter in self._blueprint.parameters})
        self._settled = settle(self._blueprint.trace(fed, cast(Any, model).load_weights))
        opaque = opaque_names(self._settled.values())
        if opaque:
            raise RecordError(f"weights that are computed while they load cannot be written: {'; '.join(opaque)}")
        self.unrecorded: list[Unrecorded] = judge_unreached(
            self._blueprint.parameters, self._settled, engine.reason_to_stay
        )
        landed = {mark.source.name for state in self._settled.values() for mark in state.landings}
        self.unused: list[str] = [entry.name for entry in checkpoint if entry.name not in landed]
        self._before = self._before_processing()
        self._derivations = engine.derivations(model)

    def _before_processing(self) -> list[_Before]:
        dropped = self._engine.may_be_dropped(self.model)
        before = []
        for parameter in self._blueprint.parameters:
            tensor = parameter.current()
            if parameter.storage not in self._settled or tensor is None or not parameter.nbytes:
                continue
            keep = id(parameter.module) in dropped or any(
                layout.may_apply(parameter) for layout in self._engine.kernel_layouts
            )
            copy = tensor.detach().clone() if keep else None
            before.append(
                _Before(LoadedParameter(parameter, tuple(tensor.stride()), order_sensitive_digest(tensor)), copy)
            )
        return before

    def finish(self) -> None:
        """Prove or map every parameter that the loader filled; the model must be processed now.

        Raises:
            RecordError: names each parameter in a layout that nothing here knows, and each tensor of unknown origin.
        """
        done = Finished()
        faults: list[str] = []
        shadows: list[Shadow] = []
        by_storage: dict[int, list[_Before]] = defaultdict(list)
        for before in self._before:
            by_storage[before.parameter.storage].append(before)
        taken: set[tuple[int, int]] = set()
        for storage, group in by_storage.items():
            for first, others in _distinct_places(group):
                landings = _inside(first.parameter, self._settled[storage].landings)
                target = self._target(first, landings, done, shadows)
                moved = [b.parameter.name for b in others if target is not None and not _same_memory(b, target.tensor)]
                if target is None or moved:
                    faults.append(f"{', '.join(moved) or first.parameter.name}: {_state(first.parameter)}")
                    continue
                place = (target.tensor.untyped_storage().data_ptr(), int(target.tensor.storage_offset()))
                if landings and place not in taken:
                    taken.add(place)
                    done.targets.append(target)
        done.refreshes += self._derivations.refreshes(shadows)
        derived, unknown = self._derivations.appeared(self._accounted(done))
        done.derived += derived
        faults += unknown
        if faults:
            raise RecordError(f"post-load processing leaves layouts that are not known: {'; '.join(sorted(faults))}")
        self._before = []
        self.finished = done

    def _target(
        self,
        before: _Before,
        landings: tuple[Landing, ...],
        done: Finished,
        shadows: list[Shadow],
    ) -> Target | None:
        """The live tensor if it holds what was loaded, else a shadow with its refresh, else None."""
        parameter, live = before.parameter, before.parameter.current()

        def target(tensor: torch.Tensor, where: tuple[Landing, ...]) -> Target:
            return Target(tensor, parameter.place.offset, where, parameter.module, parameter.attribute)

        may_exchange = self._engine.may_exchange_halves(parameter)
        found = None if live is None else locate(before.loaded, live.detach(), may_exchange_halves=may_exchange)
        if found is not None:
            where = with_halves_exchanged(landings, before.loaded) if found.halves_exchanged else landings
            return None if where is None else target(found.tensor, where)
        if before.copy is None:
            return None
        for layout in self._engine.kernel_layouts:
            if layout.may_apply(parameter) and live is not None and _gives(layout, parameter, before.copy, live):
                done.refreshes.append(_refresh(layout, parameter, before.copy, live.detach()))
                done.derived.append(Derived(parameter.name, layout.name))
                done.shadows.append(parameter.name)
                return target(before.copy, landings)
        if live is None or not live.numel():
            # The engine has taken the parameter away after deriving something from it; the copy stands in for it.
            shadows.append(Shadow(parameter, before.copy))
            done.shadows.append(parameter.name)
            return target(before.copy, landings)
        return None

    def _accounted(self, done: Finished) -> set[int]:
        """Data pointers of the storages whose bytes a write reaches, or that are parameters and buffers by name."""
        accounted = {target.tensor.untyped_storage().data_ptr() for target in done.targets}
        for parameter in self._blueprint.parameters:
            tensor = parameter.current()
            if tensor is not None:
                accounted.add(tensor.untyped_storage().data_ptr())
        return accounted


def _distinct_places(group: Sequence[_Before]) -> list[tuple[_Before, list[_Before]]]:
    """Parameters of one storage by their place: one to stand for each, and those of the same memory (tied weights)."""
    places: dict[Any, list[_Before]] = defaultdict(list)
    for before in group:
        places[before.parameter.place].append(before)
    return [(parameters[0], parameters[1:]) for parameters in places.values()]


def _inside(parameter: ParameterPlace, landings: Sequence[Landing]) -> tuple[Landing, ...]:
    if not parameter.place.sizes:
        first, last = parameter.place.offset, parameter.place.offset + parameter.dtype.itemsize
    else:
        reach = sum((n - 1) * s for n, s in zip(parameter.place.sizes, parameter.place.strides, strict=True))
        first, last = parameter.place.offset, parameter.place.offset + reach + parameter.dtype.itemsize
    return tuple(landing for landing in landings if first <= landing.place.offset < last)


def _same_memory(before: _Before, target: torch.Tensor) -> bool:
    live = before.parameter.current()
    return live is not None and live.data_ptr() == target.data_ptr() and live.numel() == target.numel()


def _state(parameter: ParameterPlace) -> str:
    live = parameter.current()
    if live is None:
        return "removed"
    return f"{parameter.shape} {parameter.dtype} became {tuple(live.shape)} {live.dtype} strides {tuple(live.stride())}"


def _gives(layout: KernelLayout, parameter: ParameterPlace, loaded: torch.Tensor, live: torch.Tensor) -> bool:
    try:
        result = layout.forward(parameter, loaded)
    except LookupError:
        return False
    return (
        result.shape == live.shape and result.dtype == live.dtype and torch.equal(_bits(result), _bits(live.detach()))
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _refresh(
    layout: KernelLayout, parameter: ParameterPlace, shadow: torch.Tensor, live: torch.Tensor
) -> Callable[[], None]:
    def refresh() -> None:
        live.copy_(layout.forward(parameter, shadow))

    return refresh
