"""The boundary commit: what waits in standby becomes what is served, inside the engine core between two steps.

Nobody pauses the engine: the core runs this call on the thread that takes its steps, so no batch is scheduled
meanwhile. Batches that asynchronous scheduling or pipelining have in flight are drained first; each of them is whole
with the old weights, because a worker takes batches and calls in one order. Every worker says whether it can switch,
what takes long beside those batches and the rest after them, and only when all can does any. One that fails then leaves
the core paused at once: its ranks may hold two versions.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from weightsync.agents.inference.calls import SwitchInfo, parse_switch_info
from weightsync.agents.vllm import gate, kv, workers
from weightsync.agents.vllm.backend import logger
from weightsync.orchestrator.protocol.names import RoundName, Version

SWITCH: Final = "weightsync_switch"
"""Method of ``/collective_rpc`` by which the daemon switches; no worker has it, the engine core answers it."""

MAX_DRAIN_STEPS: Final = 1024
"""Turns without a new batch until none is in flight; vLLM keeps a few batches at most, one or two a pipeline stage."""

_DONE: Final = "weightsync_switched"


class SwitchRefused(RuntimeError):
    """Nothing was changed: the engine serves on, or stays paused, as it was. The message says what is missing."""


@dataclass(frozen=True, slots=True)
class LastSwitch:
    """The last switch of an engine core; ``seconds`` are those in which it could take no step."""

    round: RoundName
    version: Version
    seconds: float


def switch(core: Any, kwargs: Mapping[str, Any]) -> list[dict[str, object]]:
    """One answer: whether the engine is paused, and how long the switch took. Asked again, the same answer.

    An order of a round before the last one's was overtaken on its way; what waits in standby by then may be the version
    before, and to take that for what was meant would bring it back.

    Raises:
        InfoError: ``kwargs`` are no SwitchInfo.
        SwitchRefused: nothing was changed.
        WorkersFailed, TimeoutError: the engine is paused now; its workers say what their memory holds.
    """
    order = parse_switch_info(kwargs)
    done: LastSwitch | None = core.__dict__.get(_DONE)
    if done is not None and (order.round.epoch, order.round.number) < (done.round.epoch, done.round.number):
        raise SwitchRefused(f"weightsync: round {order.round} is over: {done.version} was switched to in {done.round}")
    if done is None or (done.round, done.version) != (order.round, order.version):
        done = core.__dict__[_DONE] = _perform(core, order)
    return [{"paused": core.is_scheduler_paused(), "seconds": done.seconds}]


def drain(core: Any) -> None:
    """Takes steps without new batches until none is in flight; what these say goes to the clients as ever.

    Raises:
        SwitchRefused: this engine core has no loop of its own that could.
    """
    if not getattr(core, "batch_queue", None):
        return
    step = getattr(core, "_process_engine_step", None)
    if step is None:
        raise SwitchRefused("weightsync: batches are in flight in an engine core without a loop; let them end first")
    for _ in range(MAX_DRAIN_STEPS):
        try:
            step()
        except Exception:
            _end(core)  # as the core's own loop does when a step fails; a call's failure alone would hide it
            raise
        if not core.batch_queue:
            return
    raise SwitchRefused(f"weightsync: batches are still in flight after {MAX_DRAIN_STEPS} steps without a new one")


def _end(core: Any) -> None:
    from vllm.v1.engine import EngineCoreRequestType

    core.input_queue.put_nowait((EngineCoreRequestType.EXECUTOR_FAILED, b""))


def _perform(core: Any, order: SwitchInfo) -> LastSwitch:
    _require_no_meeting(core)
    before = core.scheduler.pause_state
    workers.pause_all(core)
    try:
        began, under_way = time.monotonic(), bool(getattr(core, "batch_queue", None))
        _require(core, gate.ready, order)
        drain(core)
        if under_way:
            began = time.monotonic()
        _require(core, gate.switchable, order)
        kv.forget(core, order.cache)
    except BaseException:
        core.scheduler.set_pause_state(before)
        raise
    workers.call(core, gate.switch, order.deadline_seconds, (order,), {})
    if callable(tell := getattr(core, "set_weight_version", None)):
        tell(str(order.version.step))
    core.scheduler.set_pause_state(before)
    seconds = time.monotonic() - began
    logger.info("weightsync: round %s: serving %s after %.1f ms", order.round, order.version, 1e3 * seconds)
    return LastSwitch(order.round, order.version, seconds)


def _require(core: Any, question: Callable[..., gate.WorkerReport], order: SwitchInfo) -> None:
    if refusals := workers.refusals(workers.ask(core, question, order), order.incarnations):
        raise SwitchRefused(f"weightsync: {order.version} is not served: {'; '.join(refusals)}")


def _require_no_meeting(core: Any) -> None:
    """Ranks of several engine cores that meet in every step must stop together before any of them changes."""
    if getattr(core, "dp_group", None) is not None and (not core.is_scheduler_paused() or core.engines_running):
        raise SwitchRefused(
            "weightsync: this engine core steps together with its data-parallel peers; call /pause?mode=keep first"
        )
