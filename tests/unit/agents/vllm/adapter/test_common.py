"""The adapters to both shapes of vLLM's engine class, on fakes of that class."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dram_pages import PAGE, DramPages
from engine_places import place, token_file
from peft_files import adapter as peft_adapter
from weightsync.agents.inference import calls
from weightsync.agents.memory.errors import MemoryPlacementError
from weightsync.agents.memory.pages.paged import PagedMemory
from weightsync.agents.memory.pages.ranges import PageRange
from weightsync.agents.recorder.settled import Unrecorded
from weightsync.agents.vllm import gate, guard, hold, paging
from weightsync.agents.vllm.adapter import choose as engine_adapter
from weightsync.agents.vllm.adapter import common as engine
from weightsync.agents.vllm.backend import ADAPTER_VARIABLE
from weightsync.agents.vllm.lora.declared import AdapterRefused
from weightsync.agents.vllm.ranks import EngineRanks
from weightsync.agents.vllm.recorder import load_hook
from weightsync.orchestrator.protocol.landing import arena_bytes
from weightsync.orchestrator.protocol.layout import Layout, LeftOut, Region, Tensor, row

INIT = {
    "hub_url": "ws://127.0.0.1:9000/agents",
    "run_id": "run",
    "engine": "engine-0",
    "world": 2,
}
UPDATE = {
    "token": "1.7",
    "round_epoch": 1,
    "round_number": 7,
    "generation": 9,
    "step": 100,
    "deadline_seconds": 60.0,
}


@pytest.fixture(autouse=True)
def _in_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in place(token_file(tmp_path), "ws://127.0.0.1:9000/agents", "run", "engine-0").items():
        monkeypatch.setenv(name, value)


# ----------------------------------------------------------------------------------------------------------- adapters
class LifecycleBase:
    """The base class of vLLM versions whose engine owns the update."""

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
        self.device, self.model = device, model


class CallbackBase:
    """The base class of vLLM versions whose worker owns the update."""

    def __init__(self, config: Any, parallel_config: Any, model: Any) -> None:
        self.model = model


class Agent:
    may_run = True
    status = None

    def __init__(self, story: list[Any]) -> None:
        self.story = story

    def begin(self, info: Any) -> None:
        self.story.append(info)

    def update(self, info: Any) -> None:
        self.story.append(info)
        if info.step == 13:
            raise RuntimeError("the round failed")

    def close(self) -> None:
        self.story.append("closed")


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def load_weights(self, weights: Any) -> None: ...


@pytest.fixture
def story(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What an adapter does, in order, with its surroundings replaced by doubles."""
    story: list[Any] = []
    monkeypatch.setattr(guard, "require", lambda: story.append("guard required"))
    monkeypatch.setattr(hold, "require", lambda: story.append("hold required"))
    monkeypatch.setattr(gate, "install", lambda: story.append("gate installed"))
    monkeypatch.setattr(engine, "make_agent", lambda ranks, *_, **__: story.append(ranks.rank) or Agent(story))
    monkeypatch.setattr(calls, "synchronize", lambda device: story.append(f"synchronised {device}"))
    return story


@pytest.fixture
def pretend_base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Puts a class in the place of vLLM's base; adapters made from it are forgotten afterwards."""
    adapters = [module for module, _ in engine_adapter.SHAPES.values()]

    def pretend(base: type[Any]) -> type[Any]:
        for name in ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        module = ModuleType("vllm.distributed.weight_transfer.base")
        module.WeightTransferEngine = base  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        for adapter in adapters:
            monkeypatch.delitem(sys.modules, adapter, raising=False)
        found: type[Any] = importlib.import_module(engine_adapter.__name__).WeightsyncEngine
        return found

    yield pretend
    for adapter in adapters:
        sys.modules.pop(adapter, None)


PARALLEL = SimpleNamespace(
    rank=1,
    world_size=2,
    tensor_parallel_size=2,
    pipeline_parallel_size=1,
    data_parallel_size=1,
    data_parallel_index=0,
)


