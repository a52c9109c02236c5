"""Names inside vLLM's layers that several modules of the recorder rely on: each is written down here and nowhere else.

vLLM publishes none of them. When a new vLLM renames one, this is the file to change.
"""

from typing import Any, Final

GATE_UP: Final = "w13_"
"""Prefix of the parameters that hold the gate and up projections of all local experts, gate first: ``w13_weight``,
``w13_weight_scale_inv``."""
DOWN: Final = "w2_"
"""Prefix of the parameters that hold the down projections of all local experts."""

CACHE_SCALES: Final = ("q_scale", "k_scale", "v_scale", "prob_scale", "q_zero_point", "k_zero_point", "v_zero_point")
"""Of a quantised KV cache: constants from the engine's start unless the checkpoint brings them. vLLM makes zero points
for compressed-tensors' checkpoints of any kind, and reads none."""


def is_expert_weight(attribute: str) -> bool:
    """Whether a parameter of this name stacks the local experts along its first dimension."""
    return attribute.startswith((GATE_UP, DOWN))


def vocabulary_rows(layer: Any) -> int | None:
    """Rows of an embedding or output head as the checkpoint has it, without vLLM's padding; None for other layers."""
    rows = getattr(layer, "org_vocab_size", None)
    return None if rows is None else int(rows)


def quant_method_of(layer: Any) -> Any:
    """The object that loads, processes and applies the layer's weights; None if it has none."""
    return getattr(layer, "quant_method", None)


def moe_config_of(layer: Any) -> Any:
    """``FusedMoEConfig`` of a layer of experts (some versions of vLLM have the shorter name); None for other layers."""
    return getattr(layer, "moe_config", None) or getattr(layer, "moe", None)


def logical_experts(moe_config: Any) -> int:
    """Experts of the checkpoint, without the redundant copies that a load balancer adds; 0 if it does not say."""
    return int(getattr(moe_config, "num_logical_experts", 0) or getattr(moe_config, "num_experts", 0))


def local_slots(moe_config: Any) -> range:
    """The physical experts that this rank holds, by their global number."""
    count = int(moe_config.num_local_experts)
    first = int(moe_config.moe_parallel_config.ep_rank) * count
    return range(first, first + count)


def hidden_size(moe_config: Any) -> int:
    """Width of the tokens that experts see, as the checkpoint has it: without a kernel's padding."""
    return int(getattr(moe_config, "hidden_dim_unpadded", 0) or moe_config.hidden_dim)


def intermediate_size(moe_config: Any) -> int:
    """Rows of one expert's gate projection over all tensor-parallel ranks."""
    whole = getattr(moe_config, "intermediate_size", 0)
    return int(whole or local_intermediate_size(moe_config) * int(moe_config.moe_parallel_config.tp_size))


def local_intermediate_size(moe_config: Any) -> int:
    """Rows of one expert's gate projection on this rank."""
    return int(moe_config.intermediate_size_per_partition)


def is_padded(moe_config: Any) -> bool:
    """Whether kernels need more rows or columns than the checkpoint has, which stay as the engine's start left them."""
    pairs = (
        ("hidden_dim", "hidden_dim_unpadded"),
        ("intermediate_size_per_partition", "intermediate_size_per_partition_unpadded"),
    )
    return any(
        (getattr(moe_config, unpadded, None) or getattr(moe_config, padded)) != getattr(moe_config, padded)
        for padded, unpadded in pairs
    ) or bool(getattr(moe_config, "tp_shard_with_padding", False))
