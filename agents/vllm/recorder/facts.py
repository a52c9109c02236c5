"""What the recorder must be told about vLLM's layers, put together from the modules beside this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn
from weightsync.agents.recorder.blueprint import ParameterPlace
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.recorder.interface import KernelLayout
from weightsync.agents.vllm.recorder import kernel_layouts
from weightsync.agents.vllm.recorder.derived import VllmDerivations, dropped_by_mla
from weightsync.agents.vllm.recorder.vllm_names import (
    CACHE_SCALES,
    GATE_UP,
    is_expert_weight,
    is_padded,
    moe_config_of,
    vocabulary_rows,
)

SHARED: Final = "the drafter's model has it, and shares it"


@dataclass(frozen=True, slots=True)
class VllmFacts:
    """:class:`weightsync.agents.recorder.interface.LayerFacts` of vLLM.

    ``dtype``: the model's, which vLLM hands to what it runs after loading. ``drafter``: it is a drafter of speculative
    decoding, whose embedding and head need not be in its checkpoint.
    """

    dtype: torch.dtype
    drafter: bool = False
    kernel_layouts: tuple[KernelLayout, ...] = kernel_layouts.KERNEL_LAYOUTS

    def as_fed(self, checkpoint: Sequence[Checkpoint], dtypes: Mapping[str, torch.dtype]) -> list[Checkpoint]:
        """See :func:`weightsync.agents.vllm.recorder.kernel_layouts.as_fed`."""
        return kernel_layouts.as_fed(checkpoint, dtypes)

    def reason_to_stay(self, parameter: ParameterPlace, whole: bool) -> str:
        """Buffers, scales of the KV cache, and the padding of vocabularies and experts stay as vLLM made them."""
        if whole and parameter.buffer:
            return "a buffer that the model computes itself"
        if whole and parameter.attribute in CACHE_SCALES:
            return "a scale of the KV cache"
        if not whole and vocabulary_rows(parameter.module) is not None:
            return "padding of the vocabulary"
        config = moe_config_of(parameter.module)
        if not whole and config is not None and is_expert_weight(parameter.attribute) and is_padded(config):
            return "padding of the experts"
        if whole and self.drafter and vocabulary_rows(parameter.module) is not None:
            return SHARED  # whether it is, ``drafts.let_go_of_shared`` sees when the drafter has it
        return ""

    def may_exchange_halves(self, parameter: ParameterPlace) -> bool:
        """FlashInfer's CUTLASS kernels want ``[up; gate]`` where the loader leaves ``[gate; up]``."""
        return parameter.attribute.startswith(GATE_UP)

    def may_be_dropped(self, model: nn.Module) -> set[int]:
        """See :func:`weightsync.agents.vllm.recorder.derived.dropped_by_mla`."""
        return dropped_by_mla(model)

    def derivations(self, model: nn.Module) -> VllmDerivations:
        """See :class:`weightsync.agents.vllm.recorder.derived.VllmDerivations`."""
        return VllmDerivations(model, self.dtype)
