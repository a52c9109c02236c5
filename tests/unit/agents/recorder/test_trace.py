"""The recording tensors under loaders like vLLM's: what each operation does to where bytes come from."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from weightsync.agents.recorder.blueprint import Blueprint
from weightsync.agents.recorder.boxes import StridedView
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.recorder.settled import Settled, settle
from weightsync.agents.recorder.trace import Landing, OpaqueBytes, RecordError

Weights = Iterator[tuple[str, torch.Tensor]]
BF16, F32 = torch.bfloat16, torch.float32


class Model(nn.Module):
    """One parameter ``w``, one buffer ``b``, and a loader given by the test."""

    def __init__(self, w: torch.Tensor, load: Callable[["Model", str, torch.Tensor], None]) -> None:
        super().__init__()
        self.w = nn.Parameter(w, requires_grad=False)
        self.register_buffer("b", torch.zeros(4))
        self._load = load

    def load_weights(self, weights: Weights) -> None:
        for name, tensor in weights:
            self._load(self, name, tensor)


def record(
    w: torch.Tensor, load: Callable[[Model, str, torch.Tensor], None], *checkpoint: Checkpoint
) -> tuple[Settled, Model]:
    model = Model(w, load)
    blueprint = Blueprint(model)
    settled = settle(blueprint.trace(checkpoint, model.load_weights))
    return settled[0], model


def landing_of(state: Settled) -> Landing:
    (landing,) = state.landings
    return landing


def reproduces(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    load: Callable[[Model, str, torch.Tensor], None],
    *checkpoint: Checkpoint,
) -> Settled:
    """Record, then compare bytes placed by the landings with what the same loader does with real tensors."""
    state, _ = record(torch.zeros(shape, dtype=dtype), load, *checkpoint)
    generator = torch.Generator().manual_seed(7)
    real = {c.name: torch.randn(c.shape, generator=generator).to(c.dtype) for c in checkpoint}
    loaded = Model(torch.zeros(shape, dtype=dtype), load)
    with torch.no_grad():
        loaded.load_weights(iter(real.items()))
    placed = torch.zeros(shape, dtype=dtype)
    for landing in state.landings:
        size = dtype.itemsize
        strides = tuple(s // size for s in landing.place.strides)
        target = torch.as_strided(placed, landing.place.sizes, strides, landing.place.offset // size)
        box = tuple(slice(c, c + n) for c, n in zip(landing.corner, landing.place.sizes, strict=True))
        target.copy_(real[landing.source.name][box])
    assert torch.equal(placed, loaded.w)
    assert not state.opaque
    return state


def test_a_plain_copy_is_one_landing_of_the_whole_tensor() -> None:
    state = reproduces((4, 6), BF16, lambda m, n, t: m.w.data.copy_(t), Checkpoint("x", (4, 6), BF16))
    landing = landing_of(state)
    assert landing.corner == (0, 0)
    assert landing.place == StridedView((4, 6), (12, 2), 0)
    assert landing.dtype == BF16


def test_a_column_parallel_shard_of_a_fused_weight() -> None:
    def load(model: Model, name: str, tensor: torch.Tensor) -> None:
        rank, rows = 1, 4
        shard = {"gate": 0, "up": 1}[name]
        model.w.data.narrow(0, shard * rows, rows).copy_(tensor.narrow(0, rank * rows, rows))

    state = reproduces((8, 3), F32, load, Checkpoint("gate", (8, 3), F32), Checkpoint("up", (8, 3), F32))
    assert [(mark.source.name, mark.corner, mark.place.offset) for mark in state.landings] == [
        ("gate", (4, 0), 0),
        ("up", (4, 0), 48),
    ]


def test_a_row_parallel_shard_keeps_its_column_offset() -> None:
    state = reproduces((4, 3), F32, lambda m, n, t: m.w.data.copy_(t.narrow(1, 3, 3)), Checkpoint("x", (4, 6), F32))
    assert landing_of(state).corner == (0, 3)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.t().contiguous(),
        lambda t: t.t(),
        lambda t: t.t().clone(),
        lambda t: torch.cat([t.t()[:2], t.t()[2:]], dim=0),
        lambda t: torch.stack(list(t.t())),
        lambda t: t.t().to(torch.bfloat16).reshape(-1).view(6, 4),
        lambda t: torch.cat([t.t()[3:], t.t()[:3]], dim=0)[0:6],
        lambda t: t.unsqueeze(0).transpose(1, 2).squeeze(0),
    ],
)  # fmt: skip
def test_elements_are_followed_through_new_tensors(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    reproduces((6, 4), BF16, lambda m, n, t: m.w.data.copy_(change(t)), Checkpoint("x", (4, 6), BF16))


def test_interleaved_heads_become_one_box_per_head() -> None:
    def load(model: Model, name: str, tensor: torch.Tensor) -> None:
        heads = tensor.view(3, 2, 2, 5)  # three groups, each with two parts of two rows
        model.w.data.copy_(heads.transpose(0, 1).reshape(12, 5))

    state = reproduces((12, 5), F32, load, Checkpoint("qk", (12, 5), F32))
    assert len(state.landings) == 6


def test_an_expert_loop_lands_in_the_expert_s_slot() -> None:
    def load(model: Model, name: str, tensor: torch.Tensor) -> None:
        expert = model.w.data[int(name)]
        expert.narrow(0, 0, 2).copy_(tensor)

    state = reproduces((3, 4, 5), F32, load, *(Checkpoint(str(e), (2, 5), F32) for e in range(3)))
    assert [mark.place.offset for mark in state.landings] == [0, 80, 160]


def test_assignment_by_index_is_a_copy() -> None:
    def load(model: Model, name: str, tensor: torch.Tensor) -> None:
        model.w.data[1] = tensor
        model.w.data[2:4, 1] = tensor[:2]

    state, _ = record(torch.zeros(4, 3), load, Checkpoint("x", (3,), F32))
    assert [mark.place for mark in state.landings] == [StridedView((3,), (4,), 12), StridedView((2,), (12,), 28)]


def test_a_cast_travels_in_the_parameter_s_dtype() -> None:
    state = reproduces((4,), F32, lambda m, n, t: m.w.data.copy_(t), Checkpoint("x", (4,), BF16))
    assert landing_of(state).dtype == F32


def test_a_reinterpreted_tensor_travels_in_its_own_dtype() -> None:
    load = lambda m, n, t: m.w.data.copy_(t.view(torch.float8_e4m3fn))  # noqa: E731
    state, _ = record(torch.zeros(4, dtype=torch.float8_e4m3fn), load, Checkpoint("x", (4,), torch.uint8))
    assert landing_of(state).dtype == torch.uint8


def test_two_casts_are_refused_by_name() -> None:
    load = lambda m, n, t: m.w.data.copy_(t.to(BF16))  # noqa: E731
    state, _ = record(torch.zeros(4), load, Checkpoint("x", (4,), torch.float64))
    assert [opaque.reason for opaque in state.opaque] == [
        "x is converted more than once: float64 to bfloat16 to float32"
    ]


@pytest.mark.parametrize(
    "compute", [lambda t: t * t, lambda t: torch.softmax(t, 0), lambda t: t[torch.tensor([1, 0, 2, 3])]]
)  # fmt: skip
def test_values_that_are_computed_are_opaque_and_named(compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
    state, _ = record(torch.zeros(4), lambda m, n, t: m.w.data.copy_(compute(t)), Checkpoint("a.log", (4,), F32))
    assert not state.landings
    assert all("a.log" in opaque.reason for opaque in state.opaque)


def test_a_change_in_place_after_the_copy_spoils_it() -> None:
    def load(model: Model, name: str, tensor: torch.Tensor) -> None:
        model.w.data.copy_(tensor)
        model.w.data.mul_(tensor)

    state, _ = record(torch.zeros(4), load, Checkpoint("x", (4,), F32))
    assert not state.landings
    assert [type(opaque) for opaque in state.opaque] == [OpaqueBytes]


def test_a_later_copy_to_the_same_place_wins() -> None:
    state = reproduces(
        (4,), F32, lambda m, n, t: m.w.data.copy_(t), Checkpoint("x", (4,), F32), Checkpoint("y", (4,), F32)
    )
    assert landing_of(state).source.name == "y"


def test_a_constant_under_a_copy_is_only_padding() -> None:
    def load(model: Model, name: str, tensor: torch.Tensor) -> None:
        model.w.data.fill_(1)
        model.w.data[:3].copy_(tensor)

    state, _ = record(torch.zeros(4), load, Checkpoint("x", (3,), F32))
    assert landing_of(state).place == StridedView((3,), (4,), 0)
    assert state.reached.tolist() == [[0, 12]]


def test_a_constant_over_a_copy_takes_it_away() -> None:
    def load(model: Model, name: str, tensor: torch.Tensor) -> None:
        model.w.data[:3].copy_(tensor)
        model.w.data.zero_()

    state, _ = record(torch.zeros(4), load, Checkpoint("x", (3,), F32))
    assert not state.landings


def test_a_copy_over_a_part_of_another_is_refused() -> None:
    def load(model: Model, name: str, tensor: torch.Tensor) -> None:
        model.w.data.copy_(tensor)
        model.w.data[1:3].copy_(tensor[:2])

    with pytest.raises(RecordError, match="covers a part of x only"):
        record(torch.zeros(4), load, Checkpoint("x", (4,), F32))


def test_padding_is_followed() -> None:
    load = lambda m, n, t: m.w.data.copy_(torch.nn.functional.pad(t, (1, 2, 0, 1)))  # noqa: E731
    state, _ = record(torch.zeros(3, 6), load, Checkpoint("x", (2, 3), F32))
    assert landing_of(state).place == StridedView((2, 3), (24, 4), 4)


def test_a_buffer_of_the_test_s_own_collects_parts() -> None:
    def load(model: Model, name: str, tensor: torch.Tensor) -> None:
        gathered = torch.empty(4, 3)
        gathered[:2].copy_(tensor[2:])
        gathered[2:].copy_(tensor[:2])
        model.w.data.copy_(gathered)

    reproduces((4, 3), F32, load, Checkpoint("x", (4, 3), F32))
