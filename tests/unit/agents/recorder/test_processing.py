"""Who still holds weights after processing: planted holders that no list of attributes would show."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from weightsync.agents.recorder.contents import storage_key
from weightsync.agents.recorder.processing import Processing

for name, key in (("keep", "CompositeExplicitAutograd"), ("keep_anywhere", "CompositeImplicitAutograd")):
    torch.library.define(f"weightsync_test::{name}", "(Tensor weight) -> int")
    torch.library.impl(f"weightsync_test::{name}", key, lambda weight: 7)


class Layer(nn.Module):
    """A weight, and a table made before loading."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3), requires_grad=False)
        self.table = torch.zeros(4)
        self.held: Any = None

    def multiply(self, packed: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x @ packed


class Slotted:
    __slots__ = ("packed",)

    def __init__(self, packed: torch.Tensor) -> None:
        self.packed = packed

    def apply(self) -> torch.Tensor:
        return self.packed


@dataclass(frozen=True)
class Frozen:
    inner: tuple[Any, ...]


def packed(layer: Layer) -> torch.Tensor:
    return layer.weight.data.t().contiguous()


def closure(layer: Layer) -> Callable[[torch.Tensor], torch.Tensor]:
    copy = packed(layer)
    return lambda x: x @ copy


def with_default(tensor: torch.Tensor) -> Callable[..., torch.Tensor]:
    def multiply(x: torch.Tensor, copy: torch.Tensor = tensor) -> torch.Tensor:
        return x @ copy

    return multiply


HOLDERS: dict[str, Callable[[Layer], Any]] = {
    "an attribute": packed,
    "a closure": closure,
    "a dictionary": lambda layer: {"packed": packed(layer)},
    "a list in a tuple": lambda layer: ([packed(layer)],),
    "a dataclass": lambda layer: Frozen((SimpleNamespace(x=packed(layer)),)),
    "slots": lambda layer: Slotted(packed(layer)),
    "a bound method": lambda layer: Slotted(packed(layer)).apply,
    "a partial": lambda layer: functools.partial(layer.multiply, packed(layer)),
    "a default argument": lambda layer: with_default(packed(layer)),
    "a sum": lambda layer: layer.weight.data.sum(0),
    "a table filled in place": lambda layer: layer.table.copy_(layer.weight.data[:, 0]),
    "a table filled by out=": lambda layer: torch.sum(layer.weight.data, 1, out=layer.table),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_a_copy_is_found_whoever_holds_it(name: str) -> None:
    layer = Layer()
    processing = Processing({"layer.weight": layer.weight})
    with processing:
        layer.held = HOLDERS[name](layer)
    (fault,) = processing.copies({storage_key(layer.weight)})
    assert fault.startswith("layer.weight: a result of aten.")


def test_views_and_what_is_gone_again_are_no_copies() -> None:
    layer = Layer()
    processing = Processing({"layer.weight": layer.weight})
    with processing:
        layer.held = [layer.weight.data.t(), layer.weight.data[1:]]
        circle: list[Any] = [layer.weight.data.clone()]
        circle.append(circle)
        del circle
    assert processing.copies({storage_key(layer.weight)}) == []
    assert processing.handed_over == []


def test_the_first_memory_of_a_weight_that_was_moved_must_be_gone() -> None:
    layer = Layer()
    processing = Processing({"layer.weight": layer.weight})
    with processing:
        layer.held, layer.weight = layer.weight, nn.Parameter(layer.weight.data.clone(), requires_grad=False)
    assert processing.copies({storage_key(layer.weight)}) == ["layer.weight: its first memory is still held"]
    layer.held = None
    assert processing.copies({storage_key(layer.weight)}) == []


def test_writes_are_seen_through_every_view() -> None:
    layer = Layer()
    processing = Processing({"layer.weight": layer.weight})
    assert not processing.touched(storage_key(layer.weight))
    with processing:
        layer.weight.data[1:].t().mul_(2)
    assert processing.touched(storage_key(layer.weight))


@pytest.mark.parametrize("name", ["keep", "keep_anywhere"])
def test_a_weight_that_a_kernel_s_own_object_takes_is_named(name: str) -> None:
    layer = Layer()
    processing = Processing({"layer.weight": layer.weight})
    with processing:
        getattr(torch.ops.weightsync_test, name)(layer.weight.data.t())
    (fault,) = processing.handed_over
    assert fault.startswith(f"layer.weight went into weightsync_test.{name}.default")


def test_weights_whose_values_are_looked_at_are_named() -> None:
    layer = Layer()
    processing = Processing({"layer.weight": layer.weight})
    with processing:
        layer.held = float(layer.weight.data.max())
    assert processing.looked == {"layer.weight"}
