"""A recording of an engine that exists only here: nothing of it may depend on an engine that we know."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from weightsync.agents.recorder.blueprint import ParameterPlace
from weightsync.agents.recorder.contents import Checkpoint, storage_key
from weightsync.agents.recorder.interface import KernelLayout, Shadow
from weightsync.agents.recorder.recording import Finished, Recording
from weightsync.agents.recorder.rows import build_rows, fill
from weightsync.agents.recorder.trace import RecordError
from weightsync.agents.recorder.traced import trace_loader
from weightsync.orchestrator.protocol.layout import Derived

F32 = torch.float32
CHECKPOINT = [Checkpoint("weight", (4, 3), F32)]


class Model(nn.Module):
    """One weight, and what the engine derives from it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3), requires_grad=False)
        self.register_buffer("scratch", torch.zeros(2))
        self.total = torch.zeros(())

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if name == "weight":
                self.weight.data.copy_(tensor)


@dataclass
class Sums:
    """``total`` is the sum of ``weight``."""

    model: Model

    def refreshes(self, shadows: Sequence[Shadow]) -> list[Callable[[], None]]:
        weight = shadows[0].tensor if shadows else self.model.weight
        return [lambda: self.model.total.copy_(weight.sum())]  # type: ignore[list-item]

    def appeared(self, accounted: set[int]) -> tuple[list[Derived], list[str]]:
        if self.model.weight.untyped_storage().data_ptr() not in accounted:
            return [], ["weight: unaccounted"]
        return [Derived("total", "sum")], []

    def refreshed(self) -> set[int]:
        return {storage_key(self.model.total)}


@dataclass(frozen=True)
class Engine:
    """An engine that turns weights upside down, or drops them."""

    drops: bool = False
    kernel_layouts: tuple[KernelLayout, ...] = ()
    fed: list[str] = field(default_factory=list)

    def as_fed(self, checkpoint: Sequence[Checkpoint], dtypes: Mapping[str, torch.dtype]) -> list[Checkpoint]:
        assert dtypes == {"weight": F32, "scratch": F32}
        self.fed.extend(entry.name for entry in checkpoint)
        return list(checkpoint)

    def reason_to_stay(self, parameter: ParameterPlace, whole: bool) -> str:
        return "scratch memory" if parameter.name == "scratch" and whole else ""

    def may_exchange_halves(self, parameter: ParameterPlace) -> bool:
        return False

    def may_be_dropped(self, model: nn.Module) -> set[int]:
        return {id(model)} if self.drops else set()

    def derivations(self, model: nn.Module) -> Sums:
        assert isinstance(model, Model)
        return Sums(model)


UPSIDE_DOWN = KernelLayout("upside-down", lambda p: p.attribute == "weight", lambda p, loaded: loaded.flip(0))


def write(recording: Recording, new: torch.Tensor) -> None:
    """Fill the targets with ``new`` and bring everything else up to date, as an agent does after a round."""
    assert recording.finished is not None
    fill(build_rows(recording.finished.targets), [("weight", new)])
    for refresh in recording.finished.refreshes:
        refresh()


def test_a_weight_that_stays_as_it_was_loaded_is_the_target_itself() -> None:
    model, engine = Model(), Engine()
    recording = Recording(trace_loader(model, [*CHECKPOINT, Checkpoint("other", (9,), F32)], engine))
    with recording.processing:
        pass
    recording.finish()
    assert engine.fed == ["weight", "other"]
    assert recording.unused == ["other"]
    assert [(entry.name, entry.bytes) for entry in recording.unrecorded] == [("scratch", 8)]
    new = torch.randn(4, 3)
    write(recording, new)
    assert torch.equal(model.weight, new)
    assert model.total == new.sum()


