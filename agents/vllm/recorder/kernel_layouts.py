"""Kernel layouts by name: what vLLM's post-load processing makes of a parameter, as a function that we can repeat.

A parameter that ends in a kernel layout is not written directly. Its target is a shadow in the checkpoint's layout;
after a round the function here is applied to the shadow and its result copied over the live parameter, whose address
CUDA graphs and kernels hold. Each function is proved when the engine starts: applied to what the loader left, it must
give the live bytes exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from weightsync.agents.recorder.blueprint import ParameterPlace
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.recorder.interface import KernelLayout
from weightsync.agents.vllm.recorder.vllm_names import (
    DOWN,
    GATE_UP,
    local_intermediate_size,
    moe_config_of,
    quant_method_of,
)

_GATE_UP_WEIGHT: Final = f"{GATE_UP}weight"


def _is_cpu_unquantized_expert_weight(parameter: ParameterPlace) -> bool:
    method = type(quant_method_of(parameter.module)).__name__
    tensor = parameter.current()
    return (
        parameter.attribute in (_GATE_UP_WEIGHT, f"{DOWN}weight")
        and method == "UnquantizedFusedMoEMethod"
        and tensor is not None
        and tensor.device.type == "cpu"
    )


def _prepack_for_grouped_gemm(parameter: ParameterPlace, loaded: torch.Tensor) -> torch.Tensor:
    """The padding and prepacking of CPUUnquantizedExperts.process_weights_after_loading (vLLM 0.32)."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    experts = _fused_experts(parameter)
    config = moe_config_of(experts)
    size = local_intermediate_size(config)
    padded: int = experts._padded_intermediate_size(config)
    if padded != size and parameter.attribute == _GATE_UP_WEIGHT:
        # Gate and up are padded one by one: the kernel splits the padded rows in the middle.
        gate, up = loaded[:, :size], loaded[:, size:]
        loaded = torch.cat([_pad_rows(gate, padded), _pad_rows(up, padded)], dim=1)
    elif padded != size:
        loaded = torch.nn.functional.pad(loaded, (0, padded - size))
    packed: torch.Tensor = cpu_prepack_moe_weight(loaded, experts.isa)
    return packed


def _fused_experts(parameter: ParameterPlace) -> Any:
    kernel = getattr(quant_method_of(parameter.module), "moe_kernel", None)
    experts = getattr(kernel, "fused_experts", None)
    if experts is None:
        raise LookupError(f"{parameter.name}: this vLLM has no grouped-GEMM experts on the layer")
    return experts


def _pad_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, 0, rows - tensor.shape[1]))


KERNEL_LAYOUTS: Final[tuple[KernelLayout, ...]] = (
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
            fed.append(entry)  # not fused, or not quantised: loaded as it is
        elif kind == "weight":
            fed.append(Checkpoint(entry.name, entry.shape, fused))
        # What remains are scales of such a weight, which are left out.
    return fed
