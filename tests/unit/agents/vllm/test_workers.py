"""Questions to workers and their answers; what the hold makes of them is in test_hold."""

import pytest
from engine_cores import EngineCore, config
from weightsync.agents.vllm import gate, workers


def test_an_answer_to_an_earlier_question_is_taken_for_none(core_class: type[EngineCore]) -> None:
    core = core_class(config(), ranks=2)
    core.model_executor.queues[1].append(gate.CallOutcome(1))
    with pytest.raises(workers.OutOfStep, match="restart this engine"):
        workers.ask(core)


def test_who_is_not_meant_and_why_not(core_class: type[EngineCore]) -> None:
    reports = workers.ask(core_class(config(), ranks=2))
    no_version = "no version has been committed here since the start"
    assert workers.refusals(reports, None) == [f"rank 0: {no_version}", f"rank 1: {no_version}"]
    assert workers.refusals(reports, {0: 100})[1] == (
        f"rank 1: it is incarnation 101, and the call means nobody; {no_version}"
    )


def test_every_worker_runs_a_call_that_fails_in_one(core_class: type[EngineCore]) -> None:
    core = core_class(config(), ranks=3)
    core.model_executor.workers[0].failure = "broken"
    with pytest.raises(workers.WorkersFailed, match=r"update_weights failed in 1 of 3 workers: rank 0: .*broken"):
        workers.call(core, "update_weights", None, ({},), {})
    assert [worker.calls for worker in core.model_executor.workers] == [["update"]] * 3
