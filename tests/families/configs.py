"""Tiny stock configurations of transformers: what kinds of checkpoints there are, small enough to load in a second.

A family is a configuration class of transformers and a few numbers; nothing else is known about it here. Sizes are odd
where vLLM allows it: a vocabulary that is padded, heads that do not divide evenly, experts that are no power of two.
Head sizes are those that vLLM's CPU attention has (32 and up).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

VOCABULARY: Final = 503
"""A prime: vLLM pads embeddings for every way of sharding, and the padding must stay as it is."""

COMMON: Final[Mapping[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE: Final[Mapping[str, Any]] = {"num_experts_per_tok": 2, "moe_intermediate_size": 96}


@dataclass(frozen=True, slots=True)
class Family:
    """A configuration. ``kind``: what is particular about its checkpoint, in a few words, for the table in the docs."""

    name: str
    model_type: str
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Any]:
        """All keys for ``AutoConfig.for_model``."""
        return {**COMMON, **self.settings}


def _all(*families: Family) -> dict[str, Family]:
    assert len({family.name for family in families}) == len(families)
    return {family.name: family for family in families}


# Numbers of attention heads of 32 elements each.
_SIX: Final = {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 2}
_GPT: Final = {"n_embd": 128, "n_head": 4, "n_layer": 2, "n_positions": 512, "n_inner": 192}
_LATENT: Final = {
    "num_key_value_heads": 4, "kv_lora_rank": 512, "q_lora_rank": 96, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64,
    "v_head_dim": 64, "n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, **MOE,
}  # fmt: skip
_HYBRID: Final = {"layer_types": ["linear_attention", "full_attention"]}
_LINEAR: Final = {
    "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64,
    "linear_value_head_dim": 64, "linear_conv_kernel_dim": 4, **_HYBRID,
}  # fmt: skip
_MAMBA: Final = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_expand": 2}

FAMILIES: Final = _all(
    # ------------------------------------------------------------------------------------------------------ dense
    Family("llama", "llama", "dense, 6 heads over 2", {**_SIX}),
    Family("llama-tied-bias", "llama", "tied, biased", {"tie_word_embeddings": True, "attention_bias": True,
                                                        "mlp_bias": True}),
    Family("llama-one-kv", "llama", "one key head for all ranks", {"num_key_value_heads": 1}),
    Family("mistral", "mistral", "dense, sliding window", {"sliding_window": 64, "head_dim": 32}),
    Family("ministral", "ministral", "dense, window by layer", {"head_dim": 32}),
    Family("qwen2", "qwen2", "biased queries, keys, values", {}),
    Family("qwen2-tied", "qwen2", "biased, tied", {"tie_word_embeddings": True}),
    Family("qwen3", "qwen3", "norms on heads", {"head_dim": 32}),
    Family("qwen3-tied-bias", "qwen3", "norms on heads, tied, biased", {"head_dim": 64, "tie_word_embeddings": True,
                                                                        "attention_bias": True}),
    Family("gemma", "gemma", "tied, wide heads", {"head_dim": 64, "num_key_value_heads": 1}),
    Family("gemma2", "gemma2", "tied, four norms, capped logits", {"head_dim": 32, "query_pre_attn_scalar": 32,
                                                                   "sliding_window": 64}),
    Family("gemma3-text", "gemma3_text", "tied, norms on heads", {"head_dim": 32, "query_pre_attn_scalar": 32,
                                                                  "sliding_window": 64}),
    Family("gemma4-text", "gemma4_text", "tied, embeddings per layer", {
        "head_dim": 32, "global_head_dim": 64, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 503,
        "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}),
    Family("vaultgemma", "vaultgemma", "tied, two norms", {"head_dim": 32, "query_pre_attn_scalar": 32}),
    Family("phi", "phi", "biased head, biased everywhere", {"num_key_value_heads": 4}),
    Family("phi3", "phi3", "fused queries-keys-values and gate-up", {}),
    Family("olmo", "olmo", "norms without weights", {}),
    Family("olmo2", "olmo2", "norms after the blocks", {}),
    Family("olmo3", "olmo3", "norms after the blocks, window by layer", {"sliding_window": 64}),
    Family("granite", "granite", "scaled residuals, tied", {"tie_word_embeddings": True, "attention_multiplier": 0.2,
                                                            "embedding_multiplier": 2.0, "logits_scaling": 2.0}),
    Family("glm", "glm", "fused gate-up, partial rotary", {"head_dim": 32, "attention_bias": True}),
    Family("glm4", "glm4", "fused gate-up, four norms", {"head_dim": 32}),
    Family("cohere", "cohere", "tied, parallel blocks", {}),
    Family("cohere2", "cohere2", "tied, window by layer", {"sliding_window": 64, "head_dim": 32}),
    Family("stablelm", "stablelm", "biased layer norms", {"use_qkv_bias": True}),
    Family("starcoder2", "starcoder2", "biased everywhere, tied", {}),
    Family("nemotron", "nemotron", "norms of 1 + weight, no gate", {"head_dim": 32}),
    Family("exaone4", "exaone4", "norms on heads, after the blocks", {"sliding_window": 64, "head_dim": 32}),
    Family("ernie4.5", "ernie4_5", "tied, interleaved rotary", {"head_dim": 32}),
    Family("smollm3", "smollm3", "rotary in some layers only", {"tie_word_embeddings": True}),
    Family("seed-oss", "seed_oss", "biased, output unbiased", {"head_dim": 32}),
    Family("arcee", "arcee", "no gate", {"head_dim": 32}),
    Family("apertus", "apertus", "activation with weights of its own", {"head_dim": 32}),
    Family("helium", "helium", "dense", {"head_dim": 32}),
    Family("hunyuan-dense", "hunyuan_v1_dense", "norms on heads", {"head_dim": 32}),
    Family("cwm", "cwm", "dense, window by layer", {"head_dim": 32, "sliding_window": 64}),
    Family("jais2", "jais2", "biased, no gate", {"head_dim": 32}),
    Family("nanochat", "nanochat", "norms without weights, no gate", {}),
    Family("opt", "opt", "learned positions with an offset, tied", {"ffn_dim": 192, "word_embed_proj_dim": 128,
                                                                    "do_layer_norm_before": True}),
    Family("gpt2", "gpt2", "transposed weights (Conv1D), fused, tied", _GPT),
    Family("gptj", "gptj", "biased head, parallel blocks", {**_GPT, "rotary_dim": 16}),
    Family("gpt-bigcode", "gpt_bigcode", "one key head, fused, tied", _GPT),
    Family("gpt-neox", "gpt_neox", "fused by head, renamed head", {}),
    Family("falcon", "falcon", "fused, one key head, tied", {"multi_query": True, "new_decoder_architecture": False,
                                                             "parallel_attn": True, "bias": False, "alibi": False}),
    Family("falcon-new", "falcon", "fused by group, two norms", {"new_decoder_architecture": True, "num_kv_heads": 2,
                                                                 "bias": False, "alibi": False}),
    Family("bloom", "bloom", "fused by head, norm of embeddings, alibi", {"n_head": 4, "n_layer": 2}),
    Family("mpt", "mpt", "fused, alibi, tied", {"d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}),
    Family("persimmon", "persimmon", "fused by head, norms on heads", {"num_key_value_heads": 4}),
    # ------------------------------------------------------------------------------------------ experts of all kinds
    Family("mixtral", "mixtral", "experts, renamed", {"num_local_experts": 6, "head_dim": 32}),
    Family("qwen2-moe", "qwen2_moe", "experts and a gated shared one", {
        **MOE, "num_experts": 6, "shared_expert_intermediate_size": 160, "decoder_sparse_step": 1}),
    Family("qwen3-moe", "qwen3_moe", "experts, one dense layer", {**MOE, "num_experts": 6, "head_dim": 32,
                                                                  "mlp_only_layers": [0]}),
    Family("olmoe", "olmoe", "experts, wide norms on heads", {"num_experts": 6, "num_experts_per_tok": 2}),
    Family("phimoe", "phimoe", "experts, biased head and norms", {"num_local_experts": 6, "head_dim": 32,
                                                                  "num_experts_per_tok": 2}),
    Family("gpt-oss", "gpt_oss", "biased experts, sinks", {"num_local_experts": 6, "num_experts_per_tok": 2,
                                                           "head_dim": 32, "sliding_window": 64}),
    Family("granitemoe", "granitemoe", "experts stored in one tensor", {"num_local_experts": 6,
                                                                        "num_experts_per_tok": 2}),
    Family("granitemoeshared", "granitemoeshared", "stacked experts and a shared one", {
        "num_local_experts": 6, "num_experts_per_tok": 2, "shared_intermediate_size": 96}),
    Family("glm4-moe", "glm4_moe", "experts, shared ones, a bias on scores", {
        **MOE, "n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 32,
        "use_qk_norm": True, "n_group": 1, "topk_group": 1}),
    Family("dots1", "dots1", "experts, shared ones, norms on heads", {
        **MOE, "n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 32, "n_group": 1,
        "topk_group": 1}),
    Family("ernie4.5-moe", "ernie4_5_moe", "experts, shared ones, a bias on scores", {
        "moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 96, "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1, "head_dim": 32}),
    Family("hunyuan-moe", "hunyuan_v1_moe", "experts and a shared one", {
        "num_experts": 6, "moe_topk": 2, "head_dim": 32}),
    Family("flex-olmo", "flex_olmo", "experts, norms after the blocks", {"num_experts": 6, "num_experts_per_tok": 2}),
    Family("llama4-text", "llama4_text", "stacked experts, transposed", {
        "num_local_experts": 6, "num_experts_per_tok": 1, "head_dim": 32, "intermediate_size_mlp": 192,
        "interleave_moe_layer_step": 1, "attention_chunk_size": 128}),
    Family("dbrx", "dbrx", "experts stored in one tensor", {
        "d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 192, "moe_num_experts": 6, "moe_top_k": 2, "hidden_size": 128}}),
    Family("minimax-m2", "minimax_m2", "experts, wide norms on heads", {
        "num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 32, "rotary_dim": 32,
        "scoring_func": "sigmoid"}),
    Family("deepseek-v2", "deepseek_v2", "latent keys, experts, shared ones", {
        **_LATENT, "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": True}),
    Family("deepseek-v3", "deepseek_v3", "latent keys, experts, a bias on scores", {
        **_LATENT, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}),
    # ------------------------------------------------------------------------------------- recurrent and hybrid ones
    Family("qwen3-next", "qwen3_next", "linear attention, experts", {
        **MOE, **_LINEAR, "num_experts": 6, "shared_expert_intermediate_size": 96}),
    Family("qwen3.5-text", "qwen3_5_text", "linear attention, text part of a VLM", _LINEAR),
    Family("qwen3.5-moe-text", "qwen3_5_moe_text", "linear attention, experts, text part of a VLM", {
        **MOE, **_LINEAR, "num_experts": 6, "shared_expert_intermediate_size": 96}),
    Family("lfm2", "lfm2", "convolutions, tied", {"layer_types": ["conv", "full_attention"],
                                                "conv_dim": 128, "conv_dim_out": 128}),
    Family("mamba2", "mamba2", "state space", {"intermediate_size": 256, "num_heads": 8, "head_dim": 32,
                                               "state_size": 16, "n_groups": 2, "expand": 2}),
    Family("bamba", "bamba", "state space and attention", {**_MAMBA, "attn_layer_indices": [1]}),
    Family("falcon-h1", "falcon_h1", "state space beside attention", {**_MAMBA, "mamba_d_ssm": 256, "head_dim": 32}),
    Family("granitemoehybrid", "granitemoehybrid", "state space, experts", {
        **_MAMBA, "num_local_experts": 6, "num_experts_per_tok": 2, "shared_intermediate_size": 96,
        "layer_types": ["mamba", "attention"]}),
    Family("nemotron-h", "nemotron_h", "state space, no gate", {
        "layers_block_type": ["mamba", "attention"], "head_dim": 32, "mamba_num_heads": 8, "mamba_head_dim": 32,
        "ssm_state_size": 16, "n_groups": 2}),
)  # fmt: skip
"""By name, in the order in which they run."""

DOZEN: Final = (
    "gpt-oss", "qwen2-tied", "gemma2", "phi3", "mixtral", "qwen2-moe", "gpt2", "olmo2", "gpt-neox", "granite",
    "gemma4-text", "falcon", "bloom",
)  # fmt: skip
"""What the tests run: one of each kind of checkpoint that ever was wrong or needs a route of its own."""
