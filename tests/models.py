"""Tiny models of every architecture that the engine side must handle: configs, and the tensors of their checkpoints.

Names and shapes are written down here from the published checkpoints, not taken from vLLM or from the recorder, so that
tests compare two independent sources. Sizes are odd on purpose where the architecture allows it (a vocabulary that is
padded, one key head for two ranks, more latent than rotary dimensions), and small everywhere else.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCABULARY = 500
"""Not a multiple of 64: vLLM pads embeddings, and the padding must stay as it is."""
HIDDEN = 128
EXPERTS = 8
FLOAT32_SUFFIXES = ("e_score_correction_bias", "k_norm.bias", "indexer.k_norm.weight", "_scale_inv")
"""Tensors that published checkpoints keep in float32."""

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A config and its checkpoint. ``generates``: the CPU build can run it with written weights (TP 1)."""

    name: str
    config: dict[str, Any]
    shapes: Shapes
    generates: bool = True
    unused: tuple[str, ...] = ()
    """Prefixes of checkpoint tensors that the served model does not have."""
    first_rank_only: str = "\0"
    """End of the names of tensors that the other ranks blank while they load."""
    derivable: bool = True
    """Whether the recorder can tell the checkpoint's tensors from the model when there are no files."""


def _common(**own: Any) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | own


