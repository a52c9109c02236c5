"""The table of a trainer that gives none, or a configuration in any of its forms."""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from weightsync.agents.trainer.errors import ConversionTableError, UnknownArchitecture
from weightsync.agents.trainer.models import model_table
from weightsync.agents.trainer.models.dense import LlamaTable
from weightsync.agents.trainer.tables import table_of

CONFIG = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 8}


class Config:
    """As transformers' PretrainedConfig."""

    def __init__(self, **values: object) -> None:
        self.values = values

    def to_dict(self) -> dict[str, object]:
        return dict(self.values)


class LlamaForCausalLM(torch.nn.Module):
    config = Config(**CONFIG)


def test_of_the_model_itself_by_its_class_where_the_configuration_names_none() -> None:
    assert isinstance(table_of(LlamaForCausalLM(), None), LlamaTable)


def test_every_form_of_a_configuration_serves(tmp_path: Path) -> None:
    values = {**CONFIG, "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    forms = [values, OrderedDict(values), Config(**values), tmp_path, str(tmp_path), str(tmp_path / "config.json")]
    for form in forms:
        assert isinstance(model_table(form), LlamaTable)
        assert isinstance(table_of(dict, form), LlamaTable)
    table = model_table(values)
    assert table_of(dict, table) is table


def test_transformers_own_configurations_serve() -> None:
    transformers = pytest.importorskip("transformers")
    assert isinstance(model_table(transformers.LlamaConfig(architectures=["LlamaForCausalLM"])), LlamaTable)


def test_what_is_none_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnknownArchitecture, match=r"has no Hugging Face config: give table=model_table"):
        table_of(dict, None)
    (tmp_path / "config.json").write_text("no json")
    with pytest.raises(ConversionTableError, match=r"config\.json is no JSON"):
        model_table(tmp_path)
    with pytest.raises(ConversionTableError, match="int is no model configuration"):
        model_table(7)  # type: ignore[arg-type]
