"""The worker's gate, on fakes of vLLM's worker wrapper."""

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from weightsync.agents.vllm import gate


class Agent:
    def __init__(self, may_run: bool = False, torn: bool = False, applied: Any = None, window: Any = None) -> None:
        self.may_run = may_run
        self.held_because, self.incarnation, self.lease = "", 77, (20.0, 7.5)
        self.status = SimpleNamespace(torn=torn, applied=applied, window=window)


class Wrapper:
    """Stands for ``WorkerWrapperBase``: attributes of the worker, and a method that runs a batch."""

    rank = 3

    def __init__(self, agent: Any) -> None:
        if agent is not None:
            self.weight_transfer_engine = SimpleNamespace(agent=agent)
        self.ran: list[Any] = []

    def execute_model(self, batch: Any) -> str:
        self.ran.append(batch)
        return "answer"

    def execute_dummy_batch(self) -> str:
        return "dummy"

    def double(self, number: int) -> int:
        return 2 * number

    def fail(self) -> None:
        raise KeyError("no such thing")


def batch(tokens: int) -> Any:
    return SimpleNamespace(total_num_scheduled_tokens=tokens)


@pytest.fixture
def wrapper_class(monkeypatch: pytest.MonkeyPatch) -> type[Wrapper]:
    """A fresh wrapper class in the place of vLLM's, with the gate installed twice."""
    fresh = type("Fresh", (Wrapper,), {"execute_model": Wrapper.execute_model})
    _pretend_vllm(monkeypatch, fresh)
    gate.install()
    gate.install()
    return fresh


def _pretend_vllm(monkeypatch: pytest.MonkeyPatch, wrapper: type[Any]) -> None:
    for name in ("vllm", "vllm.v1", "vllm.v1.worker"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = ModuleType("vllm.v1.worker.worker_base")
    module.WorkerWrapperBase = wrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "vllm.v1.executor.ray_utils", raising=False)


def test_a_committed_version_runs(wrapper_class: type[Wrapper]) -> None:
    worker = wrapper_class(Agent(may_run=True))
    assert worker.execute_model(batch(7)) == "answer"
    assert len(worker.ran) == 1


@pytest.mark.parametrize(
    ("agent", "reason"),
    [
        (Agent(), "no version has been committed"),
        (Agent(torn=True, applied="step 3"), "torn"),
        (Agent(applied="step 3", window="1.7"), r"a round is changing the weights \(1.7\)"),
        (Agent(applied="step 3"), "not committed"),
        (None, "no weightsync agent"),
    ],
)
def test_scheduled_tokens_are_refused_with_the_reason(
    wrapper_class: type[Wrapper], agent: Agent | None, reason: str
) -> None:
    worker = wrapper_class(agent)
    with pytest.raises(gate.NotServable, match=f"7 tokens.*{reason}"):
        worker.execute_model(batch(7))
    assert worker.ran == []


def test_what_schedules_nothing_passes(wrapper_class: type[Wrapper]) -> None:
    worker = wrapper_class(Agent())
    assert worker.execute_model(batch(0)) == "answer"
    assert worker.execute_dummy_batch() == "dummy"


def test_the_gate_stands_once_however_often_it_is_installed(wrapper_class: type[Wrapper]) -> None:
    assert not hasattr(wrapper_class.execute_model.__wrapped__, "__wrapped__")  # type: ignore[attr-defined]


def test_the_batches_of_rays_own_way_are_gated_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class RayWrapper(Wrapper):
        def execute_model_ray(self, inputs: tuple[Any, ...]) -> str:
            return self.execute_model(inputs[0])

    _pretend_vllm(monkeypatch, type("Fresh", (Wrapper,), {"execute_model": Wrapper.execute_model}))
    ray_utils = ModuleType("vllm.v1.executor.ray_utils")
    ray_utils.RayWorkerWrapper = RayWrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, ray_utils.__name__, ray_utils)
    gate.install()
    assert RayWrapper(Agent(may_run=True)).execute_model_ray((batch(2), None)) == "answer"
    with pytest.raises(gate.NotServable):
        RayWrapper(Agent()).execute_model_ray((batch(2), None))


