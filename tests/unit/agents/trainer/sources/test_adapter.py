"""An adapter alone, from real peft models: names and values are those of ``save_pretrained``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from weightsync.agents.trainer.errors import AdapterError, UnreadTensors, UnroutableTensors
from weightsync.agents.trainer.routes.routes import TrainerModel, route_needs
from weightsync.agents.trainer.slots.slots import SlotOptions, TrainerSlots
from weightsync.agents.trainer.sources.adapter import AdapterSource
from weightsync.orchestrator.protocol.layout import Tensor
from weightsync.orchestrator.protocol.messages import Needs
from weightsync.orchestrator.protocol.names import SCALING

peft = pytest.importorskip("peft")

SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 32,
}  # fmt: skip


def adapted(**settings: Any) -> Any:
    given = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj", "embed_tokens"], **settings}
    return peft.get_peft_model(LlamaForCausalLM(LlamaConfig(**SMALL)), peft.LoraConfig(**given))


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel], ids=["bare", "wrapped"])
def test_names_and_values_are_those_of_its_files(wrap: Any, tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    state = AdapterSource(wrap(model), "default").state()
    saved = load_file(tmp_path / "adapter_model.safetensors")
    factors = {name: tensor for name, tensor in state.items() if name != SCALING}
    assert factors.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in factors.items())
    assert state[SCALING].tolist() == [6.0, 0.0]
    assert state[SCALING].dtype == torch.float64


def test_the_scaling_is_read_anew() -> None:
    model = adapted(use_rslora=True)
    source = AdapterSource(model, "default")
    model.peft_config["default"].lora_alpha = 7.5
    assert source.values()[SCALING].tolist() == [7.5, 1.0]


def test_one_of_several_adapters() -> None:
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    state = AdapterSource(model, "other").state()
    assert {name.split(".layers.")[-1] for name in state if name != SCALING} == {
        f"{layer}.self_attn.v_proj.lora_{side}.weight" for layer in (0, 1) for side in "AB"
    }


def test_all_that_is_trained_must_be_read() -> None:
    model = adapted()
    source = AdapterSource(model, "default")
    state = source.state()
    source.account_for(state, state)
    with pytest.raises(UnreadTensors, match=r"layers\.0\.mlp\.down_proj\.lora_A"):
        source.account_for(state, [name for name in state if "layers.0.mlp" not in name])
    model.base_model.model.lm_head.weight.requires_grad_(requires_grad=True)
    with pytest.raises(UnreadTensors, match=r"lm_head\.weight"):
        source.account_for(state, state)
    AdapterSource(model, "default", ignore=("lm_head.*",)).account_for(state, state)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True, "target_modules": ["q_proj"]}, "use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern is"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern is"),
        ({"init_lora_weights": "pissa", "target_modules": ["q_proj"]}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "olora", "target_modules": ["q_proj"]}, "init_lora_weights is 'olora'"),
        (
            {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]},
            "alora_invocation_tokens is",
        ),
        ({"trainable_token_indices": [1, 2], "target_modules": ["q_proj"]}, "trainable_token_indices is"),
        ({"target_parameters": ["q_proj.weight"], "target_modules": []}, "target_parameters is"),
    ],
)
def test_what_an_adapter_alone_does_not_carry_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        AdapterSource(adapted(**settings), "default")


@pytest.mark.parametrize("field", ["init_lora_weights", "made_up_config"])
def test_settings_of_later_versions_are_refused_until_they_are_known(field: str) -> None:
    model = adapted(target_modules=["q_proj"])
    source = AdapterSource(model, "default")
    setattr(model.peft_config["default"], field, "lora_ga")  # which subtracts its first product from the base
    with pytest.raises(AdapterError, match=f"{field} is 'lora_ga'"):
        source.state()


@pytest.mark.parametrize("begin", ["gaussian", "orthogonal", "mica"])
def test_an_adapter_that_begins_beside_its_base_is_published(begin: str) -> None:
    plain, model = LlamaForCausalLM(LlamaConfig(**SMALL)), LlamaForCausalLM(LlamaConfig(**SMALL))
    model.load_state_dict(plain.state_dict())
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=begin)
    wrapped = peft.get_peft_model(model, config)
    AdapterSource(wrapped, "default").state()
    kept = {name.replace("base_layer.", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(kept[name], tensor) for name, tensor in plain.state_dict().items())


def test_sources_without_such_an_adapter_are_refused() -> None:
    with pytest.raises(AdapterError, match="no such adapter, only default"):
        AdapterSource(adapted(), "policy")
    with pytest.raises(AdapterError, match="LlamaForCausalLM is no peft model"):
        AdapterSource(LlamaForCausalLM(LlamaConfig(**SMALL)), "policy")
    with pytest.raises(AdapterError, match="the source is a dict"):
        AdapterSource({}, "policy")
    other = peft.get_peft_model(
        LlamaForCausalLM(LlamaConfig(**SMALL)), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    )
    with pytest.raises(AdapterError, match="peft_type is IA3"):
        AdapterSource(other, "default")


def needs_of(state: Mapping[str, torch.Tensor], rank: int) -> Needs:
    """Of an engine whose adapter has ``rank``, which is the first extent of A and the last of B."""
    shapes = {
        name: tuple(tensor.shape) if name == SCALING else tuple(rank if n == 4 else n for n in tensor.shape)
        for name, tensor in state.items()
    }
    tensors = tuple(Tensor(n, "float64" if n == SCALING else "bfloat16", shape) for n, shape in shapes.items())
    return Needs(tensors=tensors, quantized=(), fingerprint="f")


def test_engines_get_it_in_their_dtype_and_an_adapter_of_another_rank_is_refused_by_name() -> None:
    state = AdapterSource(adapted(), "default").state()
    table = route_needs(needs_of(state, 4), state, TrainerModel(), forward_dtype=None)
    slots = TrainerSlots(state, table, options=SlotOptions(8192, staging_bytes=0))
    slots.convert(state)
    assert set(slots.read) == state.keys()
    assert sum(tensor.dtype == "bfloat16" for tensor in slots.layout.tensors) == len(state) - 1
    with pytest.raises(UnroutableTensors, match=r"lora_A.* is \(4, 16\) here, engines need .* \(8, 16\)"):
        route_needs(needs_of(state, 8), state, TrainerModel(), forward_dtype=None)
