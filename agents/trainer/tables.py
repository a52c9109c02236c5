"""The conversion table of a trainer that gives none, or only a model's configuration."""

import os
from collections.abc import Callable, Mapping

import torch
from torch import nn
from weightsync.agents.trainer.errors import UnknownArchitecture
from weightsync.agents.trainer.models import ConfigSource, ModelConfig, model_table
from weightsync.agents.trainer.models.table import HasValues, ModelTable


def table_of(
    source: nn.Module | Callable[[], Mapping[str, torch.Tensor]], given: ModelTable | ConfigSource | None
) -> ModelTable:
    """``given``, or the table for the configuration that it is; None: for the model's own ``config``.

    Raises:
        UnknownArchitecture: there is no configuration, or no table is registered for it.
        ConversionTableError: a configuration that the table cannot read.
    """
    if isinstance(given, str | os.PathLike | Mapping | HasValues):
        return model_table(given)
    if given is not None:
        return given
    config = getattr(source, "config", None)
    if not isinstance(config, HasValues):
        raise UnknownArchitecture(
            f"{type(source).__name__} has no Hugging Face config: give table=model_table('path/to/config.json')"
        )
    values = dict(config.to_dict())
    # A configuration that was made in code does not name its architecture; the model's class does.
    if not ModelConfig(values).sequence("architectures"):
        values["architectures"] = [type(source).__name__]
    return model_table(values)
