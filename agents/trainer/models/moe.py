"""Decoders with grouped-query attention and routed experts: Qwen3-MoE and GLM-4 MoE."""

from collections.abc import Iterator
from typing import ClassVar

from weightsync.agents.trainer.models.dense import LlamaTable, Qwen3Table
from weightsync.agents.trainer.slots.conversion import ConversionSpec


class Qwen3MoeTable(Qwen3Table):
    """Qwen3-MoE: softmax router, no shared experts, some layers dense by configuration."""

    architectures: ClassVar[tuple[str, ...]] = ("Qwen3MoeForCausalLM",)

    def conversion_specs(self, layer_idx: int) -> Iterator[ConversionSpec]:
        yield from self.norms(layer_idx)
        yield from self.attention(layer_idx)
        if self._sparse(layer_idx):
            yield self.plain(layer_idx, "mlp.gate.weight")
            experts = self.config.first_integer("num_experts", "num_local_experts")
            yield from self.experts(layer_idx, experts, self.config.integer("moe_intermediate_size"))
        else:
            yield from self.dense_mlp(layer_idx)

    def _sparse(self, layer: int) -> bool:
        step = self.config.integer("decoder_sparse_step", 1)
        return layer not in self.config.sequence("mlp_only_layers") and (layer + 1) % step == 0


class Glm4MoeTable(LlamaTable):
    """GLM-4.5 and its successors without sparse attention: sigmoid router kept in float32 by engines."""

    architectures: ClassVar[tuple[str, ...]] = ("Glm4MoeForCausalLM",)

    def conversion_specs(self, layer_idx: int) -> Iterator[ConversionSpec]:
        yield from self.norms(layer_idx)
        yield from self.attention(layer_idx)
        if layer_idx < self.config.integer("first_k_dense_replace", 1):
            yield from self.dense_mlp(layer_idx)
            return
        yield self.widened(layer_idx, "mlp.gate.weight")
        yield self.float32(layer_idx, "mlp.gate.e_score_correction_bias")
        yield from self.shared_experts(layer_idx)
        experts = self.config.first_integer("n_routed_experts", "num_local_experts")
        yield from self.experts(layer_idx, experts, self.config.integer("moe_intermediate_size"))

    @property
    def output_bias(self) -> bool:
        return False

    def attention(self, layer: int) -> Iterator[ConversionSpec]:
        yield from super().attention(layer)
        if self.config.flag("use_qk_norm"):
            yield self.plain(layer, "self_attn.q_norm.weight")
            yield self.plain(layer, "self_attn.k_norm.weight")

    def shared_experts(self, layer: int) -> Iterator[ConversionSpec]:
        """The experts that see every token, as one wide MLP."""
        if self.config.integer("n_shared_experts", 0):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                yield self.linear(layer, f"mlp.shared_experts.{projection}.weight")
