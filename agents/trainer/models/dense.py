"""Decoders with grouped-query attention and a dense gated MLP: Llama and what is built like it."""

from collections.abc import Iterator
from typing import ClassVar

from weightsync.agents.trainer.models.table import ModelTable
from weightsync.agents.trainer.slots.conversion import ConversionSpec


class LlamaTable(ModelTable):
    """Llama and Mistral."""

    architectures: ClassVar[tuple[str, ...]] = ("LlamaForCausalLM", "MistralForCausalLM")
    qk_norm: ClassVar[bool] = False

    def conversion_specs(self, layer_idx: int) -> Iterator[ConversionSpec]:
        yield from self.norms(layer_idx)
        yield from self.attention(layer_idx)
        yield from self.dense_mlp(layer_idx)

    def norms(self, layer: int) -> Iterator[ConversionSpec]:
        """The two norms of a pre-norm block."""
        yield self.plain(layer, "input_layernorm.weight")
        yield self.plain(layer, "post_attention_layernorm.weight")

    @property
    def _attention_rows(self) -> dict[str, tuple[int, int]]:
        heads = self.config.integer("num_attention_heads")
        width = self.config.integer("head_dim", self.config.integer("hidden_size") // heads)
        queries = heads * width
        keys = self.config.integer("num_key_value_heads", heads) * width
        return {"q_proj": (0, queries), "k_proj": (queries, keys), "v_proj": (queries + keys, keys)}

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases."""
        return self.config.flag("attention_bias")

    @property
    def output_bias(self) -> bool:
        """Whether the output projection of the attention has a bias."""
        return self.config.flag("attention_bias")

    def attention(self, layer: int) -> Iterator[ConversionSpec]:
        """q, k, v and o with their biases, and norms over the heads where the model has them."""
        for projection, rows in self._attention_rows.items():
            yield self.linear(layer, f"self_attn.{projection}.weight", rows)
            if self.qkv_bias:
                yield self.plain(layer, f"self_attn.{projection}.bias", rows)
        yield self.linear(layer, "self_attn.o_proj.weight")
        if self.output_bias:
            yield self.plain(layer, "self_attn.o_proj.bias")
        if self.qk_norm:
            yield self.plain(layer, "self_attn.q_norm.weight")
            yield self.plain(layer, "self_attn.k_norm.weight")

    def dense_mlp(self, layer: int) -> Iterator[ConversionSpec]:
        """gate, up and down."""
        intermediate = self.config.integer("intermediate_size")
        yield self.linear(layer, "mlp.gate_proj.weight", (0, intermediate))
        yield self.linear(layer, "mlp.up_proj.weight", (intermediate, intermediate))
        yield self.linear(layer, "mlp.down_proj.weight")
        if self.config.flag("mlp_bias"):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                yield self.plain(layer, f"mlp.{projection}.bias")


class Qwen3Table(LlamaTable):
    """Qwen3, dense."""

    architectures: ClassVar[tuple[str, ...]] = ("Qwen3ForCausalLM",)
    qk_norm: ClassVar[bool] = True
