"""Conversion tables by architecture. A new model is a new table: see docs/adding-a-model.md."""

from typing import Final, TypeVar

import torch
from weightsync.agents.trainer.errors import UnknownArchitecture
from weightsync.agents.trainer.models.dense import LlamaTable, Qwen3Table
from weightsync.agents.trainer.models.forms import CHECKPOINT, FORMS, STACKED, TRANSFORMERS, TrainerForm
from weightsync.agents.trainer.models.mla import DeepseekV2Table, DeepseekV3Table, DeepseekV32Table, GlmMoeDsaTable
from weightsync.agents.trainer.models.moe import Glm4MoeTable, Qwen3MoeTable
from weightsync.agents.trainer.models.table import ConfigSource, ModelConfig, ModelTable

__all__ = [
    "CHECKPOINT",
    "FORMS",
    "STACKED",
    "TRANSFORMERS",
    "ConfigSource",
    "ModelConfig",
    "ModelTable",
    "TrainerForm",
    "model_table",
    "register_table",
]

Table = TypeVar("Table", bound=type[ModelTable])

_tables: Final[dict[str, type[ModelTable]]] = {}


def register_table(table: Table) -> Table:
    """Make ``table`` the one for its ``architectures``. Usable as a class decorator."""
    _tables.update(dict.fromkeys(table.architectures, table))
    return table


for _table in (
    LlamaTable,
    Qwen3Table,
    Qwen3MoeTable,
    Glm4MoeTable,
    DeepseekV2Table,
    DeepseekV3Table,
    DeepseekV32Table,
    GlmMoeDsaTable,
):
    register_table(_table)


def model_table(
    config: ConfigSource,
    *,
    forward_dtype: torch.dtype = torch.bfloat16,
    fp8: bool | None = None,
    form: TrainerForm | None = None,
) -> ModelTable:
    """The table for a Hugging Face configuration (an object, its values, its file or its model directory).

    Args:
        config: of one of the registered architectures.
        forward_dtype: what the trainer's forward pass uses.
        fp8: whether engines serve FP8 blocks; None: as ``quantization_config`` says.
        form: the trainer's names; None: recognised from its keys.

    Raises:
        UnknownArchitecture: none of the configuration's architectures is registered.
        ConversionTableError: a configuration that the table cannot read.
    """
    read = ModelConfig.of(config)
    named = [str(name) for name in read.sequence("architectures")]
    table = next((_tables[name] for name in named if name in _tables), None)
    if table is None:
        raise UnknownArchitecture(f"no conversion table for {named}; there are {', '.join(sorted(_tables))}")
    return table(read, forward_dtype=forward_dtype, fp8=fp8, form=form)
