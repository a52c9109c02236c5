"""Running a loader on stand-ins: what it may do, what it sees, and that the live model stays as it was."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from weightsync.agents.recorder.blueprint import Blueprint
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.recorder.settled import settle
from weightsync.agents.recorder.trace import RecordError

Weights = Iterator[tuple[str, torch.Tensor]]
F32 = torch.float32


class Model(nn.Module):
    """One parameter ``w``, and a loader given by the test."""

    def __init__(self, w: torch.Tensor, load: Callable[["Model", str, torch.Tensor], None]) -> None:
        super().__init__()
        self.w = nn.Parameter(w, requires_grad=False)
        self._load = load

    def load_weights(self, weights: Weights) -> None:
        for name, tensor in weights:
            self._load(self, name, tensor)


def trace(model: Model, *checkpoint: Checkpoint) -> None:
    Blueprint(model).trace(checkpoint, model.load_weights)


def test_a_loader_that_looks_at_a_value_is_refused_at_the_tensor_s_name() -> None:
    def load(model: Model, name: str, tensor: torch.Tensor) -> None:
        if tensor.max() > 0:
            model.w.data.copy_(tensor)

    with pytest.raises(RecordError, match="without the values at x"):
        trace(Model(torch.zeros(4), load), Checkpoint("x", (4,), F32))


def test_a_loader_that_replaces_the_memory_is_refused() -> None:
    def load(model: Model, name: str, tensor: torch.Tensor) -> None:
        model.w.data = tensor

    with pytest.raises(RecordError, match="w: the loader replaces its memory"):
        trace(Model(torch.zeros(4), load), Checkpoint("x", (4,), F32))


def test_the_live_model_is_untouched_even_when_the_loader_fails() -> None:
    seen: list[torch.Tensor] = []

    def load(model: Model, name: str, tensor: torch.Tensor) -> None:
        seen.append(model.w)
        model.w.data.copy_(tensor)
        model.w.extra = 1  # type: ignore[attr-defined]
        if name == "bad":
            raise KeyError(name)

    w = torch.randn(4)
    model = Model(w.clone(), load)
    before = model.w
    with pytest.raises(RecordError, match="at bad"):
        Blueprint(model).trace([Checkpoint("x", (4,), F32), Checkpoint("bad", (4,), F32)], model.load_weights)
    assert model.w is before
    assert seen[0] is not before
    assert seen[0].is_meta
    assert torch.equal(model.w, w)
    assert not hasattr(model.w, "extra")


def test_a_parameter_under_two_names_is_one_storage() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(3, 4, bias=False)
            self.head = nn.Linear(3, 4, bias=False)
            self.head.weight = self.embed.weight

        def load_weights(self, weights: Weights) -> None:
            for _, tensor in weights:
                assert self.head.weight is self.embed.weight
                self.embed.weight.data.copy_(tensor)

    model = Tied()
    blueprint = Blueprint(model)
    settled = settle(blueprint.trace([Checkpoint("embed.weight", (4, 3), F32)], model.load_weights))
    assert [parameter.storage for parameter in blueprint.parameters] == [0, 0]
    assert len(settled[0].landings) == 1


def test_an_expert_map_stays_readable_and_a_copy_into_it_is_seen() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, 3), requires_grad=False)
            self.register_buffer("_expert_map", torch.tensor([-1, 0, 1]), persistent=False)

        def load_weights(self, weights: Weights) -> None:
            for name, tensor in weights:
                slot = int(self._expert_map[int(name)].item())
                if slot >= 0:
                    self.w.data[slot].copy_(tensor)

    model = Mapped()
    settled = settle(Blueprint(model).trace([Checkpoint(str(e), (3,), F32) for e in range(3)], model.load_weights))
    assert [(mark.source.name, mark.place.offset) for mark in settled[0].landings] == [("1", 0), ("2", 12)]


def test_subclasses_and_attributes_pass_for_the_original() -> None:
    class Special(nn.Parameter):
        pass

    parameter = Special(torch.zeros(2), requires_grad=False)
    parameter.output_dim = 0  # type: ignore[attr-defined]
    checks: list[bool] = []

    def load(model: Model, name: str, tensor: torch.Tensor) -> None:
        checks.append(isinstance(model.w, Special) and model.w.output_dim == 0)  # type: ignore[attr-defined]
        model.w.data.copy_(tensor)

    model = Model(torch.zeros(2), load)
    model.w = parameter
    Blueprint(model).trace([Checkpoint("x", (2,), F32)], model.load_weights)
    assert checks == [True]


def test_a_parameter_without_memory_is_refused() -> None:
    with pytest.raises(RecordError, match="w has no memory before loading"):
        Blueprint(Model(torch.zeros(2, device="meta"), lambda m, n, t: None))


class Registering(nn.Module):
    """A loader that registers its bias anew, where the model has one or not, or keeps what it got elsewhere."""

    def __init__(self, *, has_bias: bool, attribute: str = "bias", size: int = 4) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4, bias=has_bias)
        self.attribute, self.size = attribute, size

    def load_weights(self, weights: Weights) -> None:
        for name, tensor in weights:
            if name == "weight":
                self.head.weight.data.copy_(tensor)
            elif self.attribute == "bias":
                self.head.bias = nn.Parameter(torch.empty(self.size), requires_grad=False)
                self.head.bias.data.copy_(tensor)
            else:
                setattr(self, self.attribute, tensor.clone())


ENTRIES = [Checkpoint("weight", (4, 3), F32), Checkpoint("bias", (4,), F32)]


def test_what_a_parameter_that_the_loader_registers_holds_lands_in_the_model_s_own() -> None:
    model = Registering(has_bias=True)
    blueprint = Blueprint(model)
    states = settle(blueprint.trace(ENTRIES, model.load_weights))
    by_name = {parameter.name: states[parameter.storage] for parameter in blueprint.parameters}
    assert [landing.source.name for landing in by_name["head.bias"].landings] == ["bias"]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (Registering(has_bias=False), "head.bias"),
        (Registering(has_bias=True, attribute="kept"), "kept"),
    ],
)
def test_what_the_loader_keeps_where_the_model_has_no_parameter_is_refused(model: Registering, name: str) -> None:
    with pytest.raises(RecordError, match=f"^{name}: the loader makes it of bias, and the model has no such parameter"):
        Blueprint(model).trace(ENTRIES, model.load_weights)
