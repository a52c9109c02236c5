"""The tables against Hugging Face's own models: what they save is what the slots hold, byte for byte."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from weightsync.agents.trainer.errors import ConversionTableError, MissingTensor, UnknownArchitecture
from weightsync.agents.trainer.models import CHECKPOINT, STACKED, model_table
from weightsync.agents.trainer.slots import TrainerSlots
from weightsync.agents.trainer.state import current_state

DENSE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
MLA = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MODELS = {
    "LlamaForCausalLM": DENSE | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "Qwen3ForCausalLM": DENSE | {"tie_word_embeddings": True},
    "Qwen3MoeForCausalLM": DENSE | MOE | {"num_experts": 4, "mlp_only_layers": [1]},
    "Glm4MoeForCausalLM": DENSE | MOE | {"n_routed_experts": 4, "first_k_dense_replace": 1, "use_qk_norm": True},
    "DeepseekV3ForCausalLM": DENSE | MOE | MLA | {"n_routed_experts": 4, "first_k_dense_replace": 1},
    "GlmMoeDsaForCausalLM": DENSE | MOE | MLA
    | {"n_routed_experts": 4, "first_k_dense_replace": 1, "index_topk_freq": 2, "index_n_heads": 2}
    | {"index_head_dim": 16, "index_topk": 4},
}  # fmt: skip
DECLARED_FLOAT32 = ("e_score_correction_bias", "indexer.k_norm.weight", "indexer.k_norm.bias")
WIDENED = {"Glm4MoeForCausalLM": "mlp.gate.weight"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """architecture → (configuration, model with random masters, tensors of its saved checkpoint)."""
    import transformers

    made = {}

    def model(architecture):
        if architecture not in made:
            torch.manual_seed(0)
            kind = getattr(transformers, architecture)
            network = kind(kind.config_class(**MODELS[architecture], architectures=[architecture]))
            for tensor in [*network.parameters(), *network.buffers()]:
                if tensor.is_floating_point():
                    tensor.data = torch.randn(tensor.shape)
            folder = tmp_path_factory.mktemp(architecture)
            network.save_pretrained(folder)
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            made[architecture] = json.loads((folder / "config.json").read_text()), network, tensors
        return made[architecture]

    return model


def wire_dtype(architecture, name):
    wide = name.endswith(DECLARED_FLOAT32) or name.endswith(WIDENED.get(architecture, "\0"))
    return torch.float32 if wide else torch.bfloat16


@pytest.mark.parametrize("architecture", MODELS)
def test_slots_hold_what_the_model_saves(saved, assemble, architecture):
    config, network, checkpoint = saved(architecture)
    state = current_state(network)
    slots = TrainerSlots(state, model_table(config))
    slots.convert(state)
    logical = assemble([slots])
    assert set(logical) == set(checkpoint) - {"lm_head.weight"} | {n for n in logical if n == "lm_head.weight"}
    assert ("lm_head.weight" in logical) == (not config.get("tie_word_embeddings"))
    for name, tensor in logical.items():
        master = checkpoint[name]
        expected = master if name.endswith(DECLARED_FLOAT32) else master.to(torch.bfloat16)
        assert tensor.dtype == wire_dtype(architecture, name), name
        assert torch.equal(tensor, expected.to(tensor.dtype)), name
    unsent = [name for name in slots.unrouted if "rotary_emb" not in name and name != "lm_head.weight"]
    assert not unsent, "every parameter and buffer but rotary tables is sent"


@pytest.mark.parametrize("architecture", MODELS)
def test_a_trainer_with_checkpoint_names_gives_the_same_bytes(saved, assemble, architecture):
    config, network, checkpoint = saved(architecture)
    one, other = (TrainerSlots(s, model_table(config)) for s in (current_state(network), checkpoint))
    one.convert(current_state(network))
    other.convert(checkpoint)
    left, right = assemble([one]), assemble([other])
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "GlmMoeDsaForCausalLM"])
def test_a_trainer_that_stacks_experts_under_its_own_names(saved, assemble, architecture):
    config, _, checkpoint = saved(architecture)
    state = stacked(checkpoint)
    slots = TrainerSlots(state, model_table(config))
    slots.convert(state)
    logical = assemble([slots])
    for name in logical:
        assert torch.equal(logical[name], checkpoint[name].to(torch.bfloat16).to(logical[name].dtype)) or (
            name.endswith(DECLARED_FLOAT32) and torch.equal(logical[name], checkpoint[name])
        ), name
    assert set(logical) >= {name for name in checkpoint if "experts" in name}
    assert not slots.unrouted


def test_forms_may_be_mixed(saved, assemble):
    config, _, checkpoint = saved("DeepseekV3ForCausalLM")
    other = stacked(checkpoint)
    grouped = {n: t for n, t in other.items() if n.split(".")[-1] in ("w1", "w2", "w3")}
    state = {n: t for n, t in checkpoint.items() if ".experts." not in n} | grouped
    form = model_table(config).for_keys(state).form
    assert (form.stacks, form.renames, form.fused) == (STACKED.stacks, {}, {})
    slots = TrainerSlots(state, model_table(config))
    slots.convert(state)
    assert assemble([slots]).keys() == checkpoint.keys()


def stacked(checkpoint):
    """The state of a trainer with grouped experts w1, w2, w3, a fused MLA down-projection and its own names."""
    state = dict(checkpoint)
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        for w, projection in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            names = [f"{prefix}mlp.experts.{e}.{projection}.weight" for e in range(4)]
            if names[0] in state:
                state[f"{prefix}mlp.experts.{w}"] = torch.stack([state.pop(name) for name in names])
            shared = f"{prefix}mlp.shared_experts.{projection}.weight"
            if shared in state:
                state[f"{prefix}mlp.shared_expert.{w}.weight"] = state.pop(shared)
        for ours, theirs in (
            ("mlp.gate.weight", "mlp.router.gate.weight"),
            ("mlp.gate.e_score_correction_bias", "mlp.expert_bias"),
        ):
            if prefix + ours in state:
                state[prefix + theirs] = state.pop(prefix + ours)
        down = [f"{prefix}self_attn.{name}.weight" for name in ("q_a_proj", "kv_a_proj_with_mqa")]
        if down[0] in state:
            state[f"{prefix}self_attn.fused_qkv_a_proj.weight"] = torch.cat([state.pop(name) for name in down])
    return state


def test_fp8_models_quantise_what_their_configuration_does_not_exclude():
    config = MODELS["GlmMoeDsaForCausalLM"] | {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "quantization_config": {
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "model.layers.1.self_attn.o_proj", "mlp.gate"],
        },
    }
    table = model_table(config)
    specs = [
        *table.non_layer_specs(),
        *(spec for layer in range(table.layers) for spec in table.conversion_specs(layer)),
    ]
    quantised = {s.dst for s in specs if s.quantization.quantizes}
    assert {n.split(".", 3)[3] for n in quantised if n.startswith("model.layers.0.")} == {
        "self_attn.q_a_proj.weight",
        "self_attn.q_b_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight",
        "self_attn.kv_b_proj.weight",
        "self_attn.o_proj.weight",
        "self_attn.indexer.wq_b.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    }
    assert "model.layers.1.self_attn.o_proj.weight" not in quantised
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in quantised
    assert not [n for n in quantised if "norm" in n or "mlp.gate.weight" in n or "embed" in n or "lm_head" in n]


def test_only_layers_with_their_own_indexer_have_one():
    config = {**MODELS["GlmMoeDsaForCausalLM"], "architectures": ["GlmMoeDsaForCausalLM"], "num_hidden_layers": 6}

    def indexed(**changes):
        table = model_table(config | changes)
        return [i for i in range(6) if any("indexer" in s.dst for s in table.conversion_specs(i))]

    assert indexed(index_topk_freq=1) == [0, 1, 2, 3, 4, 5]
    assert indexed(index_topk_freq=2) == [0, 1, 3, 5]
    assert indexed(index_topk_pattern="FSFSSF") == [0, 2, 5]
    assert indexed(indexer_types=["full", "shared"] * 3) == [0, 2, 4]


def test_unknown_architectures_and_quantisations_are_refused_by_name():
    with pytest.raises(UnknownArchitecture, match="MambaForCausalLM"):
        model_table({"architectures": ["MambaForCausalLM"]})
    with pytest.raises(ConversionTableError, match="awq"):
        model_table({"architectures": ["Qwen3ForCausalLM"], "quantization_config": {"quant_method": "awq"}})
    with pytest.raises(ConversionTableError, match="num_hidden_layers"):
        _ = model_table({"architectures": ["Qwen3ForCausalLM"]}).layers


def test_the_explicit_form_is_not_second_guessed(saved):
    config, network, _ = saved("Qwen3MoeForCausalLM")
    with pytest.raises(MissingTensor, match=r"experts\.0\.gate_proj"):
        TrainerSlots(current_state(network), model_table(config, form=CHECKPOINT))


def test_a_new_architecture_is_a_table_of_under_forty_lines(assemble):
    """The example of docs/adding-a-model.md runs as it stands there: OLMo 2, which no shipped table knows."""
    import transformers

    page = (Path(__file__).parents[5] / "docs" / "adding-a-model.md").read_text()
    example = page.split("```python\n", 1)[1].split("```", 1)[0]
    assert len(example.splitlines()) < 40
    with pytest.raises(UnknownArchitecture):
        model_table({"architectures": ["Olmo2ForCausalLM"]})
    exec(compile(example, "docs/adding-a-model.md", "exec"), {})
    sizes = {name: size for name, size in DENSE.items() if name != "head_dim"}
    network = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**sizes))
    state = current_state(network)
    slots = TrainerSlots(state, model_table({**network.config.to_dict(), "architectures": ["Olmo2ForCausalLM"]}))
    slots.convert(state)
    logical = assemble([slots])
    assert logical.keys() == network.state_dict().keys()
    assert all(torch.equal(logical[n], t.to(torch.bfloat16)) for n, t in network.state_dict().items())