def test_a_kernel_layout_is_made_again_from_a_shadow() -> None:
    model = Model()
    recording = Recording(trace_loader(model, CHECKPOINT, Engine(kernel_layouts=(UPSIDE_DOWN,))))
    with recording.processing:
        live = model.weight = nn.Parameter(model.weight.data.flip(0), requires_grad=False)
    recording.finish()
    assert recording.finished is not None
    assert recording.finished.shadows == ["weight"]
    assert recording.finished.derived == [Derived("weight", "upside-down"), Derived("total", "sum")]
    new = torch.randn(4, 3)
    write(recording, new)
    assert torch.equal(live, new.flip(0))


def test_a_kernel_layout_that_does_not_give_the_live_bytes_is_refused() -> None:
    model = Model()
    recording = Recording(trace_loader(model, CHECKPOINT, Engine(kernel_layouts=(UPSIDE_DOWN,))))
    with recording.processing:
        model.weight = nn.Parameter(model.weight.data.flip(1), requires_grad=False)
    with pytest.raises(RecordError, match=r"weight: \(4, 3\) torch.float32 became \(4, 3\)"):
        recording.finish()


def test_a_dropped_weight_lives_on_in_the_copy_that_derivations_read() -> None:
    model = Model()
    recording = Recording(trace_loader(model, CHECKPOINT, Engine(drops=True)))
    with recording.processing:
        model.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    recording.finish()
    assert recording.finished is not None
    assert recording.finished.shadows == ["weight"]
    new = torch.randn(4, 3)
    write(recording, new)
    assert model.total == new.sum()


def test_what_derivations_do_not_know_is_refused() -> None:
    class Forgetful(Sums):
        def appeared(self, accounted: set[int]) -> tuple[list[Derived], list[str]]:
            return [], ["total: () torch.float32 appeared"]

    class Other(Engine):
        def derivations(self, model: nn.Module) -> Sums:
            assert isinstance(model, Model)
            return Forgetful(model)

    recording = Recording(trace_loader(Model(), CHECKPOINT, Other()))
    with recording.processing:
        pass
    with pytest.raises(RecordError, match=r"not known: total: \(\) torch.float32 appeared"):
        recording.finish()
    assert recording.finished is None


def test_weights_that_a_loader_computes_are_refused() -> None:
    model = Model()
    model.load_weights = lambda weights: [  # type: ignore[method-assign, assignment]
        model.weight.data.copy_(tensor.cumsum(0)) for _, tensor in weights
    ]
    with pytest.raises(RecordError, match=r"cannot be written: weight: aten\.cumsum\.\w+ of weight"):
        Recording(trace_loader(model, CHECKPOINT, Engine()))


def processed(process: Callable[[Model], object], values: torch.Tensor) -> Recording:
    model = Model()
    model.weight.data.copy_(values)
    recording = Recording(trace_loader(model, CHECKPOINT, Engine()))
    with recording.processing:
        model.kept = process(model)  # type: ignore[assignment]
    recording.finish()
    return recording


def moved(model: Model) -> None:
    model.weight = nn.Parameter(model.weight.data.flip(0), requires_grad=False)


def test_equal_values_that_processing_moves_prove_nothing_and_are_refused() -> None:
    with pytest.raises(RecordError, match=r"weight: processing moved it, and its values cannot show where to \(4 of 4"):
        processed(moved, torch.ones(4, 3))
    with pytest.raises(RecordError, match="weight"):
        processed(lambda model: model.weight.data.copy_(model.weight.data.flip(0)), torch.zeros(4, 3))


def test_equal_values_that_processing_leaves_alone_are_believed() -> None:
    assert len(processed(lambda model: None, torch.ones(4, 3)).finished.targets) == 1  # type: ignore[union-attr]


def test_a_packed_copy_in_a_closure_is_refused_by_the_weight_s_name() -> None:
    def packs(model: Model) -> Callable[[torch.Tensor], torch.Tensor]:
        packed = model.weight.data.t().contiguous()
        return lambda x: x @ packed

    with pytest.raises(RecordError, match=r"weight: a result of aten\.\w+\.\w+ is kept"):
        processed(packs, torch.randn(4, 3))


