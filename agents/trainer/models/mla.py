"""Decoders with multi-head latent attention: DeepSeek-V2, V3, V3.2, Kimi-K2 and GLM-MoE-DSA."""

from collections.abc import Iterator
from typing import ClassVar

from weightsync.agents.trainer.models.moe import Glm4MoeTable
from weightsync.agents.trainer.slots.conversion import ConversionSpec


class DeepseekV3Table(Glm4MoeTable):
    """DeepSeek-V3 and Kimi-K2: latent attention, sigmoid router with a float32 correction bias, dense first layers.

    Layers of multi-token prediction (behind ``num_hidden_layers``) are not part of the table: engines that serve the
    model without speculation do not load them.
    """

    architectures: ClassVar[tuple[str, ...]] = ("DeepseekV3ForCausalLM",)
    default_topk_method: ClassVar[str] = "noaux_tc"

    def conversion_specs(self, layer_idx: int) -> Iterator[ConversionSpec]:
        yield from self.norms(layer_idx)
        yield from self.attention(layer_idx)
        if not self.sparse(layer_idx):
            yield from self.dense_mlp(layer_idx)
            return
        yield self.plain(layer_idx, "mlp.gate.weight")
        if self.config.text("topk_method", self.default_topk_method) == "noaux_tc":
            yield self.float32(layer_idx, "mlp.gate.e_score_correction_bias")
        yield from self.shared_experts(layer_idx)
        experts = self.config.first_integer("n_routed_experts", "num_local_experts")
        yield from self.experts(layer_idx, experts, self.config.integer("moe_intermediate_size"))

    def sparse(self, layer: int) -> bool:
        """Whether the layer's MLP has routed experts."""
        first, every = self.config.integer("first_k_dense_replace", 0), self.config.integer("moe_layer_freq", 1)
        return layer >= first and layer % every == 0

    def attention(self, layer: int) -> Iterator[ConversionSpec]:
        latent = self.config.integer("kv_lora_rank") + self.config.integer("qk_rope_head_dim")
        bias = self.config.flag("attention_bias")
        queries = self.config.integer("q_lora_rank", 0)
        if queries:
            yield self.linear(layer, "self_attn.q_a_proj.weight", (0, queries))
            if bias:
                yield self.plain(layer, "self_attn.q_a_proj.bias", (0, queries))
            yield self.plain(layer, "self_attn.q_a_layernorm.weight")
            yield self.linear(layer, "self_attn.q_b_proj.weight")
        else:
            yield self.linear(layer, "self_attn.q_proj.weight")
        yield self.linear(layer, "self_attn.kv_a_proj_with_mqa.weight", (queries, latent))
        if bias:
            yield self.plain(layer, "self_attn.kv_a_proj_with_mqa.bias", (queries, latent))
        yield self.plain(layer, "self_attn.kv_a_layernorm.weight")
        yield self.linear(layer, "self_attn.kv_b_proj.weight")
        yield self.linear(layer, "self_attn.o_proj.weight")
        if bias:
            yield self.plain(layer, "self_attn.o_proj.bias")


class DeepseekV2Table(DeepseekV3Table):
    """DeepSeek-V2: as V3, without a correction bias unless the configuration asks for one."""

    architectures: ClassVar[tuple[str, ...]] = ("DeepseekV2ForCausalLM",)
    default_topk_method: ClassVar[str] = "greedy"


class DeepseekV32Table(DeepseekV3Table):
    """DeepSeek-V3.2: V3 with the sparse-attention indexer.

    vLLM fuses the indexer's key and weight projections into one bfloat16 matrix (an FP8 ``wk`` of a checkpoint is
    widened at load), so both are sent in the forward dtype; its key norm is float32.
    """

    architectures: ClassVar[tuple[str, ...]] = ("DeepseekV32ForCausalLM",)

    def attention(self, layer: int) -> Iterator[ConversionSpec]:
        yield from super().attention(layer)
        if self.indexed(layer):
            yield self.linear(layer, "self_attn.indexer.wq_b.weight")
            yield self.plain(layer, "self_attn.indexer.wk.weight")
            yield self.plain(layer, "self_attn.indexer.weights_proj.weight")
            yield self.float32(layer, "self_attn.indexer.k_norm.weight")
            yield self.float32(layer, "self_attn.indexer.k_norm.bias")

    def indexed(self, layer: int) -> bool:
        """Whether the layer has an indexer of its own, and does not reuse the choice of an earlier one."""
        kinds = self.config.sequence("indexer_types") or self.config.sequence("index_topk_pattern")
        if kinds:
            return layer >= len(kinds) or str(kinds[layer]) not in ("shared", "S")
        offset, every = self.config.integer("index_skip_topk_offset", 2), self.config.integer("index_topk_freq", 1)
        return max(layer - offset + 1, 0) % max(every, 1) == 0


class GlmMoeDsaTable(DeepseekV32Table):
    """GLM-5 (GLM-MoE-DSA): V3.2's attention, with the kind of each layer's MLP listed in newer configurations."""

    architectures: ClassVar[tuple[str, ...]] = ("GlmMoeDsaForCausalLM",)

    def sparse(self, layer: int) -> bool:
        kinds = self.config.sequence("mlp_layer_types")
        if kinds:
            return kinds[layer] == "sparse"
        return layer >= self.config.integer("first_k_dense_replace", 3)
