"""The hold: a vLLM answers nobody until its weights are a whole version that the daemon has committed.

vLLM starts unpaused. Here every engine core of our backend is born paused as by ``/pause?mode=keep``: requests queue
and none is answered. Whoever calls ``/resume`` is refused as long as one worker says that its weights may not be
served; so neither a restart nor a stranger nor a torn round lets a token out. The daemon resumes by RESUME instead,
which names the processes that it means: one that was restarted in their place refuses.

How: while an ``EngineCore`` initialises (``_initialize_kv_caches``, after its executor and before its scheduler
exist), its class is replaced by a subclass of it. Nothing is replaced in engine cores of other backends.
"""

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, Final

from weightsync.agents.vllm import boundary, gate, lease, worker_calls, workers
from weightsync.agents.vllm.backend import chosen, logger

RESUME: Final = "weightsync_resume"
"""Method of ``/collective_rpc`` by which the daemon resumes; no worker has it, the engine core answers it."""

READY: Final = "weightsync_ready"
"""Likewise: raises, with the reason, unless the engine serves; see ``readiness``."""

LANDING: Final = "weightsync_landing"
"""Likewise: how versions land in each worker, and why, in a sentence; for people."""

NEEDED: Final = (
    "_initialize_kv_caches",
    "resume_scheduler",
    "pause_scheduler",
    "is_scheduler_paused",
    "collective_rpc",
    "sleep",
)
"""Methods of ``EngineCore`` that the hold wraps or relies on."""


class HoldUnavailable(RuntimeError):
    """This vLLM offers no way to hold its scheduler. Nothing to retry: another vLLM is needed."""


class EngineNotPaused(RuntimeError):
    """An update was asked of an engine that is serving. The caller's fault: pause first, then retry."""


class CallRefused(RuntimeError):
    """A call that would change or move weights behind the protocol's back. The caller's fault; not to be retried."""


class SessionError(RuntimeError):
    """Update calls in an impossible order. The caller's fault."""


def missing_hooks() -> list[str]:
    """What the hold needs and this vLLM does not have; empty when it can be installed."""
    try:
        from vllm.v1.core.sched.interface import PauseState, SchedulerInterface
        from vllm.v1.engine.core import EngineCore
    except ImportError as error:
        return [str(error)]
    missing = [f"EngineCore.{name}" for name in NEEDED if not callable(getattr(EngineCore, name, None))]
    if not hasattr(PauseState, "PAUSED_ALL"):
        missing.append("PauseState.PAUSED_ALL")
    if not hasattr(SchedulerInterface, "set_pause_state"):
        missing.append("SchedulerInterface.set_pause_state")
    return missing


def require() -> None:
    """Raises HoldUnavailable where an engine could not be held: better no engine than one that cannot be."""
    if missing := missing_hooks():
        raise HoldUnavailable(
            f"this vLLM has no {', '.join(missing)}: weightsync cannot hold its scheduler until a version is "
            "committed, so it would answer with checkpoint weights; use a vLLM that weightsync supports"
        )


