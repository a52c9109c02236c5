"""What the engine core asks of its workers, so that no answer is taken for another's and no failure is lost."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from weightsync.agents.vllm import gate

ASK_SECONDS: Final = 60.0
"""Total wait for the workers' reports. They answer at once between batches, and a long prefill takes seconds."""


class WorkersFailed(RuntimeError):
    """A call failed in one or more workers; lists all of them, by rank."""


class OutOfStep(RuntimeError):
    """Workers answered an earlier question (a call timed out in between). Only a restart of the engine cures it."""


def ask(core: Any, question: Callable[..., gate.WorkerReport] = gate.report, *about: Any) -> list[gate.WorkerReport]:
    """The workers' answers to ``question``, which gets the worker, a nonce to give back, and ``about``.

    Raises:
        OutOfStep: a worker answered another question.
        TimeoutError: no answer within ASK_SECONDS.
    """
    nonce = secrets.token_hex(8)
    reports: list[gate.WorkerReport] = core.model_executor.collective_rpc(question, ASK_SECONDS, (nonce, *about))
    if any(getattr(report, "nonce", None) != nonce for report in reports):
        raise OutOfStep("weightsync: the workers' answers are out of step with the calls; restart this engine")
    return reports


def call(
    core: Any,
    method: str | Callable[..., Any],
    timeout: float | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    how: Callable[..., gate.CallOutcome] = gate.call,
) -> list[Any]:
    """What ``method`` returned in each worker; every worker has run it, also if others failed.

    Args:
        how: it runs in a worker.

    Raises:
        WorkersFailed: it raised in some.
        TimeoutError: no answer within ``timeout`` seconds.
    """
    outcomes: list[gate.CallOutcome] = core.model_executor.collective_rpc(how, timeout, (method, args, kwargs))
    if failed := [f"rank {outcome.rank}: {outcome.error}" for outcome in outcomes if outcome.error]:
        name = method if isinstance(method, str) else getattr(method, "__name__", "the call")
        raise WorkersFailed(
            f"weightsync: {name} failed in {len(failed)} of {len(outcomes)} workers: {'; '.join(failed)}"
        )
    return [outcome.value for outcome in outcomes]


def call_around(
    core: Any,
    method: str | Callable[..., Any],
    timeout: float | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> list[Any]:
    """As ``call``, of which nobody knows what it does to the weights: the engine is paused where they have changed.

    No batch is scheduled before that is known: the core's one thread is in here.
    """
    try:
        return call(core, method, timeout, args, kwargs, gate.call_around)
    finally:
        if not core.is_scheduler_paused() and refusals(ask(core), None):
            pause_all(core)


def refusals(reports: Sequence[gate.WorkerReport], means: Mapping[int, int] | None) -> list[str]:
    """Why not, one line per rank that says so.

    Args:
        means: rank → incarnation of the processes that are meant; None: whichever are here.
    """
    lines = []
    for report in reports:
        reason = report.reason
        if means is not None and means.get(report.rank) != report.incarnation:
            other = f"it is incarnation {report.incarnation}, and the call means {means.get(report.rank, 'nobody')}"
            reason = f"{other}; {reason}" if reason else other
        if reason:
            lines.append(f"rank {report.rank}: {reason}")
    return lines


def pause_all(core: Any) -> None:
    """From here on the scheduler of ``core`` schedules nothing."""
    core.scheduler.set_pause_state(type(core.scheduler.pause_state).PAUSED_ALL)
