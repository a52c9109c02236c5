"""The worker's gate: no scheduled token runs on weights that are not a whole, committed version.

It is the last line, beneath the hold of the scheduler (``hold``): while that one works, nothing ever reaches the gate.
Warm-up, profiling, graph capture and the dummy batches of data parallelism pass, because they schedule no request.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightsync.agents.inference.calls import SwitchInfo
from weightsync.agents.vllm.backend import logger


class NotServable(RuntimeError):
    """The weights in a worker are not a whole, committed version. Cured by the daemon's next round, not by a retry."""


class GateUnavailable(RuntimeError):
    """This vLLM runs batches by a way that the gate does not know. Nothing to retry: another vLLM is needed."""


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """One worker's answer to ``report``. ``rank`` counts over the whole engine, data-parallel replicas included;
    ``reason`` is empty while the engine may be resumed. ``incarnation`` and ``lease`` are the agent's.

    ``nonce`` is the question's: an answer with another one belongs to an earlier call, see ``hold``.
    """

    nonce: str
    rank: int
    reason: str
    session_open: bool
    incarnation: int = 0
    lease: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class CallOutcome:
    """What a call did in one worker: its result, or ``error`` as text."""

    rank: int
    value: Any = None
    error: str = ""


def reason_not_servable(worker: Any) -> str:
    """Why this worker's weights may not be served now; empty when they may.

    Args:
        worker: vLLM's worker or its wrapper.
    """
    agent = _agent(worker)
    if agent is None:
        return "this worker has no weightsync agent"
    if agent.may_run:
        return ""
    status = agent.status
    if status.torn:
        return "the weights are torn: a round wrote to them and was not committed"
    if status.applied is None:
        return "no version has been committed here since the start"
    return f"a round is changing the weights ({status.window})" if status.window else "the weights are not committed"


def report(worker: Any, nonce: str) -> WorkerReport:
    """Runs in every worker, called by the engine core. Never raises: see ``call``."""
    rank = _rank(worker)
    try:
        # A hold is a wish about the whole engine: a batch that is under way when it comes is no reason to end it.
        agent, reason, is_open = _agent(worker), reason_not_servable(worker), _session_open(worker)
        if agent is None:
            return WorkerReport(nonce, rank, reason, is_open)
        reason = reason or (agent.held_because and f"held: {agent.held_because}")
        return WorkerReport(nonce, rank, reason, is_open, agent.incarnation, agent.lease)
    except Exception as error:
        logger.exception("weightsync: this worker cannot say whether its weights may be served")
        return WorkerReport(nonce, rank, f"{type(error).__name__}: {error}", False)


def ready(worker: Any, nonce: str, order: SwitchInfo) -> WorkerReport:
    """Runs in every worker beside its last batches; ``reason`` is empty where it is. Never raises: see ``call``."""
    return _whether(worker, nonce, lambda agent: agent.ready(order))


def switchable(worker: Any, nonce: str, order: SwitchInfo) -> WorkerReport:
    """Runs in every worker before any switches; ``reason`` is empty where it can. Never raises: see ``call``."""
    return _whether(worker, nonce, lambda agent: agent.switchable(order))


def _whether(worker: Any, nonce: str, reason_of: Callable[[Any], str]) -> WorkerReport:
    rank, agent = _rank(worker), _agent(worker)
    try:
        reason = "this worker has no weightsync agent" if agent is None else reason_of(agent)
        return WorkerReport(nonce, rank, reason, False, 0 if agent is None else agent.incarnation)
    except Exception as error:
        logger.exception("weightsync: this worker cannot say whether it can switch")
        return WorkerReport(nonce, rank, f"{type(error).__name__}: {error}", False)


def switch(worker: Any, order: SwitchInfo) -> None:
    """Runs in every worker, by ``call``: what waits in standby is what it serves from now on."""
    _agent(worker).switch(order)


def landing(worker: Any) -> str:
    """Runs in every worker, by ``call``: how versions land here, and why, for people."""
    agent = _agent(worker)
    return "this worker has no weightsync agent" if agent is None else f"rank {_rank(worker)} {agent.landing}"


def call(worker: Any, method: str | Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> CallOutcome:
    """Runs ``method`` in a worker and answers even when it raises.

    vLLM's multiprocess executor stops reading the answers to a call at the first error; the others stay queued and
    every later call is given an answer of an earlier one. A call that never fails keeps the ranks in step.
    """
    rank = _rank(worker)
    try:
        if isinstance(method, str):
            return CallOutcome(rank, getattr(worker, method)(*args, **kwargs))
        return CallOutcome(rank, method(worker, *args, **kwargs))
    except Exception as error:
        logger.exception("weightsync: %s failed in worker rank %d", getattr(method, "__name__", method), rank)
        return CallOutcome(rank, error=f"{type(error).__name__}: {error}")


def call_around(
    worker: Any, method: str | Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> CallOutcome:
    """As ``call``, of which nobody knows what it does to the weights; see ``WeightHolder.around``."""
    agent = _agent(worker)
    if agent is None:  # then nothing is servable here
        return call(worker, method, args, kwargs)
    try:
        outcome: CallOutcome = agent.around(lambda: call(worker, method, args, kwargs))
    except Exception as error:  # the digest before it
        logger.exception("weightsync: the weights cannot be looked at")
        return CallOutcome(_rank(worker), error=f"{type(error).__name__}: {error}")
    return outcome


def install() -> None:
    """Puts the gate before every batch of this worker process. Repeating it does no harm.

    Raises:
        GateUnavailable: this vLLM has no place for it.
    """
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    _guard(WorkerWrapperBase, "execute_model")
    # Only where vLLM has imported it itself: its import asks for Ray.
    ray_utils = sys.modules.get("vllm.v1.executor.ray_utils")
    ray_worker = getattr(ray_utils, "RayWorkerWrapper", None)
    if ray_worker is not None:
        _guard(ray_worker, "execute_model_ray")


def _guard(owner: type[Any], name: str) -> None:
    execute = getattr(owner, name, None)
    if execute is None:
        raise GateUnavailable(
            f"{owner.__name__}.{name} does not exist in this vLLM, so nothing would stop a batch on uncommitted "
            "weights; use a vLLM that weightsync supports"
        )
    if getattr(execute, "weightsync_gate", False):
        return

    @functools.wraps(execute)
    def gated(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        scheduled = batch[0] if isinstance(batch, tuple) else batch  # Ray hands on (scheduler output, grammar, …)
        if scheduled.total_num_scheduled_tokens:
            refuse_batch(self, scheduled.total_num_scheduled_tokens)
        return execute(self, batch, *args, **kwargs)

    gated.weightsync_gate = True  # type: ignore[attr-defined]
    setattr(owner, name, gated)


def refuse_batch(worker: Any, tokens: int) -> None:
    """Raises NotServable when a batch of ``tokens`` scheduled tokens must not run in ``worker``."""
    if reason := reason_not_servable(worker):
        raise NotServable(f"weightsync: a batch of {tokens} tokens is refused: {reason}")


def _rank(worker: Any) -> int:
    ranks = getattr(getattr(worker, "weight_transfer_engine", None), "ranks", None)
    return int(getattr(worker, "rank", -1) if ranks is None else ranks.rank)


def _agent(worker: Any) -> Any:
    return getattr(getattr(worker, "weight_transfer_engine", None), "agent", None)


def _session_open(worker: Any) -> bool:
    return bool(getattr(worker, "_weight_update_active", False))
