"""The switch between two steps of an engine core, on fakes; tests/e2e/test_shadow.py has the real thing."""

import sys
from queue import Queue
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from engine_cores import DPEngineCore, EngineCore, PauseState, config, servable
from weightsync.agents.inference.calls import InfoError
from weightsync.agents.vllm import boundary, kv, workers


def order(**changes: Any) -> dict[str, Any]:
    """As JSON brings it."""
    return {
        "round": [3, 9],
        "version": [7, 40],
        "incarnations": {"0": 100, "1": 101},
        "cache": "keep",
        "deadline_seconds": 5.0,
        **changes,
    }


def running(core_class: type[EngineCore], ranks: int = 2) -> Any:
    core: Any = core_class(config(), ranks)
    servable(core)
    core.resume_scheduler()
    core.versions = []
    core.set_weight_version = core.versions.append
    return core


def calls(core: Any) -> list[list[str]]:
    return [worker.calls for worker in core.model_executor.workers]


def test_a_running_engine_switches_and_runs_on(core_class: type[EngineCore]) -> None:
    core = running(core_class)
    (answer,) = core.collective_rpc(boundary.SWITCH, kwargs=order())
    assert not answer["paused"]
    assert 0.0 < answer["seconds"] < 5.0
    assert calls(core) == [["switch"], ["switch"]]
    assert core.versions == ["40"], "before the next token is told to anybody"


def test_nothing_is_scheduled_while_workers_switch(core_class: type[EngineCore]) -> None:
    core = running(core_class)
    seen: list[PauseState] = []
    core.model_executor.workers[1].agent.switch = lambda order: seen.append(core.scheduler.pause_state)
    core.collective_rpc(boundary.SWITCH, kwargs=order())
    assert seen == [PauseState.PAUSED_ALL]
    assert core.scheduler.pause_state is PauseState.UNPAUSED


@pytest.mark.parametrize("mode", ["keep", "wait"])
def test_a_paused_engine_stays_as_it_was_paused(core_class: type[EngineCore], mode: str) -> None:
    core = running(core_class)
    core.pause_scheduler(mode)
    before = core.scheduler.pause_state
    (answer,) = core.collective_rpc(boundary.SWITCH, kwargs=order())
    assert answer["paused"]
    assert core.scheduler.pause_state is before


def test_asked_again_it_gives_the_same_answer_and_does_nothing(core_class: type[EngineCore]) -> None:
    core = running(core_class)
    first = core.collective_rpc(boundary.SWITCH, kwargs=order())
    core.model_executor.workers[0].unfit = "nothing waits in standby"
    assert core.collective_rpc(boundary.SWITCH, kwargs=order()) == first
    core.pause_scheduler("keep")
    assert core.collective_rpc(boundary.SWITCH, kwargs=order()) == [{**first[0], "paused": True}]
    assert calls(core) == [["switch"], ["switch"]]
    with pytest.raises(boundary.SwitchRefused, match="nothing waits in standby"):
        core.collective_rpc(boundary.SWITCH, kwargs=order(round=[3, 10]))


@pytest.mark.parametrize("overtaken", [[3, 8], [2, 12]], ids=["an earlier round", "an earlier daemon's"])
def test_an_order_that_was_overtaken_brings_nothing_back(core_class: type[EngineCore], overtaken: list[int]) -> None:
    core = running(core_class)
    core.collective_rpc(boundary.SWITCH, kwargs=order())
    with pytest.raises(boundary.SwitchRefused, match=r"is over: .*step 40"):
        core.collective_rpc(boundary.SWITCH, kwargs=order(round=overtaken, version=[7, 39]))
    assert calls(core) == [["switch"], ["switch"]]


def test_another_version_in_the_same_round_is_another_switch(core_class: type[EngineCore]) -> None:
    """A daemon that makes up for what it missed names its newest round, whatever the version."""
    core = running(core_class)
    core.collective_rpc(boundary.SWITCH, kwargs=order())
    core.collective_rpc(boundary.SWITCH, kwargs=order(version=[7, 39]))
    assert calls(core) == [["switch", "switch"], ["switch", "switch"]]


def test_no_worker_switches_unless_all_can(core_class: type[EngineCore]) -> None:
    core = running(core_class)
    core.model_executor.workers[1].unfit = "nothing waits in standby"
    with pytest.raises(boundary.SwitchRefused, match=r"step 40 \(generation 7\) is not served: rank 1: nothing waits"):
        core.collective_rpc(boundary.SWITCH, kwargs=order())
    assert calls(core) == [[], []]
    assert core.versions == []
    assert core.scheduler.pause_state is PauseState.UNPAUSED


def test_what_takes_long_is_asked_beside_the_batches_in_flight(core_class: type[EngineCore]) -> None:
    """And an engine that cannot switch for such a reason does not stand still for them."""
    core = running(core_class)
    core.batch_queue.append("batch")
    story: list[str] = []

    def asked(order: Any) -> str:
        story.append(f"ready with {len(core.batch_queue)} under way")
        return "w: it lies elsewhere" if len(story) == 1 else ""

    core.model_executor.workers[1].agent.ready = asked
    core._process_engine_step = lambda: story.append(core.batch_queue.pop())
    with pytest.raises(boundary.SwitchRefused, match=r"step 40 \(generation 7\) is not served: rank 1: w: it lies"):
        core.collective_rpc(boundary.SWITCH, kwargs=order())
    assert core.scheduler.pause_state is PauseState.UNPAUSED
    core.collective_rpc(boundary.SWITCH, kwargs=order())
    assert story == ["ready with 1 under way", "ready with 1 under way", "batch"]
    assert calls(core) == [["switch"], ["switch"]]


