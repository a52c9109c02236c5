"""The checkpoint that a model expects, derived from its layers, for engines started on dummy weights.

vLLM's layers know their unsharded sizes and the names that were fused into them. What is derived here is only a
proposal: the recorder runs vLLM's loader over it and refuses every parameter that stays unreached, and the plan
compares names, shapes and dtypes with what the trainer has. A wrong proposal fails; it never becomes a wrong layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from weightsync.agents.recorder.trace import Checkpoint
from weightsync.agents.recorder.unreached import CACHE_SCALES


def expected_checkpoint(model: nn.Module) -> list[Checkpoint]:
    """Names, full shapes and dtypes of the checkpoint tensors that fill ``model``'s parameters."""
    packed: dict[str, list[str]] = dict(getattr(model, "packed_modules_mapping", None) or {})
    found: dict[str, Checkpoint] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in seen or _is_computed(module, attribute, tensor):
                continue
            seen.add(id(tensor))
            for entry in _entries(path, module, attribute, tensor, packed):
                found[entry.name] = entry
    return list(found.values())


def _is_computed(module: nn.Module, attribute: str, tensor: torch.Tensor) -> bool:
    """Rotary tables, expert maps, scales of the KV cache: what a model fills itself."""
    private = attribute.startswith("_") or attribute in module._non_persistent_buffers_set
    is_table = private or not tensor.is_floating_point()
    return (attribute in module._buffers and is_table) or attribute in CACHE_SCALES


def _entries(
    path: str, module: nn.Module, attribute: str, tensor: torch.Tensor, packed: dict[str, list[str]]
) -> Iterator[Checkpoint]:
    kind = {cls.__name__ for cls in type(module).__mro__}
    parent, _, leaf = path.rpartition(".")
    prefix = f"{parent}." if parent else ""
    shape = tuple(tensor.shape)
    layer: Any = module
    if attribute.startswith(("w13_", "w2_")):
        yield from _experts(path, layer, attribute, tensor)
    elif "VocabParallelEmbedding" in kind and attribute == "weight":
        yield Checkpoint(f"{path}.weight", (int(layer.org_vocab_size), *shape[1:]), tensor.dtype)
    elif "VocabParallelEmbedding" in kind:
        yield Checkpoint(f"{path}.{attribute}", (int(layer.org_vocab_size),), tensor.dtype)
    elif "QKVParallelLinear" in kind:
        rows = [layer.total_num_heads * layer.head_size]
        rows += [layer.total_num_kv_heads * layer.head_size, layer.total_num_kv_heads * layer.v_head_size]
        names = packed.get(leaf, ["q_proj", "k_proj", "v_proj"])
        yield from _fused(prefix, names, rows, attribute, tensor, layer)
    elif "MergedColumnParallelLinear" in kind:
        names = packed.get(leaf) or _KNOWN_FUSIONS.get(leaf, [])
        yield from _fused(prefix, names, list(layer.output_sizes), attribute, tensor, layer)
    elif "LinearBase" in kind and attribute != "e_score_correction_bias":
        full = _linear_shape(attribute, tensor, int(layer.output_size), int(layer.input_size), layer)
        yield Checkpoint(f"{path}.{attribute}", full, tensor.dtype)
    else:
        yield Checkpoint(f"{path}.{attribute}" if path else attribute, shape, tensor.dtype)


_KNOWN_FUSIONS = {
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
    "wk_weights_proj": ["wk", "weights_proj"],
}
"""Fusions that vLLM's models make without naming them in ``packed_modules_mapping``."""


def _fused(
    prefix: str, names: list[str], rows: list[int], attribute: str, tensor: torch.Tensor, layer: Any
) -> Iterator[Checkpoint]:
    for name, count in zip(names, rows, strict=False):
        full = _linear_shape(attribute, tensor, int(count), int(layer.input_size), layer)
        yield Checkpoint(f"{prefix}{name}.{attribute}", full, tensor.dtype)


def _linear_shape(attribute: str, tensor: torch.Tensor, rows: int, columns: int, layer: Any) -> tuple[int, ...]:
    if attribute == "bias":
        return (rows,)
    if attribute.endswith("_scale_inv"):
        block_rows, block_columns = _block(layer)
        return (-(-rows // block_rows), -(-columns // block_columns))
    return (rows, columns) if tensor.dim() == 2 else tuple(tensor.shape)


def _block(layer: Any) -> tuple[int, int]:
    quantization = getattr(getattr(layer, "quant_method", None), "quant_config", None)
    size = getattr(layer, "weight_block_size", None) or getattr(quantization, "weight_block_size", None) or (128, 128)
    return int(size[0]), int(size[1])


def _experts(path: str, layer: Any, attribute: str, tensor: torch.Tensor) -> Iterator[Checkpoint]:
    """One tensor per expert and projection, as Hugging Face checkpoints of these models have them."""
    owner = path.removesuffix(".routed_experts")
    config: Any = getattr(layer, "moe_config", None) or getattr(layer, "moe", None)
    count = int(getattr(config, "num_logical_experts", 0) or getattr(config, "num_experts", 0))
    hidden = int(getattr(config, "hidden_dim_unpadded", 0) or config.hidden_dim)
    tp_size = int(config.moe_parallel_config.tp_size)
    size = int(getattr(config, "intermediate_size", 0) or config.intermediate_size_per_partition * tp_size)
    part, _, rest = attribute.partition("_")
    names = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}[part]
    rows, columns = (size, hidden) if part == "w13" else (hidden, size)
    shape = _linear_shape(rest, tensor[0], rows, columns, layer)
    for expert in range(count):
        for name in names:
            yield Checkpoint(f"{owner}.{expert}.{name}.{rest}", shape, tensor.dtype)
