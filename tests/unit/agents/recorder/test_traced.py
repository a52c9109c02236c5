"""A trace beside a real load: what the trace cannot see, the bytes show."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from weightsync.agents.recorder.blueprint import ParameterPlace
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.recorder.interface import KernelLayout
from weightsync.agents.recorder.trace import RecordError
from weightsync.agents.recorder.traced import Traced, trace_loader

F32 = torch.float32
CHECKPOINT = [Checkpoint("x", (4, 3), F32), Checkpoint("other", (2,), F32)]


class Model(nn.Module):
    """One parameter, and a loader given by the test."""

    def __init__(self, load: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 3), requires_grad=False)
        self._load = load

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if name == "x":
                self._load(self.weight.data, tensor)


def plainly(weight: torch.Tensor, tensor: torch.Tensor) -> None:
    weight.copy_(tensor)


@dataclass(frozen=True)
class Translating:
    """An engine that takes everything in float32, whatever the checkpoint has it in."""

    kernel_layouts: tuple[KernelLayout, ...] = ()

    def as_fed(self, checkpoint: Sequence[Checkpoint], dtypes: Mapping[str, torch.dtype]) -> list[Checkpoint]:
        return [Checkpoint(entry.name, entry.shape, F32) for entry in checkpoint]

    def reason_to_stay(self, parameter: ParameterPlace, whole: bool) -> str:
        return ""

    def may_exchange_halves(self, parameter: ParameterPlace) -> bool:
        return False

    def may_be_dropped(self, model: nn.Module) -> set[int]:
        return set()

    def derivations(self, model: nn.Module) -> Any:
        raise NotImplementedError


def loaded(model: Model, values: torch.Tensor) -> tuple[Traced, Any]:
    traced = trace_loader(model, CHECKPOINT, Translating())
    ledger = traced.ledger(["x"])
    with torch.no_grad():
        model.load_weights(ledger.watch([("x", values)]))
    return traced, ledger


def test_a_plain_loader_is_proved() -> None:
    model = Model(plainly)
    traced, ledger = loaded(model, torch.randn(4, 3))
    traced.compare(ledger)
    assert [landing.source.name for landing in traced.landings] == ["x"]
    assert traced.unused == ["other"]
    assert traced.translated == []


def of_real_values_only(weight: torch.Tensor, tensor: torch.Tensor) -> None:
    weight.copy_(tensor)
    if not tensor.is_meta:
        weight[0] = 0


def beneath_torch(weight: torch.Tensor, tensor: torch.Tensor) -> None:
    weight.copy_(tensor)
    if not tensor.is_meta:
        weight.numpy()[2:] *= 3


@pytest.mark.parametrize("load", [of_real_values_only, beneath_torch])
def test_what_a_trace_cannot_see_is_refused_by_tensor_and_parameter(
    load: Callable[[torch.Tensor, torch.Tensor], None],
) -> None:
    traced, ledger = loaded(Model(load), torch.randn(4, 3))
    with pytest.raises(RecordError, match=r"weight does not hold x at \[0, 0\] \+ \[4, 3\] after loading it"):
        traced.compare(ledger)


def test_memory_that_a_load_replaced_is_refused() -> None:
    model = Model(plainly)
    traced, ledger = loaded(model, torch.randn(4, 3))
    model.weight.data = torch.zeros(9)
    with pytest.raises(RecordError, match="weight does not hold x"):
        traced.compare(ledger)


def test_what_travels_in_another_form_than_the_checkpoint_s_is_known() -> None:
    model = Model(plainly)
    checkpoint = [Checkpoint("x", (4, 3), torch.float8_e4m3fn)]
    assert trace_loader(model, checkpoint, Translating()).translated == [Checkpoint("x", (4, 3), F32)]
