"""One load of one model: what the loader did, and proof of what post-load processing made of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from weightsync.agents.recorder.blueprint import Blueprint, Slot
from weightsync.agents.recorder.located import Loaded, find, with_halves_exchanged
from weightsync.agents.recorder.proof import order_sensitive_digest
from weightsync.agents.recorder.rows import Target
from weightsync.agents.recorder.settled import settle
from weightsync.agents.recorder.trace import Checkpoint, Landing, RecordError
from weightsync.agents.recorder.unreached import Unrecorded, judge_unreached, opaque_names
from weightsync.agents.vllm.recorder.derived import AbsorbedProjections, Census, dropped_by_mla, is_constant, is_mla
from weightsync.agents.vllm.recorder.kernel_layouts import KERNEL_LAYOUTS, KernelLayout, as_fed
from weightsync.orchestrator.protocol.layout import Derived


@dataclass(frozen=True, slots=True)
class _Before:
    """A parameter before processing, and a copy of it if it may end in a kernel layout or be dropped."""

    loaded: Loaded
    copy: torch.Tensor | None

    @property
    def slot(self) -> Slot:
        return self.loaded.slot


@dataclass(slots=True)
class Finished:
    """What a recording comes to: targets, and how to bring everything else of the model up to date after a write."""

    targets: list[Target] = field(default_factory=list)
    refreshes: list[Callable[[], None]] = field(default_factory=list)
    derived: list[Derived] = field(default_factory=list)
    shadows: list[str] = field(default_factory=list)


class Recording:
    """A load, recorded. ``finish`` after post-load processing; ``finished`` then holds the targets."""

    def __init__(self, model: nn.Module, model_config: Any, checkpoint: Sequence[Checkpoint]) -> None:
        """Record ``model``, loaded and not yet processed, fed with the tensors of ``checkpoint``.

        Raises:
            RecordError: the loader does what bytes cannot follow, or leaves a parameter unfilled.
        """
        self.model = model
        self.model_config = model_config
        self.finished: Finished | None = None
        self._blueprint = Blueprint(model)
        fed = as_fed(checkpoint, {slot.name: slot.dtype for slot in self._blueprint.slots})
        self._settled = settle(self._blueprint.trace(fed, cast(Any, model).load_weights))
        opaque = opaque_names(self._settled.values())
        if opaque:
            raise RecordError(f"weights that are computed while they load cannot be written: {'; '.join(opaque)}")
        self.unrecorded: list[Unrecorded] = judge_unreached(self._blueprint.slots, self._settled)
        landed = {mark.source.name for state in self._settled.values() for mark in state.landings}
        self.unused: list[str] = [entry.name for entry in checkpoint if entry.name not in landed]
        self._before = self._before_processing()
        self._census = Census(model)

    def _before_processing(self) -> list[_Before]:
        dropped = dropped_by_mla(self.model)
        before = []
        for slot in self._blueprint.slots:
            tensor = slot.current()
            if slot.storage not in self._settled or tensor is None or not slot.nbytes:
                continue
            keep = id(slot.module) in dropped or any(layout.may_apply(slot) for layout in KERNEL_LAYOUTS)
            copy = tensor.detach().clone() if keep else None
            before.append(_Before(Loaded(slot, tuple(tensor.stride()), order_sensitive_digest(tensor)), copy))
        return before

    def finish(self) -> None:
        """Prove or map every parameter that the loader filled; the model must be processed now.

        Raises:
            RecordError: names each parameter in a layout that nothing here knows, and each tensor of unknown origin.
        """
        done = Finished()
        faults: list[str] = []
        shadows: dict[int, tuple[Slot, torch.Tensor]] = {}
        by_storage: dict[int, list[_Before]] = defaultdict(list)
        for before in self._before:
            by_storage[before.slot.storage].append(before)
        taken: set[tuple[int, int]] = set()
        for storage, group in by_storage.items():
            for first, others in _distinct_places(group):
                landings = _inside(first.slot, self._settled[storage].landings)
                target = self._target(first, landings, done, shadows)
                moved = [b.slot.name for b in others if target is not None and not _same_memory(b, target.tensor)]
                if target is None or moved:
                    faults.append(f"{', '.join(moved) or first.slot.name}: {_state(first.slot)}")
                    continue
                place = (target.tensor.untyped_storage().data_ptr(), int(target.tensor.storage_offset()))
                if landings and place not in taken:
                    taken.add(place)
                    done.targets.append(target)
        self._absorbed(done, shadows)
        faults += self._unclaimed(done)
        if faults:
            raise RecordError(f"post-load processing leaves layouts that are not known: {'; '.join(sorted(faults))}")
        self._before = []
        self.finished = done

    def _target(
        self,
        before: _Before,
        landings: tuple[Landing, ...],
        done: Finished,
        shadows: dict[int, tuple[Slot, torch.Tensor]],
    ) -> Target | None:
        """The live tensor if it holds what was loaded, else a shadow with its refresh, else None."""
        slot, live = before.slot, before.slot.current()

        def target(tensor: torch.Tensor, where: tuple[Landing, ...]) -> Target:
            return Target(tensor, slot.place.offset, where, slot.module, slot.attribute)

        found = None if live is None else find(before.loaded, live.detach())
        if found is not None:
            where = with_halves_exchanged(landings, before.loaded) if found.halves_exchanged else landings
            return None if where is None else target(found.tensor, where)
        if before.copy is None:
            return None
        for layout in KERNEL_LAYOUTS:
            if layout.may_apply(slot) and live is not None and _gives(layout, slot, before.copy, live):
                done.refreshes.append(_refresh(layout, slot, before.copy, live.detach()))
                done.derived.append(Derived(slot.name, layout.name))
                done.shadows.append(slot.name)
                return target(before.copy, landings)
        if live is None or not live.numel():
            shadows[id(slot)] = (slot, before.copy)
            done.shadows.append(slot.name)
            return target(before.copy, landings)
        return None

    def _absorbed(self, done: Finished, shadows: dict[int, tuple[Slot, torch.Tensor]]) -> None:
        for path, module in self.model.named_modules():
            if is_mla(module):
                layer: Any = module
                own = {slot.attribute: copy for slot, copy in shadows.values() if slot.module is layer.kv_b_proj}
                absorbed = AbsorbedProjections(path, layer, self.model_config.dtype, own)
                done.refreshes.append(absorbed.refresh)

    def _unclaimed(self, done: Finished) -> list[str]:
        accounted = {target.tensor.untyped_storage().data_ptr() for target in done.targets}
        for slot in self._blueprint.slots:
            tensor = slot.current()
            if tensor is not None:
                accounted.add(tensor.untyped_storage().data_ptr())
        absorbed = [(path, module) for path, module in self.model.named_modules() if is_mla(module)]
        faults = []
        for held in self._census.appeared(self.model, accounted):
            owner = next((m for _, m in absorbed if held.holder is m or held.holder is getattr(m, "impl", None)), None)
            if is_constant(held):
                continue
            if owner is not None:
                done.derived.append(Derived(held.name, "mla-absorbed-projections"))
            else:
                faults.append(f"{held.name}: {tuple(held.tensor.shape)} {held.tensor.dtype} appeared")
        return faults


def _distinct_places(group: Sequence[_Before]) -> list[tuple[_Before, list[_Before]]]:
    """Slots of one storage by their place: one to stand for each, and those that are the same memory (tied weights)."""
    places: dict[Any, list[_Before]] = defaultdict(list)
    for before in group:
        places[before.slot.place].append(before)
    return [(slots[0], slots[1:]) for slots in places.values()]


def _inside(slot: Slot, landings: Sequence[Landing]) -> tuple[Landing, ...]:
    if not slot.place.sizes:
        first, last = slot.place.offset, slot.place.offset + slot.dtype.itemsize
    else:
        reach = sum((n - 1) * s for n, s in zip(slot.place.sizes, slot.place.strides, strict=True))
        first, last = slot.place.offset, slot.place.offset + reach + slot.dtype.itemsize
    return tuple(landing for landing in landings if first <= landing.place.offset < last)


def _same_memory(before: _Before, target: torch.Tensor) -> bool:
    live = before.slot.current()
    return live is not None and live.data_ptr() == target.data_ptr() and live.numel() == target.numel()


def _state(slot: Slot) -> str:
    live = slot.current()
    if live is None:
        return "removed"
    return f"{slot.shape} {slot.dtype} became {tuple(live.shape)} {live.dtype} strides {tuple(live.stride())}"


def _gives(layout: KernelLayout, slot: Slot, loaded: torch.Tensor, live: torch.Tensor) -> bool:
    try:
        result = layout.forward(slot, loaded)
    except LookupError:
        return False
    return (
        result.shape == live.shape and result.dtype == live.dtype and torch.equal(_bits(result), _bits(live.detach()))
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _refresh(layout: KernelLayout, slot: Slot, shadow: torch.Tensor, live: torch.Tensor) -> Callable[[], None]:
    def refresh() -> None:
        live.copy_(layout.forward(slot, shadow))

    return refresh
