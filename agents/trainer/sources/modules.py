"""A module's tensors as its own ``state_dict`` gives them, without copying any."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from weightsync.agents.trainer.errors import UnfitTensor
from weightsync.agents.trainer.slots.fitness import FSDP1


def module_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and persistent buffers of ``module`` now, tied ones under each of their names.

    FSDP2 keeps the parameters of its outermost module whole after a forward without backward; an optimizer step then
    changes the shards alone. They are resharded first, which costs nothing but the next forward's gathering.

    Raises:
        UnfitTensor: a module is wrapped in FSDP1; its ``state_dict`` would be a second model in memory.
    """
    for name, part in module.named_modules():
        if isinstance(part, FullyShardedDataParallel):
            raise UnfitTensor(name or type(part).__name__, FSDP1)
        if isinstance(part, FSDPModule):
            # The hook of its state_dict does so, too, but not for a tied parameter that another module lists first.
            part.reshard()
    # With the parameters themselves: whether they are trained shows on them alone. Extra state is no tensor.
    given = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in given.items() if isinstance(tensor, torch.Tensor)}
