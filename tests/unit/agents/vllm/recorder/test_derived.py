"""Tensors that vLLM derives from weights: found, refreshed in place, or of unknown origin and refused."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.vllm.recorder.derived import MAX_DEPTH, held_tensors
from weightsync.agents.vllm.recorder.recorded import RecordError, keep, record, recorded_layout

CONFIG = SimpleNamespace(dtype=torch.float32)
VLLM_CONFIG = SimpleNamespace(load_config=SimpleNamespace(load_format="auto"))
F32 = torch.float32


class Layer(nn.Module):
    """A weight, and a helper object if the test makes one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3), requires_grad=False)


class Model(nn.Module):
    """Modules by name; the loader fills ``layer.weight``."""

    def __init__(self, layer: Layer, **others: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        for name, module in others.items():
            self.add_module(name, module)

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        for _, tensor in weights:
            self.layer.weight.data.copy_(tensor)


LAYER = [Checkpoint("layer.weight", (4, 3), F32)]


class Attention(nn.Module):
    """Keeps a transposed half of its projection, as multi-head latent attention does."""

    def __init__(self, projection: nn.Module, *, drops: bool, replaces: bool) -> None:
        super().__init__()
        self.kv_b_proj = projection
        self.kv_lora_rank = 3
        self.is_amx_bmm_enabled = drops
        self.replaces = replaces

    def process_weights_after_loading(self, dtype: torch.dtype) -> None:
        absorbed = self.kv_b_proj.weight.data[:2].t().contiguous().to(dtype)
        if self.replaces or not hasattr(self, "W_UK_T"):
            self.W_UK_T = absorbed
        else:
            self.W_UK_T.copy_(absorbed)
        if self.is_amx_bmm_enabled:
            self.kv_b_proj.weight = nn.Parameter(torch.empty(0), requires_grad=False)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("replaces", [False, True])
def test_absorbed_projections_are_refreshed_in_place(drops: bool, replaces: bool) -> None:
    projection = Layer()
    attention = Attention(projection, drops=drops, replaces=replaces)
    model = Model(projection, attention=attention)
    recording = record(model, CONFIG, LAYER)
    with recording.processing:
        attention.process_weights_after_loading(F32)
    recording.finish()
    keep(recording)
    recorded = recorded_layout(model, VLLM_CONFIG)
    assert [(d.name, d.refresh) for d in recorded.layout.derived] == [("attention.W_UK_T", "mla-absorbed-projections")]
    address = attention.W_UK_T.data_ptr()
    new = torch.randn(4, 3)
    recorded.load([("layer.weight", new)])
    assert torch.equal(attention.W_UK_T, new[:2].t())
    assert attention.W_UK_T.data_ptr() == address
    assert attention.kv_b_proj.weight.numel() == (0 if drops else 12)
    assert bool(recorded.shadows) is drops


class Kernel:
    """A helper object as vLLM's layers hold them."""

    def __init__(self, **held: object) -> None:
        self.__dict__.update(held)


Kernel.__module__ = "vllm.kernels"


@pytest.mark.parametrize(
    ("name", "tensor", "known"),
    [
        ("strides", torch.arange(4), True),
        ("gemm1_alpha", torch.ones(4), True),
        ("q_range", torch.ones(4), True),
        ("packed", torch.zeros(4, dtype=torch.uint8), False),
        ("inverse", torch.ones(4), False),
    ],
)
def test_helpers_may_hold_tables_and_constants_but_no_new_weights(name: str, tensor: torch.Tensor, known: bool) -> None:
    model = Model(Layer())
    recording = record(model, CONFIG, LAYER)
    with recording.processing:
        model.layer.kernel = Kernel(**{name: tensor})
    if known:
        recording.finish()
        keep(recording)
        assert recorded_layout(model, VLLM_CONFIG).layout.derived == ()
    else:
        with pytest.raises(RecordError, match=rf"layer\.kernel\.{name}: \(4,\)"):
            recording.finish()


def test_held_tensors_names_each_holder_once_and_stays_inside_vllm() -> None:
    layer = Layer()
    shared = Kernel(scales=torch.ones(2))
    layer.first = Kernel(inner=Kernel(codes=torch.ones(3)), again=shared)  # type: ignore[assignment]
    layer.second = shared  # type: ignore[assignment]
    layer.foreign = SimpleNamespace(weight=torch.ones(4))  # type: ignore[assignment]
    names = [held.name for held in held_tensors(Model(layer))]
    assert sorted(names) == ["layer.first.again.scales", "layer.first.inner.codes", "layer.weight"]


def test_helpers_deeper_than_the_limit_are_not_searched() -> None:
    deep = Kernel(codes=torch.ones(1))
    for _ in range(MAX_DEPTH):
        deep = Kernel(inner=deep)
    layer = Layer()
    layer.kernel = deep  # type: ignore[assignment]
    assert [held.name for held in held_tensors(Model(layer))] == ["layer.weight"]
    layer.kernel = deep.inner  # type: ignore[attr-defined]
    assert "layer.kernel" + ".inner" * (MAX_DEPTH - 1) + ".codes" in [held.name for held in held_tensors(Model(layer))]