def install() -> None:
    """Lets every engine core that this process makes be held if our backend is chosen. Repeating it does no harm."""
    if missing := missing_hooks():
        logger.debug("weightsync: no hold in this vLLM, it has no %s", ", ".join(missing))
        return
    from vllm.v1.engine.core import EngineCore

    initialize = EngineCore._initialize_kv_caches
    if getattr(initialize, "weightsync_hold", False):
        return

    @functools.wraps(initialize)
    def initialize_held(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if chosen(vllm_config):
            take(self)
            _apply(vllm_config)
        return initialize(self, vllm_config, *args, **kwargs)

    initialize_held.weightsync_hold = True  # type: ignore[attr-defined]
    EngineCore._initialize_kv_caches = initialize_held


def take(core: Any) -> None:
    """Puts an engine core whose scheduler does not exist yet under the hold."""
    core_class: Any = type(core)
    core.__class__ = held_class(core_class)
    if hasattr(core, "ignore_start_dp_wave"):
        core.ignore_start_dp_wave = True  # as after a pause: a request at one rank must not start the others' loops
    logger.info("weightsync: scheduler held; requests queue until a version is committed and the daemon resumes")


def _apply(vllm_config: Any) -> None:
    """Where the environment says so, the first engine core of an engine makes it a member of its run."""
    from weightsync.agents.inference.application import applicant

    if vllm_config.parallel_config.data_parallel_index == 0:
        thread = applicant("vllm", os.environ)
        if thread is not None:
            thread.start()


@functools.cache
def held_class(core_class: Any) -> type[Any]:
    """A subclass of one of vLLM's engine core classes that keeps its scheduler held."""

    class Held(core_class):  # type: ignore[misc]
        @property
        def scheduler(self) -> Any:
            return self.__dict__["scheduler"]

        @scheduler.setter
        def scheduler(self, scheduler: Any) -> None:
            self.__dict__["scheduler"] = scheduler
            workers.pause_all(self)  # before anybody else has seen it, so that nothing can be scheduled first

        def resume_scheduler(self) -> None:
            self.weightsync_resume(None)

        def weightsync_resume(self, means: Mapping[int, int] | None) -> None:
            require_servable(self, means)
            super().resume_scheduler()
            if (switch := _lease(self)) is not None:
                switch.disarm()

        def _handle_client_request(self, request_type: Any, request: Any) -> None:
            switch = _lease(self) if request is lease.CHECK else None
            if switch is not None:
                switch.check()
            else:
                super()._handle_client_request(request_type, request)

        def pause_scheduler(self, mode: str = "abort", clear_cache: bool = True) -> Any:
            # mode=keep runs nothing more, so it is safe whatever the weights are.
            refusals = [] if mode == "keep" else refusals_of(self)
            if refusals and mode == "wait":
                raise gate.NotServable(_not_servable(refusals) + "; mode=wait would go on running requests")
            result = super().pause_scheduler(mode, clear_cache)
            if refusals:
                workers.pause_all(self)  # mode=abort lets requests that hold KV blocks run
            return result

        def sleep(self, level: int = 1, mode: str = "abort") -> Any:
            if level >= 1:
                raise CallRefused("weightsync: sleep moves the weights from under registered memory; use level 0")
            return super().sleep(level, mode)

        def add_lora(self, lora_request: Any) -> bool:
            return all(self.collective_rpc("add_lora", args=(lora_request,)))

        def remove_lora(self, lora_id: int) -> bool:
            return all(self.collective_rpc("remove_lora", args=(lora_id,)))

        def reinitialize_distributed(self, *_: Any, **__: Any) -> Any:
            raise CallRefused(f"weightsync: {worker_calls.refusal('reinitialize_distributed')}")

        def collective_rpc(
            self,
            method: str | Callable[..., Any],
            timeout: float | None = None,
            args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None,
        ) -> list[Any]:
            if method in (RESUME, READY, LANDING, boundary.SWITCH):
                return _answer(self, method, kwargs or {})
            return _call(self, method, timeout, args, kwargs or {})

    Held.__name__, Held.__qualname__ = core_class.__name__, core_class.__qualname__
    _declare(Held, core_class)
    return Held


def _declare(held: type[Any], core_class: Any) -> None:
    """vLLM decodes what a client sends by the types that the method of this name is declared with."""
    for name, own in vars(held).items():
        theirs = getattr(core_class, name, None)
        if inspect.isfunction(own) and inspect.isfunction(theirs):
            own.__signature__ = inspect.signature(theirs)  # type: ignore[attr-defined]


def _call(
    core: Any,
    method: str | Callable[..., Any],
    timeout: float | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> list[Any]:
    """What the workers answer, if they may be asked."""
    if not check_call(core, method, kwargs):
        return []
    if worker_calls.is_vouched_for(method):
        return workers.call_around(core, method, timeout, args, kwargs)
    results = workers.call(core, method, timeout, args, kwargs)
    if method in worker_calls.OF_A_ROUND and (switch := _lease(core)) is not None:
        switch.arm() if method == "start_weight_update" else switch.heard()
    return results


def _answer(core: Any, method: str | Callable[..., Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """To calls that no worker has: the engine core answers them itself."""
    if method == boundary.SWITCH:
        if (switch := _lease(core)) is not None:
            switch.heard()
        return boundary.switch(core, kwargs)
    if method == LANDING:
        return workers.call(core, gate.landing, workers.ASK_SECONDS, (), {})
    if method == RESUME:
        core.weightsync_resume(meant(kwargs))
    else:
        require_serving(core)
    return []


def refusals_of(core: Any) -> list[str]:
    """Why the workers of this engine core may not serve, one line per rank that says so; empty when all may.

    Raises:
        OutOfStep: a worker answered another question.
        TimeoutError: no answer within workers.ASK_SECONDS.
    """
    return workers.refusals(workers.ask(core), None)


def lease_left(core: Any, silent: float) -> float | None:
    """Seconds until this engine core may resume without its daemon; None while one of its workers says never.

    Args:
        silent: since the daemon has called this server; by either way it is heard.
    """
    leases = [None if report.reason else report.lease for report in workers.ask(core)]
    known = [seconds - min(silent, unheard) for seconds, unheard in filter(None, leases)]
    return max(known) if known and len(known) == len(leases) else None


def meant(kwargs: Mapping[str, Any]) -> dict[int, int]:
    """Rank → incarnation, as RESUME names them.

    Raises:
        CallRefused: it does not.
    """
    named = kwargs.get("incarnations")
    try:
        if not isinstance(named, Mapping) or not named:
            raise TypeError
        return {int(rank): int(incarnation) for rank, incarnation in named.items()}
    except (TypeError, ValueError):
        raise CallRefused(
            f'weightsync: {RESUME} needs kwargs {{"incarnations": {{"<rank>": <incarnation>, …}}}}, got {kwargs!r:.200}'
        ) from None


def require_servable(core: Any, means: Mapping[int, int] | None = None) -> None:
    """Raises NotServable while a worker of this engine core, or of a data-parallel peer in step with it, says no.

    Args:
        means: rank → incarnation of the processes that are to serve; None: whichever are here.
    """
    refusals = workers.refusals(workers.ask(core), means)
    if _refused_by_a_peer(core, bool(refusals)) and not refusals:
        refusals = ["a data-parallel peer of this rank is not servable"]
    if refusals:
        raise gate.NotServable(_not_servable(refusals))


def require_serving(core: Any) -> None:
    """Raises NotServable while the scheduler is paused; only then are the workers asked why."""
    if core.is_scheduler_paused():
        refusals = refusals_of(core) or ["the engine is paused; its weights are whole"]
        raise gate.NotServable(f"weightsync: not serving: {'; '.join(refusals)}")


def _lease(core: Any) -> lease.Lease | None:
    known: lease.Lease | None = core.__dict__.get("weightsync_lease")
    if "weightsync_lease" not in core.__dict__:
        known = core.weightsync_lease = lease.lease_of(core, functools.partial(lease_left, core))
    return known


def check_call(core: Any, method: str | Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Refuses calls that would break the protocol, before any worker has seen them; false where none needs to see it.

    vLLM's workers also check the order of start, update and finish, but a start left over by a daemon that died makes
    theirs fail for ever; here a new start replaces it. A finish without a start has nothing left to do where every
    worker may serve: its update call had failed before the version was known to be decided.

    Raises:
        CallRefused: the call changes weights outside of a round, or nobody knows whether it does.
        EngineNotPaused: an update while requests are running.
        SessionError: update or finish without a start.
    """
    if reason := worker_calls.refusal(method):
        raise CallRefused(f"weightsync: {reason}")
    if method == "start_weight_update":
        if kwargs.get("is_checkpoint_format", False):
            raise SessionError(
                'weightsync: this vLLM needs {"is_checkpoint_format": false} in /start_weight_update; true, its '
                "default, takes the parameters that the weights are written to away"
            )
        if any(report.session_open for report in workers.ask(core)):
            logger.info("weightsync: an update session was left open; ending it for the new one")
            workers.call(core, "finish_weight_update", workers.ASK_SECONDS, (), {})
    elif method in ("update_weights", "finish_weight_update"):
        reports = workers.ask(core)
        if not all(report.session_open for report in reports):
            if method == "finish_weight_update" and not any(r.session_open or r.reason for r in reports):
                return False
            raise SessionError(f"weightsync: {method} without an open update; call /start_weight_update first")
        if method == "update_weights":
            _require_paused(core)
    return True


def _require_paused(core: Any) -> None:
    if not core.is_scheduler_paused():
        raise EngineNotPaused("weightsync: the engine is serving; call /pause?mode=keep before /update_weights")
    if getattr(core, "batch_queue", None):
        raise EngineNotPaused("weightsync: batches are still in flight; await the answer of /pause first")
    workers.pause_all(core)  # after mode=wait or abort, requests that hold KV blocks could still run


def _refused_by_a_peer(core: Any, refused: bool) -> bool:
    """Whether any data-parallel rank that resumes in step with this one refuses.

    Such ranks (mixture-of-experts models) meet in a barrier when they resume; one that refused alone would leave the
    others waiting in it. The condition is vLLM's own for entering the barrier.
    """
    group = getattr(core, "dp_group", None)
    if group is None or core.pending_pause or core.engines_running:
        return refused
    return bool(core.vllm_config.parallel_config.has_unfinished_dp(group, refused))


def _not_servable(refusals: list[str]) -> str:
    return f"weightsync: not servable: {'; '.join(refusals)}"
