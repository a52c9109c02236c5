"""The hold of the scheduler, on fakes with the shape of vLLM's engine core."""

import inspect
import sys
from queue import Queue
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from engine_cores import DPEngineCore, EngineCore, LoraRequest, PauseState, config, pretend_vllm, servable
from weightsync.agents.inference import application
from weightsync.agents.inference.place import PlaceError
from weightsync.agents.vllm import gate, hold, lease, workers


def start_and_update(core: EngineCore) -> None:
    core.collective_rpc("start_weight_update")
    core.collective_rpc("update_weights", kwargs={"update_info": {}})


# ------------------------------------------------------------------------------------------------------------ holding
@pytest.mark.parametrize("backend", ["nccl", None])
def test_other_backends_keep_vllms_class_and_start_unpaused(core_class: type[EngineCore], backend: str | None) -> None:
    core = core_class(config(backend))
    assert type(core) is core_class
    assert not core.is_scheduler_paused()


def test_an_engine_is_born_paused_and_says_so(core_class: type[EngineCore]) -> None:
    core = core_class(config())
    assert core.is_scheduler_paused()
    assert core.scheduler.pause_state is PauseState.PAUSED_ALL
    assert type(core).__name__ == "EngineCore"
    assert isinstance(core, core_class)


def test_resume_is_refused_until_every_worker_is_servable(core_class: type[EngineCore]) -> None:
    core = core_class(config(), ranks=2)
    with pytest.raises(gate.NotServable, match=r"rank 0: .*no version.*; rank 1: .*no version"):
        core.resume_scheduler()
    core.model_executor.workers[0].agent.may_run = True
    with pytest.raises(gate.NotServable, match="not servable: rank 1"):
        core.resume_scheduler()
    assert core.scheduler.pause_state is PauseState.PAUSED_ALL
    servable(core)
    core.resume_scheduler()
    assert not core.is_scheduler_paused()


def test_waking_up_is_no_way_round_the_hold(core_class: type[EngineCore]) -> None:
    with pytest.raises(gate.NotServable):
        core_class(config()).wake_up()


def test_a_torn_engine_is_not_resumed(core_class: type[EngineCore]) -> None:
    core = core_class(config())
    core.model_executor.workers[0].agent.status.torn = True
    with pytest.raises(gate.NotServable, match="torn"):
        core.resume_scheduler()


def test_pausing_in_another_mode_does_not_loosen_the_hold(core_class: type[EngineCore]) -> None:
    core = core_class(config())
    with pytest.raises(gate.NotServable, match="mode=wait"):
        core.pause_scheduler("wait")
    core.pause_scheduler("abort")
    assert core.scheduler.pause_state is PauseState.PAUSED_ALL
    core.pause_scheduler("keep", False)
    assert core.scheduler.pause_state is PauseState.PAUSED_ALL


def test_a_servable_engine_pauses_in_every_mode(core_class: type[EngineCore]) -> None:
    core = core_class(config())
    servable(core)
    core.pause_scheduler("wait")
    assert core.scheduler.pause_state is PauseState.PAUSED_NEW


def test_sleep_that_moves_weights_is_refused(core_class: type[EngineCore]) -> None:
    core = core_class(config())
    with pytest.raises(hold.CallRefused, match="level 0"):
        core.sleep()
    core.sleep(0)
    assert core.slept == [0]


def test_without_hooks_nothing_is_installed_and_a_chosen_engine_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = type("EngineCore", (), {"__init__": lambda self: None})
    pretend_vllm(monkeypatch, bare)
    hold.install()
    assert not hasattr(bare, "_initialize_kv_caches")
    with pytest.raises(hold.HoldUnavailable, match=r"EngineCore\.resume_scheduler"):
        hold.require()


def test_an_engine_core_that_cannot_be_imported_is_a_missing_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_vllm(monkeypatch, EngineCore)
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.core", None)
    hold.install()
    with pytest.raises(hold.HoldUnavailable):
        hold.require()


def test_require_is_content_with_all_hooks(core_class: type[EngineCore]) -> None:
    hold.require()


# ------------------------------------------------------------------------------------------------ whom a resume means
def resume(core: EngineCore, means: object) -> None:
    assert core.collective_rpc(hold.RESUME, kwargs={"incarnations": means}) == []