def test_another_process_than_the_one_that_is_meant_switches_nobody(core_class: type[EngineCore]) -> None:
    core = running(core_class)
    with pytest.raises(boundary.SwitchRefused, match="rank 1: it is incarnation 101, and the call means 7"):
        core.collective_rpc(boundary.SWITCH, kwargs=order(incarnations={"0": 100, "1": 7}))
    assert calls(core) == [[], []]


def test_a_worker_that_fails_leaves_the_core_paused_and_in_step(core_class: type[EngineCore]) -> None:
    core = running(core_class)
    core.model_executor.workers[0].failure = "no memory"
    with pytest.raises(workers.WorkersFailed, match=r"switch failed in 1 of 2 workers: rank 0: .*no memory"):
        core.collective_rpc(boundary.SWITCH, kwargs=order())
    assert core.scheduler.pause_state is PauseState.PAUSED_ALL
    assert core.versions == []
    assert core.model_executor.queues == [[], []]
    core.model_executor.workers[0].failure = ""
    core.collective_rpc(boundary.SWITCH, kwargs=order())  # it had not taken place, so it is not remembered
    assert calls(core) == [["switch"] * 2] * 2


def test_batches_in_flight_end_before_any_worker_is_asked(core_class: type[EngineCore]) -> None:
    core = running(core_class)
    core.batch_queue += ["newer", "older"]
    states: list[PauseState] = []

    def step() -> bool:
        states.append(core.scheduler.pause_state)
        assert calls(core) == [[], []]
        core.batch_queue.pop()
        return False

    core._process_engine_step = step
    core.collective_rpc(boundary.SWITCH, kwargs=order())
    assert states == [PauseState.PAUSED_ALL] * 2, "no batch joins them"
    assert calls(core) == [["switch"], ["switch"]]


def test_a_step_that_fails_ends_the_core_as_its_own_loop_would(
    core_class: type[EngineCore], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ModuleType("vllm.v1.engine")
    engine.EngineCoreRequestType = SimpleNamespace(EXECUTOR_FAILED="failed")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, engine.__name__, engine)
    core = running(core_class)
    core.batch_queue.append("batch")
    core.weightsync_lease, core.input_queue = None, Queue()

    def step() -> None:
        raise RuntimeError("a worker died")

    core._process_engine_step = step
    with pytest.raises(RuntimeError, match="a worker died"):
        core.collective_rpc(boundary.SWITCH, kwargs=order())
    assert core.input_queue.get_nowait() == ("failed", b"")
    assert calls(core) == [[], []]


def test_batches_that_do_not_end_change_nothing(core_class: type[EngineCore]) -> None:
    core = running(core_class)
    core.batch_queue.append("batch")
    with pytest.raises(boundary.SwitchRefused, match="without a loop"):
        core.collective_rpc(boundary.SWITCH, kwargs=order())
    core._process_engine_step = lambda: False
    with pytest.raises(boundary.SwitchRefused, match="still in flight after 1024 steps"):
        core.collective_rpc(boundary.SWITCH, kwargs=order())
    assert calls(core) == [[], []]
    assert core.scheduler.pause_state is PauseState.UNPAUSED


def test_a_cache_that_cannot_be_emptied_leaves_the_old_weights_in_service(
    core_class: type[EngineCore], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = running(core_class)

    def stuck(core: Any, cache: str) -> None:
        raise kv.CacheStuck(f"cache={cache}: no")

    monkeypatch.setattr(kv, "forget", stuck)
    with pytest.raises(kv.CacheStuck, match="cache=recompute: no"):
        core.collective_rpc(boundary.SWITCH, kwargs=order(cache="recompute"))
    assert calls(core) == [[], []]
    assert core.scheduler.pause_state is PauseState.UNPAUSED


def test_an_older_vllm_is_told_no_version(core_class: type[EngineCore]) -> None:
    core = running(core_class)
    del core.set_weight_version
    core.collective_rpc(boundary.SWITCH, kwargs=order())
    assert calls(core) == [["switch"], ["switch"]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"round": [3]}, "round"),
        ({"version": "40"}, "version"),
        ({"incarnations": {}}, "incarnations"),
        ({"incarnations": {"zero": 1}}, "incarnations"),
        ({"cache": "burn"}, "cache"),
        ({"deadline_seconds": 0}, "deadline_seconds"),
        ({"mode": "flip"}, "mode"),
    ],
)
def test_an_order_that_is_none_names_the_field(
    core_class: type[EngineCore], change: dict[str, Any], words: str
) -> None:
    core = running(core_class)
    with pytest.raises(InfoError, match=f"switch: .*{words}"):
        core.collective_rpc(boundary.SWITCH, kwargs=order(**change))
    assert calls(core) == [[], []]


def test_cores_that_step_together_must_stand_still_first(core_class: type[EngineCore]) -> None:
    core: Any = type("DPEngineCoreProc", (DPEngineCore, core_class), {})(config(), 1)
    servable(core)
    core.engines_running = True
    with pytest.raises(boundary.SwitchRefused, match="pause"):
        core.collective_rpc(boundary.SWITCH, kwargs=order())
    core.engines_running = False
    assert core.collective_rpc(boundary.SWITCH, kwargs=order())[0]["paused"]
    core.scheduler.set_pause_state(PauseState.UNPAUSED)
    with pytest.raises(boundary.SwitchRefused, match="pause"):
        core.collective_rpc(boundary.SWITCH, kwargs=order(round=[3, 10]))
