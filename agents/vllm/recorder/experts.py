"""Where the experts are on this rank: part of the layout's identity, because rebalancing moves them.

With expert load balancing (EPLB) vLLM moves experts between its physical slots while it serves and updates a map from
logical to physical experts. A recording knows which expert each slot got at load; ``relocated`` renames its landings to
those that the slots hold now.
"""

from __future__ import annotations

import hashlib
import re
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from weightsync.agents.recorder.rows import Target
from weightsync.agents.recorder.trace import Landing, RecordError
from weightsync.agents.vllm.recorder.vllm_names import is_expert_weight, local_slots, moe_config_of

MAPS: Final = (
    "_expert_map",
    "expert_map",
    "expert_global_to_physical",
    "expert_physical_to_global",
    "expert_local_to_global",
    "logical_to_physical_map",
    "logical_replica_count",
)
"""Attributes of vLLM's expert layers, and of the load balancer's state in them, that say who has which expert."""

ASKED: Final = frozenset({"router", "eplb_state", *MAPS})

_EXPERT: Final = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
"""The expert's number in the name of a checkpoint tensor."""


def expert_map_fingerprint(*models: nn.Module) -> str:
    """SHA-256 over every expert map of ``models``; empty for those whose experts are all on this rank in order.

    Asked while an engine stands still for a switch: of a model's thousands of modules only the expert layers are looked
    at, and the maps of one device and dtype come to the host together.
    """
    found: list[tuple[str, torch.Tensor]] = []
    for path, module in (named for model in models for named in _expert_layers(model)):
        for holder in (module, balancer_of(module)):
            for attribute in MAPS if holder is not None else ():
                value = _attribute(holder, attribute)
                if isinstance(value, torch.Tensor) and value.numel():
                    found.append((f"{path}.{attribute}:{tuple(value.shape)}:", value))
    digest = hashlib.sha256()
    for (label, _), values in zip(found, _on_host([value for _, value in found]), strict=True):
        digest.update(label.encode())
        digest.update(values.tobytes())
    return digest.hexdigest() if found else ""


_layers: weakref.WeakKeyDictionary[nn.Module, list[tuple[str, nn.Module]]] = weakref.WeakKeyDictionary()


def _expert_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules of ``model``, with their paths, that have a map or a balancer, or may be given one."""
    known = _layers.get(model)
    if known is None:
        known = [named for named in model.named_modules() if not ASKED.isdisjoint(_attributes(named[1]))]
        _layers[model] = known
    return known


def _attributes(module: nn.Module) -> Iterator[str]:
    """Names of what ``module`` has, whatever the values: to ask for one may run code of the engine's."""
    for names in (vars(module), module._parameters, module._buffers, module._modules, *map(vars, type(module).__mro__)):
        yield from names


def _on_host(maps: Sequence[torch.Tensor]) -> list[npt.NDArray[np.int64]]:
    """The values of each, flat, as int64: the same map has the same fingerprint on every device and build."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for number, value in enumerate(maps):
        alike[value.device, value.dtype].append(number)
    values = [np.empty(0, np.int64)] * len(maps)
    for numbers in alike.values():
        together = torch.cat([maps[number].detach().reshape(-1) for number in numbers]).to("cpu", torch.int64).numpy()
        ends = np.cumsum([maps[number].numel() for number in numbers])
        for number, part in zip(numbers, np.split(together, ends[:-1]), strict=True):
            values[number] = part
    return values


def balancer_of(module: nn.Module) -> Any:
    """The load balancer's state of an expert layer, None without one."""
    router = getattr(module, "router", None)
    return getattr(router, "eplb_state", None) or getattr(module, "eplb_state", None)


def relocated(targets: Sequence[Target], model: nn.Module) -> list[Target]:
    """``targets`` with the landings of balanced experts named after the experts that their slots hold now.

    Raises:
        RecordError: a slot holds no expert, or the checkpoint does not keep experts apart.
    """
    now = {id(experts): logical for experts, logical in _placements(model)}
    moved = []
    for target in targets:
        logical = now.get(id(target.owner))
        if logical is not None and is_expert_weight(target.attribute):
            moved.append(_renamed(target, logical))
        else:
            moved.append(target)
    return moved


def _placements(model: nn.Module) -> Iterator[tuple[nn.Module, list[int]]]:
    """Each balanced expert layer, and the logical expert in each of its local slots."""
    for module in model.modules():
        table = getattr(balancer_of(module), "logical_to_physical_map", None)
        if not isinstance(table, torch.Tensor) or not table.numel():
            continue
        experts: Any = getattr(module, "routed_experts", module)
        local = local_slots(moe_config_of(experts))
        logical = [-1] * len(local)
        for expert, slots in enumerate(table.detach().cpu().tolist()):
            # A popular expert has several slots; rows of the table are filled up with -1, which is no local slot.
            for slot in slots:
                if slot in local:
                    logical[slot - local.start] = expert
        yield experts, logical


def _renamed(target: Target, logical: Sequence[int]) -> Target:
    # Experts are the first dimension, so a landing's distance from the start tells its slot.
    stride = target.tensor.stride(0) * target.tensor.element_size()
    landings = []
    for landing in target.landings:
        slot = (landing.place.offset - target.start) // stride
        landings.append(_of_expert(landing, logical[slot], slot))
    return replace(target, landings=tuple(landings))


def _of_expert(landing: Landing, expert: int, slot: int) -> Landing:
    name = landing.source.name
    if expert < 0:
        raise RecordError(f"{name}: its slot {slot} holds no expert; the experts are being moved right now")
    if not _EXPERT.search(name):
        raise RecordError(f"{name}: a checkpoint that stacks its experts cannot be followed while they are rebalanced")
    return replace(landing, source=replace(landing.source, name=_EXPERT.sub(str(expert), name, count=1)))


def _attribute(holder: Any, name: str) -> Any:
    try:
        return getattr(holder, name, None)
    except (AttributeError, AssertionError, RuntimeError):
        # Properties of vLLM's layers that assert on a placement which this layer does not have.
        return None
