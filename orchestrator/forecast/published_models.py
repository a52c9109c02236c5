"""The checkpoint tensors of DeepSeek-shaped mixtures of experts, from the sizes of their published configurations."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from weightsync.orchestrator.protocol.layout import Tensor

BLOCK: Final = 128
"""Rows and columns of one FP8 scale."""

FP8: Final = "float8_e4m3fn"
BF16: Final = "bfloat16"
FP32: Final = "float32"


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a model with multi-head latent attention and routed experts. ``indexer``: heads and width, or none."""

    name: str
    hidden: int
    layers: int
    dense_layers: int
    intermediate: int
    expert_intermediate: int
    experts: int
    heads: int
    q_lora: int
    kv_lora: int
    rope: int
    nope: int
    value: int
    vocab: int
    indexer: tuple[int, int] | None = None
    next_token_layers: int = 0

    @property
    def all_layers(self) -> int:
        """With those that predict further tokens."""
        return self.layers + self.next_token_layers


GEOMETRIES: Final = {
    "glm-5": Geometry(
        "glm-5", hidden=6144, layers=78, dense_layers=3, intermediate=12288, expert_intermediate=2048, experts=256,
        heads=64, q_lora=2048, kv_lora=512, rope=64, nope=192, value=256, vocab=154880, indexer=(32, 128),
        next_token_layers=1,
    ),
    "kimi-k2": Geometry(
        "kimi-k2", hidden=7168, layers=61, dense_layers=1, intermediate=18432, expert_intermediate=2048, experts=384,
        heads=64, q_lora=1536, kv_lora=512, rope=64, nope=128, value=128, vocab=163840,
    ),
    "deepseek-v3": Geometry(
        "deepseek-v3", hidden=7168, layers=61, dense_layers=3, intermediate=18432, expert_intermediate=2048,
        experts=256, heads=128, q_lora=1536, kv_lora=512, rope=64, nope=128, value=128, vocab=129280,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of a checkpoint, without its layer's prefix; ``into``: the engine's parameter that it is a part of."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    into: str = ""

    def tensors(self, prefix: str) -> Iterator[Tensor]:
        """Itself, and its scales if it is quantised."""
        yield Tensor(prefix + self.name, self.dtype, self.shape)
        if self.dtype == FP8:
            yield Tensor(prefix + self.name + "_scale_inv", FP32, scale_shape(self.shape))


def scale_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Scales of a quantised matrix, on the grid that begins at its own first row and column."""
    return tuple(-(-extent // BLOCK) for extent in shape)


def layer_weights(g: Geometry, layer: int) -> list[Weight]:
    """All of a layer but its routed experts."""
    hidden = g.hidden
    found = [
        Weight("input_layernorm.weight", (hidden,), BF16),
        Weight("self_attn.q_a_proj.weight", (g.q_lora, hidden), FP8, "fused_qkv_a_proj"),
        Weight("self_attn.kv_a_proj_with_mqa.weight", (g.kv_lora + g.rope, hidden), FP8, "fused_qkv_a_proj"),
        Weight("self_attn.q_a_layernorm.weight", (g.q_lora,), BF16),
        Weight("self_attn.q_b_proj.weight", (g.heads * (g.nope + g.rope), g.q_lora), FP8),
        Weight("self_attn.kv_a_layernorm.weight", (g.kv_lora,), BF16),
        Weight("self_attn.kv_b_proj.weight", (g.heads * (g.nope + g.value), g.kv_lora), FP8),
        Weight("self_attn.o_proj.weight", (hidden, g.heads * g.value), FP8),
        Weight("post_attention_layernorm.weight", (hidden,), BF16),
    ]
    if g.indexer:
        heads, width = g.indexer
        found += [
            Weight("self_attn.indexer.wq_b.weight", (heads * width, g.q_lora), FP8),
            Weight("self_attn.indexer.wk.weight", (width, hidden), FP8),
            Weight("self_attn.indexer.k_norm.weight", (width,), FP32),
            Weight("self_attn.indexer.k_norm.bias", (width,), FP32),
            Weight("self_attn.indexer.weights_proj.weight", (heads, hidden), BF16),
        ]
    if layer < g.dense_layers:
        return found + _mlp("mlp.", hidden, g.intermediate)
    found += [
        Weight("mlp.gate.weight", (g.experts, hidden), BF16),
        Weight("mlp.gate.e_score_correction_bias", (g.experts,), FP32),
        *_mlp("mlp.shared_experts.", hidden, g.expert_intermediate),
    ]
    if layer >= g.layers:
        found += [
            Weight("enorm.weight", (hidden,), BF16),
            Weight("hnorm.weight", (hidden,), BF16),
            Weight("eh_proj.weight", (hidden, 2 * hidden), BF16),
            Weight("shared_head.norm.weight", (hidden,), BF16),
        ]
    return found


def expert_weights(g: Geometry) -> list[Weight]:
    """Of one routed expert."""
    return _mlp("", g.hidden, g.expert_intermediate)


def other_weights(g: Geometry) -> list[Weight]:
    """What is in no layer."""
    return [
        Weight("embed_tokens.weight", (g.vocab, g.hidden), BF16),
        Weight("norm.weight", (g.hidden,), BF16),
        Weight("lm_head.weight", (g.vocab, g.hidden), BF16),
    ]


def _mlp(prefix: str, hidden: int, width: int) -> list[Weight]:
    return [
        Weight(prefix + "gate_proj.weight", (width, hidden), FP8, prefix + "gate_up_proj"),
        Weight(prefix + "up_proj.weight", (width, hidden), FP8, prefix + "gate_up_proj"),
        Weight(prefix + "down_proj.weight", (hidden, width), FP8),
    ]