def test_a_vllm_without_a_place_for_the_gate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_vllm(monkeypatch, type("WorkerWrapperBase", (), {}))
    with pytest.raises(gate.GateUnavailable, match=r"WorkerWrapperBase\.execute_model"):
        gate.install()


def test_reports() -> None:
    assert gate.report(Wrapper(Agent(may_run=True)), "n") == gate.WorkerReport("n", 3, "", False, 77, (20.0, 7.5))
    worker = Wrapper(Agent())
    worker._weight_update_active = True  # type: ignore[attr-defined]
    found = gate.report(worker, "m")
    assert (found.nonce, found.session_open) == ("m", True)
    assert "no version" in found.reason


def test_a_held_worker_refuses_the_resume_and_no_batch_that_is_under_way(wrapper_class: type[Wrapper]) -> None:
    """The engine is paused before it is held; a batch that was refused would end it."""
    agent = Agent(may_run=True)
    agent.held_because = "an operator looks at it"
    worker = wrapper_class(agent)
    assert gate.report(worker, "n").reason == "held: an operator looks at it"
    assert worker.execute_model(batch(7)) == "answer"


def test_a_worker_without_an_agent_says_so() -> None:
    assert gate.report(Wrapper(None), "n") == gate.WorkerReport("n", 3, "this worker has no weightsync agent", False)


def test_replicas_are_told_apart_by_their_rank_in_the_engine() -> None:
    worker = Wrapper(Agent(may_run=True))
    worker.weight_transfer_engine.ranks = SimpleNamespace(rank=7)
    assert gate.report(worker, "n").rank == gate.call(worker, "double", (1,), {}).rank == 7


def test_a_report_that_fails_is_a_reason_and_no_exception() -> None:
    found = gate.report(SimpleNamespace(rank=1, weight_transfer_engine=SimpleNamespace(agent=object())), "n")
    assert "AttributeError" in found.reason


@pytest.mark.parametrize("question", [gate.ready, gate.switchable])
def test_whoever_cannot_look_can_not_switch(question: Callable[..., gate.WorkerReport]) -> None:
    order: Any = object()
    broken = SimpleNamespace(rank=1, weight_transfer_engine=SimpleNamespace(agent=object()))
    assert "AttributeError" in question(broken, "n", order).reason
    assert question(Wrapper(None), "n", order).reason == "this worker has no weightsync agent"
    fit = SimpleNamespace(incarnation=77, **{question.__name__: lambda asked: "" if asked is order else "another"})
    assert question(Wrapper(fit), "n", order) == gate.WorkerReport("n", 3, "", False, 77)


def test_calls_answer_even_when_they_fail() -> None:
    worker = Wrapper(None)
    assert gate.call(worker, "double", (4,), {}) == gate.CallOutcome(3, 8)
    assert gate.call(worker, "double", (), {"number": 5}) == gate.CallOutcome(3, 10)
    assert gate.call(worker, lambda worker, number: worker.rank + number, (1,), {}) == gate.CallOutcome(3, 4)
    assert gate.call(worker, "fail", (), {}).error == "KeyError: 'no such thing'"
    assert "AttributeError" in gate.call(worker, "unknown", (), {}).error


def test_a_call_of_unknown_effect_is_made_inside_the_agents_look(wrapper_class: type[Wrapper]) -> None:
    looked: list[str] = []

    def around(change: Any) -> Any:
        looked.append("before")
        outcome = change()
        looked.append("after")
        return outcome

    agent = Agent(may_run=True)
    agent.around = around  # type: ignore[attr-defined]
    assert gate.call_around(wrapper_class(agent), "double", (4,), {}) == gate.CallOutcome(3, 8)
    assert gate.call_around(wrapper_class(agent), "fail", (), {}).error == "KeyError: 'no such thing'"
    assert looked == ["before", "after"] * 2
    assert gate.call_around(wrapper_class(None), "double", (4,), {}) == gate.CallOutcome(3, 8)


def test_weights_that_cannot_be_looked_at_are_not_touched(wrapper_class: type[Wrapper]) -> None:
    def around(change: Any) -> Any:
        raise RuntimeError("the device is lost")

    agent = Agent(may_run=True)
    agent.around = around  # type: ignore[attr-defined]
    outcome = gate.call_around(wrapper_class(agent), "double", (4,), {})
    assert outcome == gate.CallOutcome(3, error="RuntimeError: the device is lost")
