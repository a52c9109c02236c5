"""The trainer's half of a family: its Hugging Face module, and that module's slots for what the engines need."""

from collections.abc import Sequence
from pathlib import Path

import torch
from families.configs import Family
from weightsync.agents.trainer.routes.routes import TrainerModel, route_needs
from weightsync.agents.trainer.slots.slots import SlotOptions, TrainerSlots
from weightsync.agents.trainer.state import current_state
from weightsync.orchestrator.planner import Party
from weightsync.orchestrator.planner.needs import union_of_needs

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


def trainer_side(model: torch.nn.Module, targets: Sequence[Party]) -> TrainerSlots:
    """The slots of a trainer of one rank that holds ``model``, for what ``targets`` need, filled with its weights."""
    needs = union_of_needs(targets).needs
    state = current_state(model)
    table = route_needs(needs, state, TrainerModel.of(model, None, partial=False))
    slots = TrainerSlots(state, table, options=SlotOptions(staging_bytes=STAGING_BYTES), rank=0, world=1)
    slots.convert(state)
    return slots
