"""What transformers would save, and from where: judged by what ``save_pretrained`` writes of the same model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPTNeoXConfig,
    GraniteMoeConfig,
    MiniMaxM2Config,
    MixtralConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)
from weightsync.agents.trainer.errors import UnroutableTensors
from weightsync.agents.trainer.routes import mapping
from weightsync.agents.trainer.routes.mapping import Origin, Saved, saved_as, skeleton_of
from weightsync.agents.trainer.slots.conversion import Source
from weightsync.agents.trainer.state import current_state

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 101,
    "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "qwen2": Qwen2Config(num_key_value_heads=2, **SMALL),
    "gpt_neox": GPTNeoXConfig(**SMALL),
    "mixtral": MixtralConfig(num_key_value_heads=2, num_local_experts=4, **SMALL),
    "qwen3_moe": Qwen3MoeConfig(num_key_value_heads=2, num_experts=4, moe_intermediate_size=32, **SMALL),
    "granitemoe": GraniteMoeConfig(num_key_value_heads=2, num_local_experts=4, **SMALL),
    "minimax_m2": MiniMaxM2Config(num_key_value_heads=2, num_local_experts=4, head_dim=16, **SMALL),
    "deepseek_v3": DeepseekV3Config(
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=32,
        kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, moe_intermediate_size=32, **SMALL,
    ),
}  # fmt: skip


def made(origin: Origin, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tensor that ``origin`` says, made by plain indexing."""
    parts = []
    for source in origin.sources:
        value = state[source.key] if origin.expert is None else state[source.key][origin.expert]
        parts.append(value if source.length is None else value.narrow(source.dim, source.start, source.length))
    return torch.cat(parts, origin.cat_dim)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_saved_tensor_is_made_as_it_was_saved(name: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    model.save_pretrained(tmp_path)
    written = {k: v for file in tmp_path.glob("*.safetensors") for k, v in load_file(file).items()}
    state = {key: value.detach() for key, value in current_state(model).items()}
    saved = saved_as(model, state)
    assert saved.too_much == {}
    assert written.keys() <= saved.origins.keys()
    assert {
        key: torch.equal(made(saved.origins[key], state), value) for key, value in written.items()
    } == dict.fromkeys(written, True)


def test_names_of_experts_and_halves_of_gate_and_up() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["mixtral"])
    origins = saved_as(model, current_state(model)).origins
    stack = "model.layers.1.mlp.experts.gate_up_proj"
    assert origins["model.layers.1.block_sparse_moe.experts.3.w1.weight"] == Origin((Source(stack, 0, 0, 96),), 0, 3)
    assert origins["model.layers.1.block_sparse_moe.experts.3.w3.weight"] == Origin((Source(stack, 0, 96, 96),), 0, 3)


def test_wrappers_are_looked_through_and_other_models_are_left_alone() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["gpt_neox"])
    wrapped = nn.Module()
    wrapped.module = model
    state = current_state(model)
    assert saved_as(wrapped, state).origins["embed_out.weight"] == Origin((Source("lm_head.weight"),))
    assert saved_as(skeleton_of(CONFIGS["gpt_neox"]), state) == saved_as(model, state)
    assert saved_as(nn.Linear(2, 2), {"weight": torch.empty(2, 2)}) == Saved()
    assert saved_as(None, state) == Saved()
    assert saved_as(wrapped, {**state, "x._extra_state": b"no tensor"}) == saved_as(model, state)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.transpose(0, 1).contiguous(), "turned round or interleaved"),
        (lambda t: t * 2, "computed"),
        (lambda t: t.reshape(2, -1, t.shape[1]).transpose(0, 1).reshape(t.shape), "turned round or interleaved"),
    ],
    ids=["transposed", "computed", "interleaved"],
)
def test_what_has_no_route_is_said_by_name(change: Any, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["qwen2"])
    key = "model.layers.0.mlp.up_proj.weight"
    monkeypatch.setattr(
        "transformers.core_model_loading.revert_weight_conversion",
        lambda model, state: {name: change(t) if name == key else t for name, t in state.items()},
    )
    saved = saved_as(model, current_state(model))
    assert key not in saved.origins
    assert why in saved.too_much[key]


def test_joined_tensors_have_all_their_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["qwen2"])
    up, gate = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate"))
    monkeypatch.setattr(
        "transformers.core_model_loading.revert_weight_conversion",
        lambda model, state: {"fused": torch.cat([state[gate], state[up]])},
    )
    assert saved_as(model, current_state(model)).origins == {"fused": Origin((Source(gate), Source(up)), 0)}


def test_a_mapping_that_fails_is_no_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: Any, state: Any) -> Any:
        raise KeyError("experts")

    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", fails)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["qwen2"])
    with pytest.raises(UnroutableTensors, match=r"Qwen2ForCausalLM fails .*KeyError: 'experts'.*pass a table"):
        mapping.saved_as(model, current_state(model))
