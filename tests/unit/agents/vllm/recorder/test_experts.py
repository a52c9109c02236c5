"""Experts that a load balancer moves: their landings are named after what their slots hold now."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.vllm.recorder.experts import expert_map_fingerprint
from weightsync.agents.vllm.recorder.recorded import RecordError, keep, record, recorded_layout

CONFIG = SimpleNamespace(dtype=torch.float32)
VLLM_CONFIG = SimpleNamespace(load_config=SimpleNamespace(load_format="auto"))
F32 = torch.float32


class Experts(nn.Module):
    """Two local slots of four experts, with a load balancer's map that the test may change."""

    def __init__(self) -> None:
        super().__init__()
        self.w13_weight = nn.Parameter(torch.zeros(2, 3), requires_grad=False)
        parallel = SimpleNamespace(ep_rank=1)
        self.moe_config = SimpleNamespace(num_local_experts=2, moe_parallel_config=parallel)
        self.eplb_state = SimpleNamespace(logical_to_physical_map=torch.tensor([[0], [1], [2], [3]]))


class ExpertModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Experts()

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            slot = int(name.split(".")[2]) - 2
            if slot >= 0:
                self.mlp.w13_weight.data[slot].copy_(tensor)


def expert_recording(model: ExpertModel, name: str = "mlp.experts.{}.w") -> None:
    recording = record(model, CONFIG, [Checkpoint(name.format(e), (3,), F32) for e in range(4)])
    with recording.processing:
        pass
    recording.finish()
    keep(recording)


def test_rebalanced_experts_are_written_to_the_slots_that_hold_them_now() -> None:
    model = ExpertModel()
    expert_recording(model)
    first = recorded_layout(model, VLLM_CONFIG)
    assert [t.name for t in first.layout.tensors] == ["mlp.experts.2.w", "mlp.experts.3.w"]
    model.mlp.eplb_state.logical_to_physical_map = torch.tensor([[3, -1], [0, 2], [1, -1], [-1, -1]])
    second = recorded_layout(model, VLLM_CONFIG)
    assert [t.name for t in second.layout.tensors] == ["mlp.experts.1.w", "mlp.experts.0.w"]
    assert second.layout.expert_map == expert_map_fingerprint(model) != first.layout.expert_map
    second.load([(f"mlp.experts.{e}.w", torch.full((3,), float(e))) for e in range(4)])
    assert model.mlp.w13_weight.tolist() == [[1, 1, 1], [0, 0, 0]]


def test_an_empty_slot_and_stacked_experts_are_refused_while_balancing() -> None:
    model = ExpertModel()
    expert_recording(model)
    model.mlp.eplb_state.logical_to_physical_map = torch.tensor([[0], [1], [2], [0]])
    with pytest.raises(RecordError, match="slot 1 holds no expert"):
        recorded_layout(model, VLLM_CONFIG)
    stacked = ExpertModel()
    expert_recording(stacked, "mlp.stack.{}.w")
    with pytest.raises(RecordError, match="stacks its experts"):
        recorded_layout(stacked, VLLM_CONFIG)


class Layer(nn.Module):
    """A map in each of the places where vLLM's layers keep one."""

    def __init__(self, *, maps: bool) -> None:
        super().__init__()
        self.register_buffer("_expert_map", torch.arange(4, dtype=torch.int32) if maps else None)
        self.router = nn.Module()
        self.router.eplb_state = None
        self.expert_global_to_physical = None

    @property
    def expert_local_to_global(self) -> torch.Tensor:
        raise AssertionError("this layer has no such placement")


def layered(*, maps: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), Layer(maps=maps), Layer(maps=maps))


def test_a_map_anywhere_counts_and_one_that_comes_later_too() -> None:
    model = layered(maps=False)
    assert expert_map_fingerprint(model) == ""
    layer: Any = model[2]
    seen = {expert_map_fingerprint(model)}
    layer._expert_map = torch.tensor([1, 0, 3, 2], dtype=torch.int32)
    seen.add(expert_map_fingerprint(model))
    layer.expert_global_to_physical = torch.tensor([[0, 1]])
    seen.add(expert_map_fingerprint(model))
    layer.router.eplb_state = SimpleNamespace(logical_to_physical_map=torch.tensor([[0, -1]]))
    seen.add(expert_map_fingerprint(model))
    layer.router.eplb_state.logical_to_physical_map[0, 1] = 1  # in place, as vLLM does
    seen.add(expert_map_fingerprint(model))
    assert len(seen) == 5


def test_maps_that_are_exchanged_between_layers_are_others() -> None:
    model, other = layered(maps=True), layered(maps=True)
    assert expert_map_fingerprint(model) == expert_map_fingerprint(other) != ""
    layers: Any = (model[1], model[2])
    layers[0]._expert_map = torch.tensor([3, 2, 1, 0], dtype=torch.int32)
    once = expert_map_fingerprint(model)
    layers[0]._expert_map, layers[1]._expert_map = layers[1]._expert_map, layers[0]._expert_map
    assert expert_map_fingerprint(model) != once
    assert expert_map_fingerprint(model, other) != expert_map_fingerprint(model)


def test_a_fingerprint_is_of_the_values_whatever_holds_them() -> None:
    model, wide = layered(maps=True), layered(maps=True)
    for layer in (wide[1], wide[2]):
        layer._expert_map = layer._expert_map.to(torch.int64)  # type: ignore[union-attr, operator]
    assert expert_map_fingerprint(model) == expert_map_fingerprint(wide)
