"""Real peft models, given as they are: what is published is what peft itself would merge, bit for bit."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from weightsync.agents.trainer.errors import AdapterError, MissingTensor, UnreadTensors
from weightsync.agents.trainer.models import model_table
from weightsync.agents.trainer.slots import SlotOptions, TrainerSlots
from weightsync.agents.trainer.sources.lora import LoraMerge
from weightsync.agents.trainer.state import TrainerSource

from tests.unit.agents.trainer.sources.test_modules import in_two_processes
from tests.unit.agents.trainer.test_gloo import CONFIG, Causal

PROJECTIONS = ["q_proj", "v_proj", "up_proj", "down_proj"]
OPTIONS = SlotOptions(8192, staging_bytes=0)


def adapted(model, **given):
    """With adapters that do something: peft begins with B = 0."""
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS, **given})
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return wrapped


def published(source, assemble):
    slots = TrainerSlots(source.state(), model_table(CONFIG, fp8=False), options=OPTIONS)
    source.account_for(source.state(), slots.read)
    slots.convert(source.state())
    return assemble([slots])


def by_peft(model):
    merged = copy.deepcopy(model).merge_and_unload()
    return {name: tensor.to(torch.bfloat16) for name, tensor in merged.state_dict().items()}


KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ranks and scales of their own": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"up_proj": 3}},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "saved modules": {"modules_to_save": ["lm_head", "norm"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_would_merge_is_published(assemble, kind):
    model = adapted(Causal(), **KINDS[kind])
    if kind == "saved modules":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter.add_(1.0)
    for source in (TrainerSource(model), TrainerSource(torch.compile(nn.DataParallel(model), backend="eager"))):
        held, expected = published(source, assemble), by_peft(model)
        assert held.keys() == expected.keys()
        assert all(torch.equal(held[name], expected[name]) for name in expected)


def test_every_publish_merges_anew(assemble):
    model = adapted(Causal())
    source = TrainerSource(model)
    first = published(source, assemble)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    tokens = torch.arange(64).view(2, 32) % 67
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    optimizer.step()
    second, expected = published(source, assemble), by_peft(model)
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed == {name for name in first if name.split(".")[-2] in PROJECTIONS}
    assert all(torch.equal(second[name], expected[name]) for name in expected)


def test_several_active_adapters_and_merged_ones(assemble):
    model = adapted(Causal())
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    only_one = published(TrainerSource(model), assemble)
    assert all(torch.equal(only_one[name], tensor) for name, tensor in by_peft(model).items())
    model.base_model.set_adapter(["default", "other"])
    both, expected = published(TrainerSource(model), assemble), by_peft(model)
    assert all(torch.equal(both[name], expected[name]) for name in expected)
    assert not torch.equal(both["model.layers.0.self_attn.q_proj.weight"], only_one[
        "model.layers.0.self_attn.q_proj.weight"
    ])  # fmt: skip
    model.merge_adapter()
    merged = published(TrainerSource(model), assemble)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_a_bfloat16_base_is_rounded_once(assemble):
    model = adapted(Causal().to(torch.bfloat16))
    held = published(TrainerSource(model), assemble)
    expected = by_peft(copy.deepcopy(model).float())
    assert all(torch.equal(held[name], expected[name]) for name in expected)


REFUSED = {
    "DoRA": (peft.LoraConfig(target_modules=["q_proj"], use_dora=True), AdapterError, "is no plain LoRA"),
    "IA3": (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), AdapterError, "is no plain LoRA"),
    "a bias": (peft.LoraConfig(target_modules=["q_proj"], lora_bias=True), (AdapterError, UnreadTensors), "q_proj"),
    "AdaLoRA": (peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10), AdapterError, "is no plain LoRA"),
    "LoHa": (peft.LoHaConfig(target_modules=["q_proj"]), AdapterError, "is no plain LoRA"),
    "tokens": (
        peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]}),
        (AdapterError, MissingTensor),
        "embed_tokens",
    ),
    "parameters": (
        peft.LoraConfig(target_modules=[], target_parameters=["q_proj.weight"]),
        (AdapterError, MissingTensor),
        "q_proj",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_sum_of_matrices_is_refused_by_name(assemble, kind):
    config, errors, words = REFUSED[kind]
    model = Causal()
    if kind == "a bias":
        model.model.layers[0].self_attn.q_proj = nn.Linear(128, 128)
    with pytest.raises(errors, match=words):
        published(TrainerSource(peft.get_peft_model(model, config)), assemble)


def test_a_saved_module_of_another_adapter_is_out_of_use(assemble):
    model = adapted(Causal(), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.set_adapter("other")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter.normal_(std=0.1)
    held = published(TrainerSource(model), assemble)
    expected = by_peft(model)
    assert all(torch.equal(held[name], expected[name]) for name in expected)
    model.set_adapter("default")
    again = published(TrainerSource(model), assemble)
    assert all(torch.equal(again[name], tensor) for name, tensor in by_peft(model).items())
    assert not torch.equal(again["lm_head.weight"], held["lm_head.weight"])


def test_adapters_that_are_switched_off_are_not_published_in_silence():
    model = adapted(Causal())
    source = TrainerSource(model)
    with model.disable_adapter(), pytest.raises(AdapterError, match=r"q_proj': its adapters are switched off"):
        source.state()
    source.state()


def test_a_mapping_of_a_peft_model_needs_a_rule(assemble):
    model = adapted(Causal())
    with pytest.raises(MissingTensor, match="give the peft model itself, or lora=LoraMerge"):
        published(TrainerSource(model.state_dict()), assemble)
    held = published(TrainerSource(model.state_dict, lora=(LoraMerge(alpha=6),)), assemble)
    assert all(torch.equal(held[name], tensor) for name, tensor in by_peft(model).items())


def publish_sharded(rank):
    model = adapted(Causal())
    expected = by_peft(model)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with torch.no_grad():
        model(torch.arange(64).view(2, 32) % 67)
    source = TrainerSource(model)
    state = source.state()
    assert all(isinstance(tensor, DTensor) for tensor in state.values())
    slots = TrainerSlots(state, model_table(CONFIG, fp8=False), options=OPTIONS)
    source.account_for(state, slots.read)
    slots.convert(source.state())
    for entry in slots.entries():
        stride = [step // 2 for step in entry.stride]
        memory = slots.arenas[0].view(torch.bfloat16)
        held = torch.as_strided(memory, entry.box.extent, stride, entry.offset // 2)
        wanted = expected[entry.tensor.name][entry.box.slices]
        assert (held != wanted).float().mean() < 1e-3, entry.tensor.name
        assert torch.allclose(held.float(), wanted.float(), rtol=2**-7, atol=1e-6), entry.tensor.name


@pytest.mark.e2e
def test_sharded_bases_and_adapters_are_merged_on_each_rank():
    in_two_processes(publish_sharded)