def test_a_resume_that_names_the_processes_is_obeyed(core_class: type[EngineCore]) -> None:
    core = core_class(config(), ranks=2)
    servable(core)
    resume(core, {"0": 100, "1": 101, "2": 7})  # rank 2 is in another engine core of this engine
    assert not core.is_scheduler_paused()


@pytest.mark.parametrize(
    ("means", "reason"),
    [
        ({"0": 100, "1": 55}, "not servable: rank 1: it is incarnation 101, and the call means 55$"),
        ({"0": 100}, "rank 1: it is incarnation 101, and the call means nobody"),
        ({"0": 0, "1": 0}, "rank 0: it is incarnation 100, and the call means 0; rank 1"),
    ],
)
def test_a_process_that_is_not_meant_refuses(core_class: type[EngineCore], means: object, reason: str) -> None:
    """Also one whose memory is servable: whoever resumes does not know what it holds."""
    core = core_class(config(), ranks=2)
    servable(core)
    with pytest.raises(gate.NotServable, match=reason):
        resume(core, means)
    assert core.is_scheduler_paused()


def test_a_restarted_process_says_both_reasons(core_class: type[EngineCore]) -> None:
    with pytest.raises(gate.NotServable, match="rank 0: it is incarnation 100, and the call means 7; no version has"):
        resume(core_class(config()), {"0": 7})


@pytest.mark.parametrize("means", [None, {}, [100], {"zero": 100}, {"0": "x"}, {"0": None}, "0=100"])
def test_a_resume_that_names_nobody_is_refused(core_class: type[EngineCore], means: object) -> None:
    core = core_class(config())
    servable(core)
    with pytest.raises(hold.CallRefused, match=r'weightsync_resume needs kwargs \{"incarnations"'):
        resume(core, means)
    assert core.is_scheduler_paused()


def test_ranks_in_step_refuse_together_whom_the_resume_does_not_mean(dp_class: type[Any]) -> None:
    core = dp_class(config())
    servable(core)
    with pytest.raises(gate.NotServable, match="means 7"):
        resume(core, {"0": 7})
    assert core.dp_group.met == [True]


def test_whoever_asks_for_readiness_is_told_why_not(core_class: type[EngineCore]) -> None:
    core = core_class(config())
    with pytest.raises(gate.NotServable, match="not serving: rank 0: no version has been committed"):
        core.collective_rpc(hold.READY)
    servable(core)
    with pytest.raises(gate.NotServable, match="not serving: the engine is paused; its weights are whole"):
        core.collective_rpc(hold.READY)
    core.resume_scheduler()
    core.model_executor.workers.clear()  # whoever serves is not asked anything
    assert core.collective_rpc(hold.READY) == []


def test_whoever_asks_how_versions_land_is_told_of_every_rank(core_class: type[EngineCore]) -> None:
    core = core_class(config(), ranks=2)
    assert core.collective_rpc(hold.LANDING) == ["rank 0 lands copy", "rank 1 lands copy"]
    assert core.is_scheduler_paused(), "nothing has changed"


# -------------------------------------------------------------------------------------------------------------- lease
def test_the_lease_of_an_engine_core_is_that_of_the_worker_that_waits_longest(core_class: type[EngineCore]) -> None:
    core = core_class(config(), ranks=2)
    servable(core)
    first, second = (worker.agent for worker in core.model_executor.workers)
    assert hold.lease_left(core, 99.0) is None
    first.lease, second.lease = (20.0, 23.0), (20.0, 15.5)
    assert hold.lease_left(core, 99.0) == 4.5
    assert hold.lease_left(core, 3.0) == 17.0, "the server has heard the daemon since"
    second.held_because = "an operator looks at it"
    assert hold.lease_left(core, 99.0) is None
    second.held_because, second.may_run = "", False
    assert hold.lease_left(core, 99.0) is None


