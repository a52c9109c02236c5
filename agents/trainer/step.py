"""The step that a version is named after, from whatever counts steps in a training script."""

import operator
from typing import SupportsIndex

import torch
from weightsync.orchestrator.protocol.limits import MAX_STEP


def step_number(step: SupportsIndex) -> int:
    """``step`` as a Python integer: also from NumPy integers and integer tensors of one element.

    Raises:
        TypeError: no integer; a bool is none.
        ValueError: negative, or above MAX_STEP.
    """
    if isinstance(step, bool) or (isinstance(step, torch.Tensor) and step.dtype == torch.bool):
        raise TypeError(f"step must be an integer, got the bool {step!r}")
    try:
        number = operator.index(step)
    except TypeError as error:
        raise TypeError(f"step must be an integer, got {type(step).__name__} {step!r}") from error
    if not 0 <= number <= MAX_STEP:
        raise ValueError(f"step must be from 0 to {MAX_STEP}, got {number}")
    return number
