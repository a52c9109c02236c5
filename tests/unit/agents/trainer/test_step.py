"""A step is an integer of any kind, and nothing else."""

import numpy as np
import pytest
import torch
from weightsync.agents.trainer.step import step_number
from weightsync.orchestrator.protocol.limits import MAX_STEP
from weightsync.orchestrator.protocol.markers import step_name


@pytest.mark.parametrize("step", [5, np.int64(5), np.uint8(5), torch.tensor(5), torch.tensor([5])])
def test_integers_of_any_kind(step: int) -> None:
    assert step_number(step) == 5
    assert type(step_number(step)) is int


@pytest.mark.parametrize("step", [True, np.bool_(True), torch.tensor(True), 5.0, torch.tensor(5.0), "5", None])
def test_nothing_else(step: object) -> None:
    with pytest.raises(TypeError, match="step must be an integer"):
        step_number(step)  # type: ignore[arg-type]


def test_the_range_is_that_of_step_directories() -> None:
    assert step_name(step_number(MAX_STEP)) == f"step_{MAX_STEP}"
    for step in (-1, MAX_STEP + 1):
        with pytest.raises(ValueError, match=f"got {step}"):
            step_number(step)