def test_weights_that_were_processed_unwatched_are_refused() -> None:
    recording = Recording(trace_loader(Model(), CHECKPOINT, Engine()))
    with pytest.raises(RecordError, match="without being watched"):
        recording.finish()


def other_parameter(model: Model) -> None:
    model.weight = nn.Parameter(torch.randn(4, 3), requires_grad=False)


def other_data(model: Model) -> None:
    model.weight.data = torch.randn(4, 3)


def plain_attribute(model: Model) -> None:
    del model._parameters["weight"]
    model.__dict__["weight"] = torch.randn(4, 3)


def plain_attribute_over_it(model: Model) -> None:
    model.__dict__["weight"] = torch.randn(4, 3)


def gone(model: Model) -> None:
    del model.weight


@pytest.mark.parametrize("change", [other_parameter, other_data, plain_attribute, plain_attribute_over_it, gone])
def test_however_a_parameter_gets_other_memory_it_is_told(change: Callable[[Model], None]) -> None:
    recording = processed(lambda model: None, torch.randn(4, 3))
    assert recording.finished is not None
    change(recording.model)
    assert recording.finished.replaced() == ["weight"]


def same_memory(model: Model) -> None:
    model.weight = nn.Parameter(model.weight.data[1:], requires_grad=False)


def moved_storage(model: Model) -> None:
    """As into pages: what all views of it follow."""
    storage = model.weight.untyped_storage()
    storage.resize_(2 * storage.nbytes())


@pytest.mark.parametrize("change", [same_memory, moved_storage])
def test_a_parameter_with_the_memory_that_was_written_is_none_of_them(change: Callable[[Model], None]) -> None:
    recording = processed(lambda model: None, torch.randn(4, 3))
    assert recording.finished is not None
    change(recording.model)
    assert recording.finished.replaced() == []


def left_as_loaded(model: Model) -> Finished:
    """What a recording of ``model`` comes to that processing leaves alone."""
    recording = Recording(trace_loader(model, CHECKPOINT, Engine()))
    with recording.processing:
        pass
    recording.finish()
    assert recording.finished is not None
    return recording.finished


def test_in_front_of_a_switch_no_parameter_is_asked_for_by_the_detours_of_its_module() -> None:
    class Asked(Model):
        asked = 0

        def __getattr__(self, name: str) -> object:
            Asked.asked += name == "weight"
            return super().__getattr__(name)

    model = Asked()
    finished = left_as_loaded(model)
    before = Asked.asked
    assert finished.replaced() == []
    assert Asked.asked == before


def test_nor_by_those_of_its_class() -> None:
    class Engines(nn.Parameter):
        asked = 0

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Engines.asked += 1
            return super().__torch_function__(func, types, args, kwargs or {})

    model = Model()
    model.weight = Engines(model.weight.data, requires_grad=False)
    finished = left_as_loaded(model)
    before = Engines.asked
    assert before
    assert finished.replaced() == []
    assert Engines.asked == before
    model.weight.data = torch.randn(4, 3)
    assert finished.replaced() == ["weight"]


def test_a_kernel_layout_that_is_not_what_its_shadow_makes_is_stale() -> None:
    model = Model()
    recording = Recording(trace_loader(model, CHECKPOINT, Engine(kernel_layouts=(UPSIDE_DOWN,))))
    with recording.processing:
        model.weight = nn.Parameter(model.weight.data.flip(0), requires_grad=False)
    recording.finish()
    assert recording.finished is not None
    assert recording.finished.stale() == []
    model.weight.data[0, 0] += 1
    assert recording.finished.stale() == ["weight"]
    assert recording.finished.replaced() == [], "what it is made of may be on its way, and its memory is where it was"
    write(recording, torch.randn(4, 3))
    assert recording.finished.stale() == []
    model.weight = nn.Parameter(model.weight.data.clone(), requires_grad=False)
    assert recording.finished.replaced() == ["weight"]