@pytest.mark.usefixtures("story")
def test_either_shape_knows_what_the_model_was_loaded_with(pretend_base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantised tensors, layers that need a forward context, drafters and adapters are known by it alone."""
    told: list[Any] = []
    monkeypatch.setattr(engine, "make_agent", lambda *given, lone_experts: told.append((given[3], lone_experts)))
    settings, model = SimpleNamespace(parallel_config=PARALLEL), Model()
    pretend_base(LifecycleBase)(None, settings, torch.device("cpu"), model)
    monkeypatch.setitem(load_hook._loaded_with, model, settings)
    pretend_base(CallbackBase)(None, PARALLEL, model)
    assert [(known is settings, lone_experts) for known, lone_experts in told] == [(True, True), (True, False)]


@pytest.mark.usefixtures("story")
@pytest.mark.parametrize(("size", "boundary"), [(1, True), (2, False)])
def test_weights_change_between_two_steps_unless_ranks_of_several_cores_meet(
    monkeypatch: pytest.MonkeyPatch, size: int, boundary: bool
) -> None:
    """Independent replicas of a dense model say 1, whichever they are."""
    told: list[Any] = []
    monkeypatch.setattr(engine, "make_agent", lambda *given, lone_experts: told.append(given[-1]))
    parallel = SimpleNamespace(**vars(PARALLEL) | {"data_parallel_size": size, "data_parallel_index": size - 1})
    engine.equip(Model(), torch.device("cpu"), parallel, None)
    assert told == [boundary]


def test_the_lifecycle_shape(pretend_base: Any, story: list[Any]) -> None:
    adapter = pretend_base(LifecycleBase)(None, SimpleNamespace(parallel_config=PARALLEL), torch.device("cpu"), Model())
    assert adapter.supports_draft_weight_update is False
    adapter.init_transfer_engine(adapter.parse_init_info(INIT))
    adapter.start_weight_update()
    adapter.update_weights(UPDATE)
    adapter.finish_weight_update()
    adapter.shutdown()
    update = calls.parse_update_info(UPDATE, calls.UpdateInfo)
    assert story == [
        "guard required",
        "hold required",
        "gate installed",
        1,
        calls.parse_init_info(INIT),
        "synchronised cpu",
        update,
        "closed",
    ]


def test_the_callback_shape(pretend_base: Any, story: list[Any]) -> None:
    adapter = pretend_base(CallbackBase)(None, PARALLEL, Model())
    update = adapter.parse_update_info(UPDATE)
    assert update.update_kind == "dense"
    adapter.init_transfer_engine(adapter.parse_init_info(INIT))
    adapter.receive_weights(update, lambda weights: None)
    adapter.shutdown()
    assert story[3:] == [1, calls.parse_init_info(INIT), "synchronised cpu", update, "closed"]


def test_the_callback_shape_refuses_checkpoint_format(pretend_base: Any, story: list[Any]) -> None:
    model = Model()
    adapter = pretend_base(CallbackBase)(None, PARALLEL, model)
    with pytest.raises(calls.InfoError, match="is_checkpoint_format=false"):
        adapter.receive_weights(adapter.parse_update_info(UPDATE), load_weights=model.load_weights)
    assert len(story) == 4


def test_the_callback_shape_sends_trainers_to_ours(pretend_base: Any, story: list[Any]) -> None:
    with pytest.raises(NotImplementedError, match="TrainerAgent"):
        pretend_base(CallbackBase).trainer_send_weights(iter(()), {})


@pytest.mark.parametrize("base", [LifecycleBase, CallbackBase])
def test_a_failed_round_is_the_callers_to_see(pretend_base: Any, story: list[Any], base: type[Any]) -> None:
    kind = pretend_base(base)
    if base is LifecycleBase:
        adapter = kind(None, SimpleNamespace(parallel_config=PARALLEL), torch.device("cpu"), Model())
        with pytest.raises(RuntimeError, match="the round failed"):
            adapter.update_weights({**UPDATE, "step": 13})
    else:
        adapter = kind(None, PARALLEL, Model())
        with pytest.raises(RuntimeError, match="the round failed"):
            adapter.receive_weights(adapter.parse_update_info({**UPDATE, "step": 13}), lambda weights: None)


def test_an_unheld_vllm_makes_no_engine(pretend_base: Any, story: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise hold.HoldUnavailable("no hook")

    monkeypatch.setattr(hold, "require", refuse)
    with pytest.raises(hold.HoldUnavailable):
        pretend_base(CallbackBase)(None, PARALLEL, Model())
    assert story == ["guard required"]


def test_an_unknown_shape_is_refused_by_name(pretend_base: Any) -> None:
    class Unknown:
        def __init__(self, settings: Any) -> None: ...

    with pytest.raises(engine_adapter.UnsupportedVllm, match="Unknown is made from"):
        pretend_base(Unknown)


def test_the_module_has_no_other_lazy_names() -> None:
    with pytest.raises(AttributeError, match="Nothing"):
        _ = engine_adapter.Nothing


def test_a_vllm_model_is_what_was_recorded_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is recorded anew when its experts are somewhere else, not before; what was not probed stays so."""
    story: list[Any] = []
    region = torch.zeros(8, dtype=torch.uint8)
    left_out = (LeftOut("unwritten", "a buffer", ("cache",), 1), LeftOut("unprobed", "no way", ("conv",), 1))

    def record(module: torch.nn.Module, vllm_config: Any) -> Any:
        story.append((module, vllm_config))
        return SimpleNamespace(
            layout=Layout((), (), b"", expert_map=f"layout {len(story)}"),
            tensors=[region],
            check=lambda: story.append("checked"),
            refresh=lambda: story.append("refreshed"),
            load=story.append,
            unrecorded=(Unrecorded("cache", 8, "a buffer"),),
            unused=(),
        )

    monkeypatch.setattr(engine, "recorded_layout", record)
    monkeypatch.setattr(engine, "targets_of", lambda module: [])
    monkeypatch.setattr(engine.probe, "require", lambda *_: {"conv": "no way"})
    monkeypatch.setattr(engine, "expert_map", lambda module: "map of 5")
    module = Model()
    model = engine.VllmModel.of(module, "config")
    assert model.tensors == [region]
    assert (model.standby_tensors, model.no_flip) == (
        (),
        "pages of host memory are exchanged with WEIGHTSYNC_MODE=flip alone",
    )
    assert model.layout == Layout((), (), b"", expert_map="layout 1", left_out=left_out)
    model.check()
    model.refresh()
    model.load([])
    assert story == [(module, "config"), "checked", "refreshed", []]
    assert model.rebalanced("map of 5") is None
    fresh = model.rebalanced("map of 3")
    assert fresh is not None
    assert fresh.layout == Layout((), (), b"", expert_map="layout 5", left_out=left_out), "after four events so far"
    assert story[4:] == [(module, "config")]


@pytest.mark.parametrize(("eplb", "announced"), [(True, "here"), (False, "")])
def test_where_nobody_moves_experts_the_layout_has_no_map_to_follow(
    eplb: bool, announced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No switch waits for the maps, which are on the device, and what is served may be lent."""
    config: Any = SimpleNamespace(parallel_config=SimpleNamespace(enable_eplb=eplb))
    recorded: Any = SimpleNamespace(
        layout=Layout((), (), b"", expert_map="here"), tensors=[], unrecorded=(), unused=(), refresh=lambda: None
    )
    monkeypatch.setattr(engine, "recorded_layout", lambda *_: recorded)
    monkeypatch.setattr(engine, "targets_of", lambda module: [])
    monkeypatch.setattr(engine.probe, "require", lambda *_: {})
    assert engine.VllmModel.of(Model(), config).layout.expert_map == announced


def test_weights_in_pages_are_looked_up_anew_and_flipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's memory moves while its agent is made; what is announced is where it lies then."""
    memory = DramPages()
    live, standby = PageRange(memory, PAGE), PageRange(memory, PAGE)
    for value, pages in enumerate((live, standby)):
        pages.fill(PAGE)
        memory.tensor(pages.base, PAGE).fill_(value)
    before, served = torch.zeros(8, dtype=torch.uint8), memory.tensor(live.base, PAGE)[:8]
    placed: list[Any] = []

    def recorded(*_: Any) -> Any:
        region = Region(live.base, 8) if placed else Region(before.data_ptr(), 8)
        layout = Layout(
            (Tensor("w", "uint8", (8,)),), (region,), bytes(np.array(row(0, 0, 0, (0,), (8,), (1,)), "<i8"))
        )
        refresh = lambda: placed.append("refreshed")  # noqa: E731
        return SimpleNamespace(
            layout=layout, tensors=[served if placed else before], refresh=refresh, unrecorded=(), unused=()
        )

    def place(tensors: Any, needed: int, mode: str, peers: Any) -> paging.Placed:
        placed.append((tensors, needed, mode))
        return paging.Placed(PagedMemory(memory, live, standby))

    monkeypatch.setenv("WEIGHTSYNC_MODE", "flip")
    monkeypatch.setattr(engine, "recorded_layout", recorded)
    monkeypatch.setattr(engine, "expert_map", lambda module: "elsewhere")
    monkeypatch.setattr(engine.paging, "place", place)
    monkeypatch.setattr(engine.probe, "require", lambda *_: {})
    monkeypatch.setattr(engine, "targets_of", lambda model: ())
    model = engine.VllmModel.of(Model(), None)
    [(tensors, needed, mode)] = placed
    assert (tensors[0] is before, needed, mode) == (True, arena_bytes(model.layout), "flip")
    assert model.layout.regions == (Region(live.base, 8),)
    assert [tensor.tolist() for tensor in model.standby_tensors] == [[1] * 8]
    model.flip()
    model.settle()
    assert (served.tolist(), model.standby_tensors[0].tolist()) == ([1] * 8, [0] * 8)
    fresh = model.rebalanced("here")
    assert fresh is not None
    assert fresh.standby_tensors[0].data_ptr() == model.standby_tensors[0].data_ptr()


def test_weights_that_no_writer_can_reach_are_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    region = Region(base=4096, length=8, memory="VRAM", device=0)

    def refuse(regions: Any) -> None:
        assert list(regions) == [region]
        raise MemoryPlacementError("expandable segments")

    monkeypatch.setattr(
        engine,
        "recorded_layout",
        lambda *_: SimpleNamespace(layout=Layout((), (region,), b""), tensors=(torch.zeros(8),)),
    )
    monkeypatch.setattr(engine, "check_reachable", refuse)
    with pytest.raises(MemoryPlacementError, match="expandable segments"):
        engine.make_agent(EngineRanks(0, 1), Model(), torch.device("cpu"), None)


def test_an_adapter_is_served_in_place_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []
    monkeypatch.setattr(engine.hook, "serve", served.append)
    monkeypatch.setenv(ADAPTER_VARIABLE, f"policy={peft_adapter(tmp_path)}")
    with pytest.raises(AdapterRefused, match=r"lora_config\.lora_dtype is None; start the server with --enable-lora"):
        engine.make_agent(EngineRanks(0, 1), Model(), torch.device("cpu"), SimpleNamespace(lora_config=None))
    assert served == []
    lora = SimpleNamespace(lora_config=SimpleNamespace(lora_dtype=torch.float16))
    agent = engine.make_agent(EngineRanks(0, 1), Model(), torch.device("cpu"), lora)
    assert not agent.may_run, "the files that it began with are no committed version"
    (found,) = served
    assert {tensor.dtype for tensor in found.layout.tensors} == {"float16", "float64"}
    assert found.layout.left_out[0].names == ("weight",)
