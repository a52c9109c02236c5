"""The trainer's tensors by name, from whatever a training script has at hand."""

from collections.abc import Callable, Mapping
from typing import Final

import torch

StateSource = Callable[[], Mapping[str, torch.Tensor]] | Mapping[str, torch.Tensor] | torch.nn.Module

WRAPPERS: Final = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
"""What torch.compile, activation checkpointing and FSDP put into the names of the modules that they wrap."""


def current_state(source: StateSource) -> dict[str, torch.Tensor]:
    """All tensors of ``source`` now, with wrappers' prefixes taken out of their names. Nothing is copied.

    Of a module: its parameters and buffers, tied ones under each of their names.
    """
    if isinstance(source, torch.nn.Module):
        tensors: dict[str, torch.Tensor] = {}
        tensors.update(source.named_parameters(remove_duplicate=False))
        tensors.update(source.named_buffers(remove_duplicate=False))
        return {_plain_name(name): tensor for name, tensor in tensors.items()}
    mapping = source if isinstance(source, Mapping) else source()
    return {_plain_name(name): tensor for name, tensor in mapping.items()}


def _plain_name(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
