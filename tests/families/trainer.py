"""The trainer's half of a family: its Hugging Face module, and that module's slots for what the engines need."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from families.configs import Family
from weightsync.agents.trainer.slots.conversion import ConversionSpec, Source
from weightsync.agents.trainer.slots.quantization import QuantizationSpec
from weightsync.agents.trainer.slots.slots import SlotOptions, TrainerSlots
from weightsync.agents.trainer.state import current_state
from weightsync.orchestrator.protocol.layout import Tensor

STAGING_BYTES = 4 * 1024 * 1024


def hugging_face(family: Family, seed: int) -> torch.nn.Module:
    """The stock module of ``family`` in bfloat16, all its weights 0.15·randn (norms around 1) drawn from ``seed``.

    Such weights give greedy answers that differ clearly from seed to seed; transformers' own initial ones do not.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family.model_type, **family.values), dtype=torch.bfloat16
    )
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    persistent = {name: value for name, value in model.state_dict(keep_vars=True).items() if name not in parameters}
    with torch.no_grad():
        for name, value in (parameters | persistent).items():
            if value.is_floating_point():
                around = 1.0 if value.ndim == 1 and not name.endswith("bias") else 0.0
                value.copy_(around + 0.15 * torch.randn(value.shape, generator=generator))
    model.tie_weights()
    return model


def save(model: torch.nn.Module, directory: Path) -> Path:
    """What ``save_pretrained`` makes of ``model``: the judge's checkpoint."""
    model.save_pretrained(directory)  # type: ignore[operator]
    return directory


class _Identity:
    """A conversion table of the needed tensors under their own names, each in the dtype that it is needed in."""

    layers = 0

    def __init__(self, needs: Sequence[Tensor]) -> None:
        self._needs = needs

    def for_keys(self, keys: Collection[str]) -> "_Identity":
        return self

    def conversion_specs(self, layer_idx: int) -> Iterable[ConversionSpec]:
        return ()

    def non_layer_specs(self) -> Iterator[ConversionSpec]:
        for tensor in self._needs:
            treatment = QuantizationSpec(getattr(torch, tensor.dtype))
            yield ConversionSpec(tensor.name, (Source(tensor.name),), quantization=treatment)


def trainer_side(model: torch.nn.Module, needs: Sequence[Tensor]) -> TrainerSlots:
    """The slots of a trainer of one rank that holds ``model``, filled with its weights."""
    state = current_state(model)
    slots = TrainerSlots(state, _Identity(needs), options=SlotOptions(staging_bytes=STAGING_BYTES), rank=0, world=1)
    slots.convert(state)
    return slots
