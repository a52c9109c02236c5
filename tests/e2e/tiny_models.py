"""Model directories small enough to load in a second, with real weights drawn from a seed.

Also what vLLM serves from FP8 blocks: the checkpoint that a trainer would have saved, quantised on the CPU by the
reference, so that it shares no kernel with what a test pushes.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from weightsync.kernels.fp8_reference import quantize_reference

FP8_BLOCKS: dict[str, Any] = {
    "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
}
"""Keys of a config.json whose linear layers are FP8 blocks."""

FP8_ROWS: dict[str, Any] = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "linear": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False,
                },
                "input_activations": {
                    "num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True,
                },
            }
        },
    }
}  # fmt: skip
"""Likewise, FP8 with a scale for each row."""


def qwen3_config(**overrides: Any) -> dict[str, Any]:
    """The config.json of a Qwen3 small enough to load in a second; ``overrides`` replace its keys."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | overrides


def qwen3_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the checkpoint that belongs to ``config``."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for index in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
            "self_attn.q_norm.weight": (head,),
            "self_attn.k_norm.weight": (head,),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def qwen3_moe_config(**overrides: Any) -> dict[str, Any]:
    """The config.json of a Qwen3-MoE whose every layer has experts; ``overrides`` replace its keys."""
    experts = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    return qwen3_config(**experts) | overrides


def model_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the bf16 checkpoint of a Qwen3 or a Qwen3-MoE."""
    shapes = qwen3_shapes(config)
    if "num_experts" not in config:
        return shapes
    shapes = {name: shape for name, shape in shapes.items() if ".mlp." not in name}
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    for layer in range(config["num_hidden_layers"]):
        shapes[f"model.layers.{layer}.mlp.gate.weight"] = (config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            shapes[f"{prefix}.gate_proj.weight"] = shapes[f"{prefix}.up_proj.weight"] = (inner, hidden)
            shapes[f"{prefix}.down_proj.weight"] = (hidden, inner)
    return shapes


def checkpoint_state(config: Mapping[str, Any], masters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a trainer saves of fp32 ``masters`` (on the CPU): bf16, or FP8 of that where ``config`` says so."""
    state: dict[str, torch.Tensor] = {}
    for name, master in masters.items():
        value = master.to(torch.bfloat16)
        if "quantization_config" in config and name.endswith("_proj.weight"):
            rows, columns = value.shape
            blocks = "weight_block_size" in config["quantization_config"]
            block, suffix = ((128, 128), "_scale_inv") if blocks else ((1, columns), "_scale")
            codes = torch.empty(value.shape, dtype=torch.float8_e4m3fn)
            scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
            quantize_reference(value, codes, scales, block=block)
            state |= {name: codes, f"{name}{suffix}": scales}
        else:
            state[name] = value
    return state


def random_state(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """bf16 weights of 0.15·randn (norms around 1): greedy answers that differ clearly from seed to seed."""
    generator = torch.Generator().manual_seed(seed)
    noise = {name: 0.15 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: (value + (value.ndim == 1)).to(torch.bfloat16) for name, value in noise.items()}


def save_model(directory: Path, config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> Path:
    """Writes a model directory that vLLM loads with ``--skip-tokenizer-init``; returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(config), indent=2))
    save_file({name: value.contiguous() for name, value in state.items()}, directory / "model.safetensors")
    return directory


def save_shards(
    directory: Path, config: Mapping[str, Any], state: Iterable[tuple[str, torch.Tensor]], shard_bytes: int
) -> Path:
    """As ``save_model``, of a model that memory need not hold whole: files of ``shard_bytes`` or little more."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(config), indent=2))
    files: dict[str, str] = {}
    part: dict[str, torch.Tensor] = {}

    def write() -> None:
        name = f"model-{len(set(files.values())):05}.safetensors"
        save_file(part, directory / name)
        files.update(dict.fromkeys(part, name))
        part.clear()

    for name, value in state:
        part[name] = value.contiguous()
        if sum(each.nbytes for each in part.values()) >= shard_bytes:
            write()
    if part:
        write()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return directory


def tiny_qwen3(directory: Path, seed: int, **overrides: Any) -> Path:
    """A tiny Qwen3 with real weights drawn from ``seed``; ``overrides`` replace keys of its config.json."""
    config = qwen3_config(**overrides)
    return save_model(directory, config, random_state(qwen3_shapes(config), seed))
