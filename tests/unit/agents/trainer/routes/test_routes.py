"""From needs to slots: their bytes are those that ``save_pretrained`` writes; what has no source is said by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, MixtralConfig, Qwen2Config, Qwen3MoeConfig
from weightsync.agents.trainer.errors import UnroutableTensors
from weightsync.agents.trainer.routes.routes import NeededTable, TrainerModel, route_needs
from weightsync.agents.trainer.slots.conversion import ConversionSpec, Source
from weightsync.agents.trainer.slots.slots import ExpertParallel, SlotOptions, TrainerSlots
from weightsync.agents.trainer.state import current_state
from weightsync.kernels.fp8 import quantize_blocks
from weightsync.orchestrator.protocol.layout import Quantized, Tensor
from weightsync.orchestrator.protocol.messages import Needs

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 101,
    "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
MIXTRAL = MixtralConfig(num_key_value_heads=2, num_local_experts=12, **SMALL)
TIED = Qwen2Config(num_key_value_heads=2, tie_word_embeddings=True, **SMALL)
CONFIGS = {
    "qwen2 tied": TIED,
    "qwen2": Qwen2Config(num_key_value_heads=2, **SMALL),
    "gpt_neox": GPTNeoXConfig(**SMALL),
    "mixtral": MIXTRAL,
    "qwen3_moe": Qwen3MoeConfig(num_key_value_heads=2, num_experts=12, moe_intermediate_size=32, **SMALL),
}
ALONE = TrainerModel()


def needs_of(tensors: Mapping[str, torch.Tensor], quantized: bool = False) -> Needs:
    """An engine that loads these; with ``quantized`` as codes in blocks where they are projections."""
    found: list[Tensor] = []
    codes: list[Quantized] = []
    for name, value in tensors.items():
        dtype, shape = str(value.dtype).removeprefix("torch."), tuple(value.shape)
        if quantized and name.endswith(("proj.weight", "w1.weight", "w2.weight", "w3.weight")):
            codes.append(Quantized(len(found), len(found) + 1, (128, 128)))
            found.append(Tensor(name, "float8_e4m3fn", shape))
            grid = (-(-shape[0] // 128), -(-shape[1] // 128))
            found.append(Tensor(f"{name}_scale_inv", "float32", grid))
        else:
            found.append(Tensor(name, dtype, shape))
    return Needs(tensors=tuple(found), quantized=tuple(codes), fingerprint="f")


def in_slots(slots: TrainerSlots) -> dict[str, torch.Tensor]:
    """Every tensor that the slots hold whole."""
    found = {}
    for entry in slots.entries():
        assert entry.box.extent == entry.tensor.shape
        dtype = getattr(torch, entry.tensor.dtype)
        memory = slots.arenas[0].view(dtype)
        strides = [stride // dtype.itemsize for stride in entry.stride]
        assert entry.tensor.name not in found, "one tensor in two slots"
        found[entry.tensor.name] = memory.as_strided(entry.box.extent, strides, entry.offset // dtype.itemsize)
    return found


def saved(model: Any, directory: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(directory)
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_slots_hold_what_is_saved(name: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    state = current_state(model)
    written = {key: value.bfloat16() for key, value in saved(model, tmp_path).items()}
    slots = TrainerSlots(state, route_needs(needs_of(written), state, TrainerModel.of(model, None, partial=False)))
    slots.convert(state)
    held = in_slots(slots)
    assert held.keys() == written.keys()
    assert [key for key, value in held.items() if not torch.equal(value, written[key])] == []


@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
def test_slots_hold_the_codes_of_what_is_saved(name: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    state = current_state(model)
    written = {key: value.bfloat16() for key, value in saved(model, tmp_path).items()}
    needs = needs_of(written, quantized=True)
    slots = TrainerSlots(state, route_needs(needs, state, TrainerModel.of(model, None, partial=False)))
    slots.convert(state)
    held = in_slots(slots)
    assert held.keys() == {tensor.name for tensor in needs.tensors}
    for key, value in written.items():
        scales = held.get(f"{key}_scale_inv")
        if scales is None:
            assert torch.equal(held[key], value)
            continue
        codes, expected = torch.empty(value.shape, dtype=torch.float8_e4m3fn), torch.empty(scales.shape)
        quantize_blocks(value, codes, expected)
        assert torch.equal(held[key].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(scales, expected)


def test_a_stack_is_one_slot_and_not_one_per_expert() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MIXTRAL)
    state = current_state(model)
    names = [
        f"model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight"
        for expert in range(12)
        for part in ("w1", "w2")
    ]
    shapes = {"w1": (160, 64), "w2": (64, 160)}
    needed = {name: torch.empty(shapes[name.split(".")[-2]], dtype=torch.bfloat16, device="meta") for name in names}
    table = route_needs(needs_of(needed), state, TrainerModel.of(model, None, partial=False))
    assert table.layers == 1
    assert [(spec.dst, spec.sources, spec.experts, spec.layer) for spec in table.conversion_specs(0)] == [
        (
            f"model.layers.0.block_sparse_moe.experts.{{expert}}.{part}.weight",
            (Source(f"model.layers.0.mlp.experts.{key}", *cut),),
            12,
            0,
        )
        for part, key, cut in (("w1", "gate_up_proj", (0, 0, 160)), ("w2", "down_proj", ()))
    ]
    assert tuple(table.non_layer_specs()) == ()


def test_a_rank_of_expert_parallelism_stacks_its_own_experts_only() -> None:
    """Of 12 experts the second of three ranks holds 4 to 7, which its tensor knows as 0 to 3."""
    model = AutoModelForCausalLM.from_config(MixtralConfig(num_key_value_heads=2, num_local_experts=4, **SMALL))
    state = current_state(model)
    needed = {
        f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight": torch.empty(64, 160, dtype=torch.float32)
        for expert in range(12)
    }
    options = SlotOptions(expert_parallel=ExpertParallel(3, 1))
    table = route_needs(needs_of(needed), state, TrainerModel.of(model, None, partial=True))
    slots = TrainerSlots(state, table, options=options)
    slots.convert(state)
    stack = state["model.layers.1.mlp.experts.down_proj"]
    held = in_slots(slots)
    assert sorted(held) == [f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight" for expert in (4, 5, 6, 7)]
    for own, name in enumerate(sorted(held)):
        assert torch.equal(held[name], stack[own])
    with pytest.raises(UnroutableTensors, match=r"'model.layers.1.mlp.experts.down_proj' stacks 4 experts"):
        route_needs(needs_of(needed), state, TrainerModel.of(model, None, partial=False))


def test_a_tied_head_is_the_embeddings() -> None:
    with torch.device("meta"):
        state = dict(current_state(AutoModelForCausalLM.from_config(TIED)))
    del state["lm_head.weight"]
    needed = {"lm_head.weight": torch.empty(101, 64, device="meta")}
    (spec,) = route_needs(
        needs_of(needed), state, TrainerModel.of(lambda: state, TIED, partial=False)
    ).non_layer_specs()
    assert (spec.dst, spec.sources) == ("lm_head.weight", (Source("model.embed_tokens.weight"),))
    why = r"'lm_head.weight' \(if the head is tied to 'model.embed_tokens.weight', give the model itself, or config="
    with pytest.raises(UnroutableTensors, match=why):
        route_needs(needs_of(needed), state, ALONE)
    with pytest.raises(UnroutableTensors, match=why):
        route_needs(needs_of(needed), state, TrainerModel.of(lambda: state, CONFIGS["qwen2"], partial=False))


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("wrap.a.up.weight", "there is 'wrap.a.up.weight': take the prefix 'wrap.' out of the names"),
        ("up.weight", "there is 'up.weight': the names lack the prefix 'a.'"),
        ("b.up.weight", "the nearest is 'b.up.weight'"),
        ("other", "nothing has a name like it"),
    ],
)  # fmt: skip
def test_a_tensor_without_a_source_is_named_with_the_nearest(key: str, why: str) -> None:
    needed = needs_of({"a.up.weight": torch.empty(2, 2)})
    with pytest.raises(UnroutableTensors) as caught:
        route_needs(needed, {key: torch.empty(2, 2)}, ALONE)
    assert f"'a.up.weight' ({why}" in str(caught.value)
    assert "register_table" in str(caught.value)
    assert tuple(route_needs(needed, {key: torch.empty(2, 2)}, TrainerModel(partial=True)).non_layer_specs()) == ()


def test_an_error_names_five_and_counts_the_others() -> None:
    needed = needs_of({f"w{n}": torch.empty(1) for n in range(13)})
    with pytest.raises(UnroutableTensors, match=r"^13 tensors .*'w4' .*; and 8 more\. If"):
        route_needs(needed, {}, ALONE)


@pytest.mark.parametrize(
    ("here", "wanted", "hint"),
    [
        ((4, 2), (3, 2), "a padded vocabulary?"),
        ((0,), (3, 2), "DeepSpeed ZeRO-3?"),
        ((3,), (3, 2), "a flat shard of FSDP1"),
        ((2, 3), (3, 2), "transposed?"),
        ((3, 5), (3, 2), ""),
    ],
)
def test_another_shape_is_refused_with_both(here: tuple[int, ...], wanted: tuple[int, ...], hint: str) -> None:
    with pytest.raises(UnroutableTensors) as caught:
        route_needs(needs_of({"w": torch.empty(wanted)}), {"w": torch.empty(here)}, ALONE)
    assert f"'w' is {here} here, engines need 'w' {wanted}" in str(caught.value)
    assert hint in str(caught.value)


def test_the_mapping_goes_before_the_name_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint may have the name of another of the model's tensors: norm0 is saved as norm1, norm1 as norm2."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(TIED)
    monkeypatch.setattr(
        "transformers.core_model_loading.revert_weight_conversion",
        lambda model, state: {"norm1": state["norm0"], "norm2": state["norm1"]},
    )
    state = {"norm0": torch.empty(2), "norm1": torch.empty(2)}
    table = route_needs(needs_of({"norm1": torch.empty(2), "norm2": torch.empty(2)}), state, TrainerModel(model))
    assert [(spec.dst, spec.sources[0].key) for spec in table.non_layer_specs()] == [
        ("norm1", "norm0"),
        ("norm2", "norm1"),
    ]


def test_a_table_of_routes_is_made_for_its_keys() -> None:
    specs = [ConversionSpec(dst, (Source(dst),), layer=layer) for dst, layer in (("a", None), ("b.2.c", 2))]
    table = NeededTable(specs)
    assert table.for_keys(["x"]) is table
    assert (table.layers, table.conversion_specs(0), table.conversion_specs(2)) == (3, (), (specs[1],))
