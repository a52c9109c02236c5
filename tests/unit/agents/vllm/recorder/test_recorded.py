"""From load to layout on small modules that process their weights the ways vLLM's layers do."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.vllm.recorder.recorded import Recorded, RecordError, keep, record, recorded_layout

CONFIG = SimpleNamespace(dtype=torch.float32)
VLLM_CONFIG = SimpleNamespace(load_config=SimpleNamespace(load_format="auto"))
F32 = torch.float32


class Layer(nn.Module):
    """A weight that copies ``<name>.weight``, and whatever processing the test gives it."""

    def __init__(self, rows: int = 4, process: Callable[[Any], None] = lambda layer: None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, 3), requires_grad=False)
        self.process = process


class Model(nn.Module):
    """Layers by name; the loader copies each tensor into the parameter of its name, at most as many rows as fit."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            if name in parameters:
                parameters[name].data[: tensor.size(0)].copy_(tensor)


def checkpoint(**shapes: tuple[int, ...]) -> list[Checkpoint]:
    return [Checkpoint(f"{name}.weight", shape, F32) for name, shape in shapes.items()]


def loaded(model: Model, entries: list[Checkpoint]) -> Recorded:
    recording = record(model, CONFIG, entries)
    with recording.processing:
        for layer in model.children():
            if isinstance(layer, Layer):
                layer.process(layer)
    recording.finish()
    keep(recording)
    return recorded_layout(model, VLLM_CONFIG)


def test_a_model_that_processing_leaves_alone_is_written_where_it_lies() -> None:
    model = Model(a=Layer())
    recorded = loaded(model, checkpoint(a=(4, 3)))
    assert recorded.layout.regions[0].base == model.a.weight.data_ptr()
    new = torch.randn(4, 3)
    recorded.load([("a.weight", new)])
    assert torch.equal(model.a.weight, new)
    assert recorded.unrecorded == ()
    assert recorded.shadows == ()


def test_a_parameter_registered_anew_with_the_same_bytes_is_followed() -> None:
    def process(layer: Layer) -> None:
        layer.weight = nn.Parameter(layer.weight.data.clone(), requires_grad=False)

    model = Model(a=Layer(process=process))
    assert loaded(model, checkpoint(a=(4, 3))).layout.regions[0].base == model.a.weight.data_ptr()


def test_a_transposed_view_of_the_same_bytes_is_followed() -> None:
    def process(layer: Layer) -> None:
        layer.weight = nn.Parameter(layer.weight.data.t(), requires_grad=False)

    model = Model(a=Layer(process=process))
    recorded = loaded(model, checkpoint(a=(4, 3)))
    new = torch.randn(4, 3)
    recorded.load([("a.weight", new)])
    assert torch.equal(model.a.weight, new.t())


@pytest.mark.parametrize(
    "process",
    [
        lambda layer: layer.weight.data.copy_(layer.weight.data.flip(0)),
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.data.t().contiguous(), requires_grad=False)),
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.data.double(), requires_grad=False)),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.empty(0), requires_grad=False)),
        lambda layer: delattr(layer, "weight"),
    ],
    ids=["shuffled in place", "another layout", "another dtype", "emptied", "removed"],
)
def test_an_unknown_kernel_layout_is_refused_by_name(process: Callable[[Layer], None]) -> None:
    with pytest.raises(RecordError, match=r"layouts that are not known: a\.weight"):
        loaded(Model(a=Layer(process=process), b=Layer()), checkpoint(a=(4, 3), b=(4, 3)))


def test_a_tensor_of_unknown_origin_is_refused_by_name() -> None:
    def process(layer: Layer) -> None:
        layer.inverse = 1 / layer.weight.data  # type: ignore[assignment]

    with pytest.raises(RecordError, match=r"a\.inverse: \(4, 3\) torch.float32 appeared"):
        loaded(Model(a=Layer(process=process)), checkpoint(a=(4, 3)))


def test_another_view_of_a_weight_is_not_a_new_tensor() -> None:
    def process(layer: Layer) -> None:
        layer.transposed = layer.weight.data.t()  # type: ignore[assignment]

    assert loaded(Model(a=Layer(process=process)), checkpoint(a=(4, 3))).layout.derived == ()


def test_a_parameter_that_the_checkpoint_does_not_reach_is_refused_by_name() -> None:
    with pytest.raises(RecordError, match=r"reaches b\.weight \(48 of 48 bytes\)"):
        record(Model(a=Layer(), b=Layer()), CONFIG, checkpoint(a=(4, 3)))


def test_a_parameter_that_is_reached_in_part_is_refused_unless_it_is_padded() -> None:
    with pytest.raises(RecordError, match=r"a\.weight \(24 of 48 bytes\)"):
        record(Model(a=Layer()), CONFIG, checkpoint(a=(2, 3)))
    vocabulary = Layer()
    vocabulary.org_vocab_size = 2  # type: ignore[assignment]
    model = Model(a=vocabulary)
    before = vocabulary.weight.data[2:].clone()
    recorded = loaded(model, checkpoint(a=(2, 3)))
    assert [(entry.name, entry.bytes, entry.reason) for entry in recorded.unrecorded] == [
        ("a.weight", 24, "padding of the vocabulary")
    ]
    recorded.load([("a.weight", torch.ones(2, 3))])
    assert torch.equal(vocabulary.weight.data[2:], before)


def test_buffers_that_the_model_computes_stay() -> None:
    layer = Layer()
    layer.register_buffer("cos_sin_cache", torch.randn(8), persistent=False)
    recorded = loaded(Model(a=layer), checkpoint(a=(4, 3)))
    assert [entry.name for entry in recorded.unrecorded] == ["a.cos_sin_cache"]


def test_tensors_that_the_rank_does_not_need_are_named() -> None:
    recorded = loaded(Model(a=Layer()), checkpoint(a=(4, 3), mtp=(4, 3)))
    assert recorded.unused == ("mtp.weight",)


def test_tied_weights_are_one_target() -> None:
    embed, head = Layer(), Layer()
    head.weight = embed.weight
    recorded = loaded(Model(embed=embed, head=head), checkpoint(embed=(4, 3)))
    assert len(recorded.layout.regions) == 1
    assert len(recorded.layout.matrix()) == 1


def test_weights_tied_by_processing_are_one_target() -> None:
    embed = Layer()
    head = Layer(process=lambda layer: setattr(layer, "weight", embed.weight))
    head.weight.data.copy_(embed.weight)
    recorded = loaded(Model(embed=embed, head=head), checkpoint(embed=(4, 3), head=(4, 3)))
    assert [tensor.name for tensor in recorded.layout.tensors] == ["embed.weight"]


def test_weights_untied_by_processing_are_refused() -> None:
    embed = Layer()
    head = Layer(process=lambda layer: setattr(layer, "weight", nn.Parameter(embed.weight.data.clone())))
    head.weight = embed.weight
    with pytest.raises(RecordError, match=r"head\.weight"):
        loaded(Model(embed=embed, head=head), checkpoint(embed=(4, 3)))


def test_a_model_loaded_without_the_hook_is_refused() -> None:
    with pytest.raises(RecordError, match="Model was loaded without the recorder"):
        recorded_layout(Model(a=Layer()), VLLM_CONFIG)