def with_a_loop(core_class: type[EngineCore], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A servable core with the input queue of a process of its own, and how vLLM takes from it."""
    engine = ModuleType("vllm.v1.engine")
    engine.EngineCoreRequestType = SimpleNamespace(WAKEUP="wakeup")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, engine.__name__, engine)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.0)

    def handle(self: Any, kind: str, request: Any) -> None:
        self.handled.append((kind, request))

    core_class._handle_client_request = handle  # type: ignore[attr-defined]
    core: Any = core_class(config())
    core.input_queue, core.handled = Queue(), []
    servable(core)
    return core


def look(core: Any) -> None:
    """One turn of the core's loop, when the timer has asked for it."""
    core._handle_client_request(*core.input_queue.get(timeout=10))


def test_a_core_whose_daemon_paused_it_resumes_when_the_lease_has_run_out(
    core_class: type[EngineCore], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = with_a_loop(core_class, monkeypatch)
    agent = core.model_executor.workers[0].agent
    agent.lease = (60.0, 55.0)
    core.collective_rpc("start_weight_update")
    look(core)
    assert core.is_scheduler_paused()
    agent.lease = (0.0, 1.0)  # no time has passed since the start that the core heard
    look(core)
    assert not core.is_scheduler_paused()
    assert core.handled == [], "vLLM never sees our word"
    core._handle_client_request("wakeup", None)
    assert core.handled == [("wakeup", None)]


def test_a_core_that_is_torn_or_was_paused_by_somebody_else_stays_paused(
    core_class: type[EngineCore], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = with_a_loop(core_class, monkeypatch)
    agent = core.model_executor.workers[0].agent
    agent.lease = (0.0, 1.0)
    core.resume_scheduler()
    core.pause_scheduler("keep")
    assert "weightsync_lease" not in core.__dict__ or core.weightsync_lease._timer is None, "nothing asks"
    core.collective_rpc("start_weight_update")
    agent.may_run, agent.status.torn = False, True
    look(core)
    look(core)
    assert core.is_scheduler_paused()


def test_a_daemon_that_still_calls_the_server_is_heard(
    core_class: type[EngineCore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its agents' connections may be cut alone; it then introduces itself to them again and again."""
    core = with_a_loop(core_class, monkeypatch)
    core.model_executor.workers[0].init_weight_transfer_engine = lambda init_info: None
    now = 100.0
    core.collective_rpc("start_weight_update")
    core.weightsync_lease._clock = lambda: now
    core.weightsync_lease.arm()
    core.model_executor.workers[0].agent.lease = (20.0, 500.0)
    for _ in range(3):
        now += 15.0
        core.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {}})
        now += 15.0
        look(core)
        assert core.is_scheduler_paused()
    now += 5.0
    look(core)
    assert not core.is_scheduler_paused()


def test_a_resume_ends_the_lease(core_class: type[EngineCore], monkeypatch: pytest.MonkeyPatch) -> None:
    core = with_a_loop(core_class, monkeypatch)
    core.collective_rpc("start_weight_update")
    resume(core, {"0": 100})
    core.pause_scheduler("keep")
    core.model_executor.workers[0].agent.lease = (0.0, 1.0)
    core._handle_client_request("wakeup", lease.CHECK)  # as if it had been in the queue
    assert core.is_scheduler_paused()


# ---------------------------------------------------------------------------------------------- data parallel in step
@pytest.fixture
def dp_class(core_class: type[EngineCore]) -> type[Any]:
    return type("DPEngineCoreProc", (DPEngineCore, core_class), {})


def test_ranks_in_step_ignore_wake_ups_while_held(dp_class: type[Any]) -> None:
    assert dp_class(config()).ignore_start_dp_wave
    assert not dp_class(config("nccl")).ignore_start_dp_wave


def test_ranks_in_step_refuse_together(dp_class: type[Any]) -> None:
    core = dp_class(config(peers_refuse=True))
    servable(core)
    with pytest.raises(gate.NotServable, match="peer"):
        core.resume_scheduler()
    core.dp_group.others = False
    core.resume_scheduler()
    assert core.dp_group.met == [False, False]


def test_a_refusing_rank_tells_its_peers(dp_class: type[Any]) -> None:
    core = dp_class(config())
    with pytest.raises(gate.NotServable, match="rank 0"):
        core.resume_scheduler()
    assert core.dp_group.met == [True]


def test_no_meeting_where_vllm_would_not_enter_its_barrier_either(dp_class: type[Any]) -> None:
    core = dp_class(config())
    core.pending_pause = True
    with pytest.raises(gate.NotServable):
        core.resume_scheduler()
    assert core.dp_group.met == []


# -------------------------------------------------------------------------------------------------------------- calls
def test_a_round_of_calls(core_class: type[EngineCore]) -> None:
    core = core_class(config(), ranks=2)
    start_and_update(core)
    assert core.collective_rpc("finish_weight_update") == ["finished 0", "finished 1"]
    assert core.model_executor.workers[1].calls == ["start", "update", "finish"]


def test_a_failed_update_names_every_rank_and_keeps_them_in_step(core_class: type[EngineCore]) -> None:
    core = core_class(config(), ranks=3)
    for worker in core.model_executor.workers[1:]:
        worker.failure = f"broken {worker.rank}"
    with pytest.raises(workers.WorkersFailed, match=r"2 of 3 workers: rank 1: .*broken 1; rank 2: .*broken 2"):
        start_and_update(core)
    assert core.model_executor.queues == [[], [], []]
    start_and_update_again(core)


def start_and_update_again(core: EngineCore) -> None:
    for worker in core.model_executor.workers:
        worker.failure = ""
    start_and_update(core)
    assert core.collective_rpc("finish_weight_update") == ["finished 0", "finished 1", "finished 2"]


def test_a_session_left_open_gives_way_to_a_new_start(core_class: type[EngineCore]) -> None:
    core = core_class(config(), ranks=2)
    core.collective_rpc("start_weight_update")
    core.collective_rpc("start_weight_update")
    assert core.model_executor.workers[1].calls == ["start", "finish", "start"]


@pytest.mark.parametrize("method", ["update_weights", "finish_weight_update"])
def test_calls_without_a_start_reach_no_worker(core_class: type[EngineCore], method: str) -> None:
    core = core_class(config())
    with pytest.raises(hold.SessionError, match="start_weight_update first"):
        core.collective_rpc(method)
    assert core.model_executor.workers[0].calls == []


def test_a_finish_has_nothing_to_do_after_an_update_that_failed_and_was_decided(core_class: type[EngineCore]) -> None:
    core = core_class(config(), ranks=2)
    servable(core)
    assert core.collective_rpc("finish_weight_update") == []
    core.model_executor.workers[1]._weight_update_active = True  # of one worker alone: nobody knows what that means
    with pytest.raises(hold.SessionError):
        core.collective_rpc("finish_weight_update")
    assert [worker.calls for worker in core.model_executor.workers] == [[], []]


def test_a_start_in_checkpoint_format_reaches_no_worker(core_class: type[EngineCore]) -> None:
    core = core_class(config())
    with pytest.raises(hold.SessionError, match='"is_checkpoint_format": false'):
        core.collective_rpc("start_weight_update", kwargs={"is_checkpoint_format": True})
    core.collective_rpc("start_weight_update", kwargs={"is_checkpoint_format": False})
    assert core.model_executor.workers[0].calls == ["start"]


def test_no_update_while_serving_or_with_batches_in_flight(core_class: type[EngineCore]) -> None:
    core = core_class(config())
    servable(core)
    core.resume_scheduler()
    with pytest.raises(hold.EngineNotPaused, match="pause"):
        start_and_update(core)
    core.pause_scheduler("keep")
    core.batch_queue.append("batch")
    with pytest.raises(hold.EngineNotPaused, match="in flight"):
        start_and_update(core)
    assert "update" not in core.model_executor.workers[0].calls


def test_an_update_stops_requests_that_a_looser_pause_lets_run(core_class: type[EngineCore]) -> None:
    core = core_class(config())
    servable(core)
    core.pause_scheduler("abort")
    assert core.scheduler.pause_state is PauseState.PAUSED_NEW
    start_and_update(core)
    assert core.scheduler.pause_state is PauseState.PAUSED_ALL


def test_calls_that_change_weights_unseen_are_refused(core_class: type[EngineCore]) -> None:
    core = core_class(config())
    with pytest.raises(hold.CallRefused, match="reload_weights"):
        core.collective_rpc("reload_weights")
    assert core.model_executor.workers[0].calls == []


def test_calls_of_unknown_effect_reach_no_worker(core_class: type[EngineCore], monkeypatch: pytest.MonkeyPatch) -> None:
    core = core_class(config(), ranks=2)

    def rank_and_more(worker: Any, more: int) -> int:
        return int(worker.rank) + more

    with pytest.raises(hold.CallRefused, match="rank_and_more is refused: nobody knows whether it changes weights"):
        core.collective_rpc(rank_and_more, args=(10,))
    with pytest.raises(hold.CallRefused, match="the daemon needs the agent"):
        core.collective_rpc("shutdown_weight_transfer_engine")
    monkeypatch.setenv("WEIGHTSYNC_ALLOW_CALLS", f"{__name__}.{rank_and_more.__qualname__}")
    assert core.collective_rpc(rank_and_more, args=(10,)) == [10, 11]


@pytest.fixture
def serving(core_class: type[EngineCore], monkeypatch: pytest.MonkeyPatch) -> EngineCore:
    """An engine core of two ranks that serves, whose operator answers for two calls."""
    monkeypatch.setenv("WEIGHTSYNC_ALLOW_CALLS", "look, meddle")
    core = core_class(config(), ranks=2)
    servable(core)
    core.resume_scheduler()
    assert not core.is_scheduler_paused()
    return core


def test_after_a_call_that_changed_nothing_the_engine_serves_on(serving: EngineCore) -> None:
    assert serving.collective_rpc("look") == [0, 0]
    assert serving.add_lora("adapter")
    assert not serving.is_scheduler_paused()
    assert serving.model_executor.workers[1].calls == ["add adapter"]


def test_methods_are_declared_as_those_that_they_stand_before(serving: EngineCore) -> None:
    """By which vLLM makes a request of the list that a client sends."""
    (request,) = inspect.signature(serving.add_lora).parameters.values()
    assert request.annotation is LoraRequest


@pytest.mark.parametrize("failing", [False, True])
def test_after_a_call_that_changed_weights_it_is_paused_at_once(serving: EngineCore, failing: bool) -> None:
    first, second = serving.model_executor.workers
    second.failure = "and then it failed" if failing else ""
    if failing:
        with pytest.raises(workers.WorkersFailed, match=r"rank 1: .* and then it failed"):
            serving.collective_rpc("meddle")
    else:
        serving.collective_rpc("meddle")
    assert serving.scheduler.pause_state is PauseState.PAUSED_ALL
    with pytest.raises(gate.NotServable, match=r"rank 0: the weights are torn.* rank 1: the weights are torn"):
        serving.resume_scheduler()
    assert first.agent.status.torn


def test_adapters_that_change_weights_are_found_out(serving: EngineCore) -> None:
    assert serving.remove_lora(7)
    assert serving.scheduler.pause_state is PauseState.PAUSED_ALL


def test_a_paused_engine_stays_as_it_is(serving: EngineCore) -> None:
    serving.pause_scheduler("keep")
    serving.collective_rpc("meddle")
    assert serving.scheduler.pause_state is PauseState.PAUSED_ALL
    with pytest.raises(gate.NotServable, match="torn"):
        serving.resume_scheduler()


def test_experts_are_not_spread_anew(serving: EngineCore) -> None:
    with pytest.raises(hold.CallRefused, match="reinitialize_distributed is refused: it makes the process groups"):
        serving.reinitialize_distributed(None)


def test_answers_out_of_step_are_never_taken_for_a_yes(core_class: type[EngineCore]) -> None:
    core = core_class(config(), ranks=2)
    servable(core)
    core.model_executor.queues[1].append(gate.WorkerReport("an earlier question", 1, "", False))
    with pytest.raises(workers.OutOfStep, match="restart"):
        core.resume_scheduler()
    assert core.is_scheduler_paused()


# ---------------------------------------------------------------------------------------------- making itself a member
class Applying:
    """Stands for the thread that makes an engine a member."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self) -> None:
        self.said.append("start")


def test_the_first_engine_core_makes_the_engine_a_member(
    core_class: type[EngineCore], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, Applying]] = []

    def applicant(kind: str, environ: Any) -> Applying:
        made.append((kind, Applying()))
        return made[-1][1]

    monkeypatch.setattr(application, "applicant", applicant)
    first, other = config(), config()
    other.parallel_config.data_parallel_index = 1
    core_class(first)
    core_class(other)
    core_class(config(None))
    ((kind, thread),) = made
    assert (kind, thread.said) == ("vllm", ["start"])


def test_one_that_cannot_say_who_it_is_does_not_start(
    core_class: type[EngineCore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(application.URL_VARIABLE, "http://h:8000")
    monkeypatch.delenv("WEIGHTSYNC_ENGINE", raising=False)
    with pytest.raises(PlaceError, match="WEIGHTSYNC_ENGINE"):
        core_class(config())
