"""Typed access to a configuration, and the treatment that a table's helpers give each tensor."""

import json
from pathlib import Path

import pytest
import torch
from weightsync.agents.trainer.errors import ConversionTableError
from weightsync.agents.trainer.models import model_table
from weightsync.agents.trainer.models.dense import LlamaTable
from weightsync.agents.trainer.models.forms import STACKED, TRANSFORMERS
from weightsync.agents.trainer.models.table import ModelConfig, ModelTable
from weightsync.agents.trainer.slots.conversion import Source

BF16 = torch.bfloat16


def table(form=None, **config):
    return ModelTable(ModelConfig(config), form=form)


def fp8(*kept, **changes):
    block = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": list(kept)}
    return table(quantization_config=block | changes)


def test_a_configuration_is_read_by_type(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"layers": 3, "old": None, "name": "x", "pattern": "FS"}))
    for path in (tmp_path, tmp_path / "config.json"):
        config = ModelConfig.of(path)
        assert config.integer("layers") == 3
    assert config.integer("old", 7) == 7
    assert config.first_integer("new", "layers") == 3
    assert (config.flag("old", True), config.flag("layers")) == (True, True)
    assert (config.text("name"), config.text("old", "none")) == ("x", "none")
    assert config.sequence("pattern") == ("F", "S")
    assert config.part("rope").integer("theta", 1) == 1
    for missing in ("old", "name"):
        with pytest.raises(ConversionTableError, match=f"no integer '{missing}'"):
            config.integer(missing)


@pytest.mark.parametrize(
    ("kept", "name", "quantised"),
    [
        ((), "self_attn.o_proj.weight", True),
        (("model.layers.2.self_attn.o_proj",), "self_attn.o_proj.weight", False),
        (("model.layers.2.self_attn",), "self_attn.o_proj.weight", False),
        (("o_proj",), "self_attn.o_proj.weight", False),
        (("proj",), "self_attn.o_proj.weight", True),
        (("model.layers.22",), "self_attn.o_proj.weight", True),
    ],
)
def test_what_the_configuration_keeps_is_not_quantised(kept, name, quantised):
    assert fp8(*kept).linear(2, name).quantization.quantizes is quantised


def test_treatments_of_single_tensors():
    plain = table().plain(1, "input_layernorm.weight")
    assert (plain.dst, plain.layer) == ("model.layers.1.input_layernorm.weight", 1)
    assert plain.quantization.dtype == BF16
    widened, kept = table().widened(1, "x").quantization, table().float32(1, "x").quantization
    assert (widened.dtype, widened.gather_dtype) == (torch.float32, BF16)
    assert (kept.dtype, kept.gather_dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"quant_method": "awq"}, "'awq' has no conversion"), ({"weight_block_size": [64, 64]}, r"\(64, 64\) is not 128")],
)
def test_quantisations_that_no_block_expresses_are_refused(changes, message):
    with pytest.raises(ConversionTableError, match=message):
        fp8(**changes)


def test_experts_come_one_by_one_or_from_their_stack():
    single = list(table().experts(0, 2, 8))
    assert [(s.dst, s.expert_id) for s in single][:2] == [
        (f"model.layers.0.mlp.experts.{expert}.gate_proj.weight", expert) for expert in range(2)
    ]
    assert len(single) == 6
    gate, up, down = table(TRANSFORMERS).experts(0, 2, 8)
    assert gate.sources == (Source("model.layers.0.mlp.experts.gate_up_proj", 0, 0, 8),)
    assert up.sources == (Source("model.layers.0.mlp.experts.gate_up_proj", 0, 8, 8),)
    assert down.sources == (Source("model.layers.0.mlp.experts.down_proj"),)
    assert (gate.dst, gate.experts) == ("model.layers.0.mlp.experts.{expert}.gate_proj.weight", 2)


def test_a_fused_tensor_is_cut_where_the_table_gives_its_rows():
    name = "self_attn.q_a_proj.weight"
    fused = Source("model.layers.0.self_attn.fused_qkv_a_proj.weight", 0, 0, 24)
    assert table(STACKED).linear(0, name, (0, 24)).sources == (fused,)
    assert table(STACKED).linear(0, name).sources == (Source(f"model.layers.0.{name}"),)


def test_a_tied_head_is_not_a_tensor_of_its_own():
    names = [spec.dst for spec in table(tie_word_embeddings=True).non_layer_specs()]
    assert names == ["model.embed_tokens.weight", "model.norm.weight"]
    assert [spec.dst for spec in table().non_layer_specs()] == [*names, "lm_head.weight"]


class Config:
    """As transformers' PretrainedConfig."""

    def to_dict(self) -> dict[str, object]:
        return dict(LLAMA)


LLAMA = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}


def test_every_form_of_a_configuration_serves(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    forms = [LLAMA, Config(), tmp_path, str(tmp_path), str(tmp_path / "config.json")]
    assert [ModelConfig.of(form).values for form in forms] == [LLAMA] * 5
    assert [type(model_table(form)) for form in forms] == [LlamaTable] * 5


def test_what_is_no_configuration_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("no json")
    with pytest.raises(ConversionTableError, match=r"config\.json is no JSON"):
        model_table(tmp_path)
    with pytest.raises(ConversionTableError, match="int is no model configuration"):
        model_table(7)  # type: ignore[arg-type]