# ------------------------------------------------------------------------------------------------------- dense models
def llama(**overrides: Any) -> TinyModel:
    """Llama with grouped heads and tied embeddings."""
    own = {"num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 256, "tie_word_embeddings": True}
    config = _common(architectures=["LlamaForCausalLM"], model_type="llama", **own) | overrides
    return TinyModel("llama", config, _checkpoint(config, lambda i: _attention(config) | _mlp(HIDDEN, 256, "mlp")))


def qwen3(**overrides: Any) -> TinyModel:
    """Qwen3: norms on queries and keys, one key head that both ranks of TP 2 hold."""
    own = {"num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 256}
    config = _common(architectures=["Qwen3ForCausalLM"], model_type="qwen3", **own) | overrides
    layer = lambda i: _attention(config) | _head_norms(config) | _mlp(HIDDEN, 256, "mlp")  # noqa: E731
    return TinyModel("qwen3", config, _checkpoint(config, layer))


# ------------------------------------------------------------------------------------------------------ expert models
def qwen3_moe(**overrides: Any) -> TinyModel:
    """Qwen3-MoE: every layer has experts, no shared one."""
    own = {
        "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 256, "moe_intermediate_size": 64,
        "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "norm_topk_prob": True,
    }  # fmt: skip
    config = _common(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", **own) | overrides
    layer = lambda i: _attention(config) | _head_norms(config) | _experts(config, shared=0, bias=False)  # noqa: E731
    return TinyModel("qwen3_moe", config, _checkpoint(config, layer))


def glm4_moe(**overrides: Any) -> TinyModel:
    """GLM4-MoE: first layer dense, a shared expert, a bias on expert scores, an MTP layer that is not served."""
    own = {
        "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 256, "moe_intermediate_size": 64,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "use_qk_norm": True,
        "partial_rotary_factor": 0.5, "num_nextn_predict_layers": 1,
    }  # fmt: skip
    config = _common(architectures=["Glm4MoeForCausalLM"], model_type="glm4_moe", **own) | overrides

    def layer(index: int) -> Shapes:
        feed_forward = _experts(config, shared=1, bias=True) if index else _mlp(HIDDEN, 256, "mlp")
        return _attention(config) | _head_norms(config) | feed_forward

    shapes = _checkpoint(config, layer) | _mtp_layer(2, layer)
    return TinyModel("glm4_moe", config, shapes, unused=("model.layers.2.",))


def _latent_config(**own: Any) -> dict[str, Any]:
    return _common(
        num_key_value_heads=4, intermediate_size=256, moe_intermediate_size=64, n_routed_experts=8,
        num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=512, qk_nope_head_dim=64, qk_rope_head_dim=64,
        v_head_dim=64, n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=1.0, moe_layer_freq=1,
    ) | own  # fmt: skip


def deepseek_v2(**overrides: Any) -> TinyModel:
    """DeepSeek-V2-Lite's shape: latent keys, queries that are not compressed, two shared experts."""
    config = _latent_config(
        architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2", q_lora_rank=None, n_shared_experts=2,
        topk_method="greedy", scoring_func="softmax",
    ) | overrides  # fmt: skip

    def layer(index: int) -> Shapes:
        feed_forward = _experts(config, shared=2, bias=False) if index else _mlp(HIDDEN, 256, "mlp")
        return _latent_attention(config) | feed_forward

    return TinyModel("deepseek_v2", config, _checkpoint(config, layer))


def deepseek_v3(**overrides: Any) -> TinyModel:
    """DeepSeek-V3: queries compressed too (fused with the latent keys), bias on expert scores, an MTP layer."""
    config = _latent_config(
        architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", q_lora_rank=96, n_shared_experts=1,
        topk_method="noaux_tc", scoring_func="sigmoid", num_nextn_predict_layers=1,
    ) | overrides  # fmt: skip

    def layer(index: int) -> Shapes:
        feed_forward = _experts(config, shared=1, bias=True) if index else _mlp(HIDDEN, 256, "mlp")
        return _latent_attention(config) | feed_forward

    shapes = _checkpoint(config, layer) | _mtp_layer(2, layer)
    return TinyModel("deepseek_v3", config, shapes, unused=("model.layers.2.",))


def glm_moe_dsa(**overrides: Any) -> TinyModel:
    """GLM-5's architecture: DeepSeek-V3's with an indexer for sparse attention, whose two projections are fused."""
    config = _latent_config(
        architectures=["GlmMoeDsaForCausalLM"], model_type="glm_moe_dsa", q_lora_rank=96, n_shared_experts=1,
        topk_method="noaux_tc", scoring_func="sigmoid", num_nextn_predict_layers=1, index_topk=64,
        index_head_dim=128, index_n_heads=4,
    ) | overrides  # fmt: skip

    def layer(index: int) -> Shapes:
        feed_forward = _experts(config, shared=1, bias=True) if index else _mlp(HIDDEN, 256, "mlp")
        return _latent_attention(config) | _indexer(config) | feed_forward

    shapes = _checkpoint(config, layer) | _mtp_layer(2, layer)
    return TinyModel("glm_moe_dsa", config, shapes, generates=False, unused=("model.layers.2.",))


def gpt_oss(**overrides: Any) -> TinyModel:
    """GPT-OSS dequantised: experts stacked and transposed, gate and up interleaved, sinks, biases everywhere."""
    own = {
        "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 64, "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2, "sliding_window": 128, "attention_bias": True, "swiglu_limit": 7.0,
        "layer_types": ["sliding_attention", "full_attention"], "initial_context_length": 512,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 256,
        },
    }  # fmt: skip
    config = _common(architectures=["GptOssForCausalLM"], model_type="gpt_oss", **own) | overrides
    inner = config["intermediate_size"]
    experts = {
        "self_attn.sinks": (4,), "mlp.router.weight": (EXPERTS, HIDDEN), "mlp.router.bias": (EXPERTS,),
        "mlp.experts.gate_up_proj": (EXPERTS, HIDDEN, 2 * inner), "mlp.experts.gate_up_proj_bias": (EXPERTS, 2 * inner),
        "mlp.experts.down_proj": (EXPERTS, inner, HIDDEN), "mlp.experts.down_proj_bias": (EXPERTS, HIDDEN),
    }  # fmt: skip

    def layer(index: int) -> Shapes:
        attention = _attention(config)
        biases = {name.replace(".weight", ".bias"): shape[:1] for name, shape in attention.items()}
        return attention | biases | experts

    shapes = _checkpoint(config, layer)
    return TinyModel("gpt_oss", config, shapes, first_rank_only="down_proj_bias", derivable=False)


def mamba2(**overrides: Any) -> TinyModel:
    """Mamba-2: no attention; its loader keeps ``-exp(A_log)``."""
    heads, groups, state, inner = 4, 1, 16, 256
    convolved = inner + 2 * groups * state
    config = {
        "architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "hidden_size": HIDDEN, "vocab_size": VOCABULARY,
        "num_hidden_layers": 2, "state_size": state, "num_heads": heads, "head_dim": inner // heads, "n_groups": groups,
        "conv_kernel": 4, "expand": 2, "chunk_size": 64, "use_bias": False, "use_conv_bias": True, "hidden_act": "silu",
        "layer_norm_epsilon": 1e-5, "rms_norm": True, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2,
    } | overrides  # fmt: skip
    layer = {
        "norm.weight": (HIDDEN,), "mixer.in_proj.weight": (inner + convolved + heads, HIDDEN),
        "mixer.conv1d.weight": (convolved, 1, 4), "mixer.conv1d.bias": (convolved,), "mixer.dt_bias": (heads,),
        "mixer.A_log": (heads,), "mixer.D": (heads,), "mixer.norm.weight": (inner,),
        "mixer.out_proj.weight": (HIDDEN, inner),
    }  # fmt: skip
    shapes: Shapes = {"backbone.embeddings.weight": (VOCABULARY, HIDDEN), "backbone.norm_f.weight": (HIDDEN,)}
    shapes |= {f"backbone.layers.{index}.{name}": shape for index in range(2) for name, shape in layer.items()}
    return TinyModel(
        "mamba2", config, shapes | {"lm_head.weight": (VOCABULARY, HIDDEN)}, generates=False, derivable=False
    )


ALL: dict[str, Callable[..., TinyModel]] = {
    "llama": llama,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "glm4_moe": glm4_moe,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "glm_moe_dsa": glm_moe_dsa,
    "gpt_oss": gpt_oss,
    "mamba2": mamba2,
}


# --------------------------------------------------------------------------------------------------- parts of a layer
def _checkpoint(config: Mapping[str, Any], layer: Callable[[int], Shapes]) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], HIDDEN)}
    for index in range(config["num_hidden_layers"]):
        shapes |= dict(_layer(index, layer))
    shapes["model.norm.weight"] = (HIDDEN,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], HIDDEN)
    return shapes


