"""A module's tensors as its own ``state_dict`` gives them, without copying any."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from weightsync.agents.trainer.errors import UnfitTensor
from weightsync.agents.trainer.slots.fitness import FSDP1

OVERRIDDEN: Final = frozenset({"state_dict", "_save_to_state_dict", "get_extra_state"})
"""By which a module, or its class, may have a state_dict of its own."""


def module_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and persistent buffers of ``module`` now, tied ones under each of their names.

    FSDP2 keeps the parameters of its outermost module whole after a forward without backward; an optimizer step then
    changes the shards alone. They are resharded first, which costs nothing but the next forward's gathering.

    Raises:
        UnfitTensor: a module is wrapped in FSDP1; its ``state_dict`` would be a second model in memory.
    """
    given: dict[str, torch.Tensor] = {}
    sharded: list[FSDPModule] = []
    _collect(module, "", given, sharded)
    if sharded:
        for part in sharded:
            # The hook of its state_dict does so, too, but not for a tied parameter that another module lists first.
            part.reshard()
        given.clear()
        _collect(module, "", given, [])
    return given


def _collect(module: nn.Module, prefix: str, given: dict[str, torch.Tensor], sharded: list[FSDPModule]) -> None:
    """What ``module.state_dict(prefix=prefix, keep_vars=True)`` gives, and all modules of FSDP2.

    With the parameters themselves: whether they are trained shows on them alone. What torch does for a plain module is
    done here, in a fraction of its time, because a model may have tens of thousands; one that has a way of its own goes
    it. Extra state is no tensor as a rule.
    """
    kind = _KINDS.get(type(module)) or _kind(type(module))
    if kind.flat:
        raise UnfitTensor(prefix.rstrip(".") or type(module).__name__, FSDP1)
    if kind.sharded:
        sharded.append(cast(FSDPModule, module))
    # Read from here, since a module's attributes are looked for in all of its classes first.
    own = module.__dict__
    if kind.own_way or own["_state_dict_hooks"] or not OVERRIDDEN.isdisjoint(own):
        _collect_own(module, prefix, given, sharded)
        return
    # Most modules have none of most of these, and a loop over nothing costs as much as one over one thing.
    if hooks := own["_state_dict_pre_hooks"]:
        for hook in hooks.values():
            hook(module, prefix, True)
    if parameters := own["_parameters"]:
        for name, parameter in parameters.items():
            if parameter is not None:
                given[prefix + name] = parameter
    if buffers := own["_buffers"]:
        for name, buffer in buffers.items():
            if buffer is not None and name not in own["_non_persistent_buffers_set"]:
                given[prefix + name] = buffer
    if children := own["_modules"]:
        for name, child in children.items():
            if child is not None:
                _collect(child, f"{prefix}{name}.", given, sharded)


def _collect_own(module: nn.Module, prefix: str, given: dict[str, torch.Tensor], sharded: list[FSDPModule]) -> None:
    for name, part in module.named_modules():
        if isinstance(part, FullyShardedDataParallel):
            raise UnfitTensor(prefix + name, FSDP1)
        if part is not module and isinstance(part, FSDPModule):
            sharded.append(part)
    own: dict[str, object] = OrderedDict()
    own._metadata = OrderedDict()  # type: ignore[attr-defined]  # where torch keeps versions, for hooks that look
    returned = module.state_dict(destination=own, prefix=prefix, keep_vars=True)
    # A module's parent goes by what is in ``destination``, whoever asks the outermost by what that returns.
    found = own if prefix else returned
    given.update((name, tensor) for name, tensor in found.items() if isinstance(tensor, torch.Tensor))


@dataclass(frozen=True, slots=True)
class _Kind:
    """Of modules of one class: whether they are FSDP1's or FSDP2's, and whether they have a state_dict of their own."""

    flat: bool
    sharded: bool
    own_way: bool


_KINDS: Final[dict[type, _Kind]] = {}
"""Of the classes that there are, which are few."""


def _kind(kind: type[nn.Module]) -> _Kind:
    own_way = any(getattr(kind, name) is not getattr(nn.Module, name) for name in OVERRIDDEN)
    found = _Kind(issubclass(kind, FullyShardedDataParallel), issubclass(kind, FSDPModule), own_way)
    return _KINDS.setdefault(kind, found)
