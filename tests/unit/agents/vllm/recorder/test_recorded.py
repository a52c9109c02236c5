"""From load to layout on small modules that process their weights the ways vLLM's layers do."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from weightsync.agents.recorder.trace import Checkpoint
from weightsync.agents.vllm.recorder import recorded as recorder
from weightsync.agents.vllm.recorder.experts import expert_map_fingerprint
from weightsync.agents.vllm.recorder.recorded import Recorded, RecordError, keep, keep_draft, record, recorded_layout

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


class Kernel:
    """A helper object as vLLM's layers hold them."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.__dict__.update(tensors)


Kernel.__module__ = "vllm.kernels"


@pytest.mark.parametrize(
    ("name", "tensor", "known"),
    [
        ("strides", torch.arange(4), True),
        ("gemm1_alpha", torch.ones(4), True),
        ("packed", torch.zeros(4, dtype=torch.uint8), False),
        ("inverse", torch.ones(4), False),
    ],
)
def test_helpers_may_hold_tables_and_constants_but_no_new_weights(name: str, tensor: torch.Tensor, known: bool) -> None:
    model = Model(a=Layer(process=lambda layer: setattr(layer, "kernel", Kernel(**{name: tensor}))))
    if known:
        assert loaded(model, checkpoint(a=(4, 3))).layout.derived == ()
    else:
        with pytest.raises(RecordError, match=rf"a\.kernel\.{name}: \(4,\)"):
            loaded(model, checkpoint(a=(4, 3)))


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


# ------------------------------------------------------------------------------------------- absorbed projections
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
    model = Model(projection=projection, attention=attention)
    model.load_weights = lambda weights: [  # type: ignore[assignment, method-assign]
        projection.weight.data.copy_(tensor) for _, tensor in weights
    ]
    recording = record(model, CONFIG, checkpoint(projection=(4, 3)))
    attention.process_weights_after_loading(F32)
    recording.finish()
    keep(recording)
    recorded = recorded_layout(model, VLLM_CONFIG)
    assert [(d.name, d.refresh) for d in recorded.layout.derived] == [("attention.W_UK_T", "mla-absorbed-projections")]
    address = attention.W_UK_T.data_ptr()
    new = torch.randn(4, 3)
    recorded.load([("projection.weight", new)])
    assert torch.equal(attention.W_UK_T, new[:2].t())
    assert attention.W_UK_T.data_ptr() == address
    assert attention.kv_b_proj.weight.numel() == (0 if drops else 12)
    assert bool(recorded.shadows) is drops


# -------------------------------------------------------------------------------------------------------- experts
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


class Fused(nn.Module):
    """Two experts of gate and up, and a loader for ``<expert>.<gate|up>``."""

    def __init__(self) -> None:
        super().__init__()
        self.w13_weight = nn.Parameter(torch.randn(2, 4, 3), requires_grad=False)

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            expert, part = name.split(".")
            start = {"gate": 0, "up": 2, "all": 0}[part]
            self.w13_weight.data[int(expert), start : start + len(tensor)].copy_(tensor)

    def exchange_halves(self) -> None:
        self.w13_weight = nn.Parameter(self.w13_weight.data.roll(2, dims=1), requires_grad=False)


def test_experts_whose_halves_a_kernel_wants_exchanged_are_written_there() -> None:
    model = Fused()
    names = [f"{expert}.{part}" for expert in range(2) for part in ("gate", "up")]
    recording = record(model, CONFIG, [Checkpoint(name, (2, 3), F32) for name in names])
    model.exchange_halves()
    recording.finish()
    keep(recording)
    new = {name: torch.randn(2, 3) for name in names}
    recorded_layout(model, VLLM_CONFIG).load(new.items())
    expected = Fused()
    expected.load_weights(iter(new.items()))
    expected.exchange_halves()
    assert torch.equal(model.w13_weight, expected.w13_weight)


def test_exchanged_halves_of_what_the_checkpoint_keeps_whole_are_refused() -> None:
    model = Fused()
    recording = record(model, CONFIG, [Checkpoint(f"{expert}.all", (4, 3), F32) for expert in range(2)])
    model.exchange_halves()
    with pytest.raises(RecordError, match="w13_weight"):
        recording.finish()


# --------------------------------------------------------------------------------------------------- the public door
def test_a_model_loaded_without_the_hook_is_refused() -> None:
    with pytest.raises(RecordError, match="Model was loaded without the recorder"):
        recorded_layout(Model(a=Layer()), VLLM_CONFIG)


def test_a_draft_model_in_the_process_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(a=Layer())
    loaded(model, checkpoint(a=(4, 3)))
    draft = nn.Linear(2, 2)
    keep_draft(draft)
    with pytest.raises(RecordError, match="speculative decoding with Linear"):
        recorded_layout(model, VLLM_CONFIG)
    recorder._drafts.discard(draft)
    recorded_layout(model, VLLM_CONFIG)
