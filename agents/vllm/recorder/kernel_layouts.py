"""Kernel layouts by name: what vLLM's post-load processing makes of a parameter, as a function that we can repeat.

A parameter that ends in a kernel layout is not written directly. Its target is a shadow in the checkpoint's layout;
after a round the function here is applied to the shadow and its result copied over the live parameter, whose address
CUDA graphs and kernels hold. Each function is proved when the engine starts: applied to what the loader left, it must
give the live bytes exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from weightsync.agents.recorder.blueprint import Slot
from weightsync.agents.recorder.trace import Checkpoint


@dataclass(frozen=True, slots=True)
class KernelLayout:
    """``forward(slot, loaded)`` gives the live tensor. ``may_apply`` decides before processing that a copy is kept."""

    name: str
    may_apply: Callable[[Slot], bool]
    forward: Callable[[Slot, torch.Tensor], torch.Tensor]


def _is_cpu_unquantized_expert_weight(slot: Slot) -> bool:
    method = type(getattr(slot.module, "quant_method", None)).__name__
    tensor = slot.current()
    return (
        slot.attribute in ("w13_weight", "w2_weight")
        and method == "UnquantizedFusedMoEMethod"
        and tensor is not None
        and tensor.device.type == "cpu"
    )


def _prepack_for_grouped_gemm(slot: Slot, loaded: torch.Tensor) -> torch.Tensor:
    """The padding and prepacking of CPUUnquantizedExperts.process_weights_after_loading (vLLM 0.32)."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    experts = _fused_experts(slot)
    config = experts.moe_config
    size: int = config.intermediate_size_per_partition
    padded: int = experts._padded_intermediate_size(config)
    if padded != size and slot.attribute == "w13_weight":
        gate, up = loaded[:, :size], loaded[:, size:]
        loaded = torch.cat([_pad_rows(gate, padded), _pad_rows(up, padded)], dim=1)
    elif padded != size:
        loaded = torch.nn.functional.pad(loaded, (0, padded - size))
    packed: torch.Tensor = cpu_prepack_moe_weight(loaded, experts.isa)
    return packed


def _fused_experts(slot: Slot) -> Any:
    kernel = getattr(getattr(slot.module, "quant_method", None), "moe_kernel", None)
    experts = getattr(kernel, "fused_experts", None)
    if experts is None:
        raise LookupError(f"{slot.name}: this vLLM has no grouped-GEMM experts on the layer")
    return experts


def _pad_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, 0, rows - tensor.shape[1]))


KERNEL_LAYOUTS: tuple[KernelLayout, ...] = (
    KernelLayout("cpu-grouped-gemm-prepack", _is_cpu_unquantized_expert_weight, _prepack_for_grouped_gemm),
)


def as_fed(checkpoint: Sequence[Checkpoint], dtypes: Mapping[str, torch.dtype]) -> list[Checkpoint]:
    """The checkpoint as the recorder feeds it: tensors that vLLM dequantises into a fused parameter as that dtype.

    DeepSeek's sparse indexer joins ``wk`` (FP8 blocks in some checkpoints) and ``weights_proj`` (bfloat16) into one
    unquantised parameter. What travels is the parameter's dtype, so that no engine dequantises during a round; the
    scales then have no place to go.
    """
    fed = []
    for entry in checkpoint:
        owner, found, kind = entry.name.rpartition(".indexer.wk.")
        fused = dtypes.get(f"{owner}.indexer.wk_weights_proj.weight") if found else None
        if fused is None or (kind == "weight" and entry.dtype.itemsize > 1):
            fed.append(entry)
        elif kind == "weight":
            fed.append(Checkpoint(entry.name, entry.shape, fused))
    return fed