def _layer(index: int, layer: Callable[[int], Shapes]) -> Iterator[tuple[str, tuple[int, ...]]]:
    norms = {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
    for name, shape in (norms | layer(index)).items():
        yield f"model.layers.{index}.{name}", shape


def _mtp_layer(index: int, layer: Callable[[int], Shapes]) -> Shapes:
    extra = {"enorm.weight": (HIDDEN,), "hnorm.weight": (HIDDEN,), "eh_proj.weight": (HIDDEN, 2 * HIDDEN)}
    extra["shared_head.norm.weight"] = (HIDDEN,)
    return dict(_layer(index, layer)) | {f"model.layers.{index}.{name}": shape for name, shape in extra.items()}


def _attention(config: Mapping[str, Any]) -> Shapes:
    head = config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {
        "self_attn.q_proj.weight": (queries, HIDDEN),
        "self_attn.k_proj.weight": (keys, HIDDEN),
        "self_attn.v_proj.weight": (keys, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, queries),
    }


def _head_norms(config: Mapping[str, Any]) -> Shapes:
    head = config["head_dim"]
    return {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}


def _latent_attention(config: Mapping[str, Any]) -> Shapes:
    heads, nope, rope, value, latent = 4, 64, 64, 64, 512
    q_lora_rank = config["q_lora_rank"]
    if q_lora_rank:
        queries: Shapes = {
            "self_attn.q_a_proj.weight": (q_lora_rank, HIDDEN),
            "self_attn.q_a_layernorm.weight": (q_lora_rank,),
            "self_attn.q_b_proj.weight": (heads * (nope + rope), q_lora_rank),
        }
    else:
        queries = {"self_attn.q_proj.weight": (heads * (nope + rope), HIDDEN)}
    return queries | {
        "self_attn.kv_a_proj_with_mqa.weight": (latent + rope, HIDDEN),
        "self_attn.kv_a_layernorm.weight": (latent,),
        "self_attn.kv_b_proj.weight": (heads * (nope + value), latent),
        "self_attn.o_proj.weight": (HIDDEN, heads * value),
    }


def _indexer(config: Mapping[str, Any]) -> Shapes:
    heads, head, q_lora_rank = 4, 128, config["q_lora_rank"]
    return {
        "self_attn.indexer.wq_b.weight": (heads * head, q_lora_rank),
        "self_attn.indexer.wk.weight": (head, HIDDEN),
        "self_attn.indexer.k_norm.weight": (head,),
        "self_attn.indexer.k_norm.bias": (head,),
        "self_attn.indexer.weights_proj.weight": (heads, HIDDEN),
    }


def _mlp(hidden: int, inner: int, prefix: str) -> Shapes:
    return {
        f"{prefix}.gate_proj.weight": (inner, hidden),
        f"{prefix}.up_proj.weight": (inner, hidden),
        f"{prefix}.down_proj.weight": (hidden, inner),
    }


def _experts(config: Mapping[str, Any], *, shared: int, bias: bool) -> Shapes:
    count, inner = EXPERTS, config["moe_intermediate_size"]
    shapes: Shapes = {"mlp.gate.weight": (count, HIDDEN)}
    if bias:
        shapes["mlp.gate.e_score_correction_bias"] = (count,)
    for expert in range(count):
        shapes |= _mlp(HIDDEN, inner, f"mlp.experts.{expert}")
    return shapes | (_mlp(HIDDEN, shared * inner, "mlp.shared_experts") if shared else {})


# ----------------------------------------------------------------------------------------------------- FP8 in blocks
BLOCK = 128
KEPT_OUT = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "weights_proj", "eh_proj")
"""Parts of the names of tensors that FP8 checkpoints leave in their own dtype."""


def in_fp8_blocks(build: Callable[..., TinyModel], **overrides: Any) -> TinyModel:
    """``build``'s model as a checkpoint quantised in blocks of 128 × 128: sizes on the grid, a scale per block."""
    quantization = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head", "mlp.gate"],
    }  # fmt: skip
    plain = build(quantization_config=quantization, moe_intermediate_size=256, **overrides)
    shapes = dict(plain.shapes)
    for name, shape in plain.shapes.items():
        if len(shape) == 2 and not any(part in name for part in KEPT_OUT):
            shapes[f"{name}_scale_inv"] = (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))
    return TinyModel(f"{plain.name}_fp8", plain.config, shapes, generates=False, unused=plain.unused)


# ------------------------------------------------------------------------------------------------------------ weights
def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """0.15·randn (norms around 1) in bfloat16, in float32 where checkpoints have that: answers differ by seed."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        value = 0.15 * torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            value = value + 1
        if f"{name}_scale_inv" in shapes:
            weights[name] = value.to(torch.float8_e4m3fn)
        else:
            weights[name] = value.to(torch.float32 if name.endswith(FLOAT32_SUFFIXES) else torch.bfloat16)
    return weights


def save(directory: Path, model: TinyModel, weights: Mapping[str, torch.Tensor]) -> Path:
    """Write a model directory that vLLM loads; returns it. Without weights only the config."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(model.config, indent=2))
    if weights:
        save_file(dict(weights), directory / "model.safetensors")
    return directory
