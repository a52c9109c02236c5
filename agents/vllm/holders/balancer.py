"""Asynchronous expert load balancing (EPLB, vLLM's default): nothing of the old weights outlives the pause.

vLLM's background thread copies experts of one layer into a buffer; the main thread moves the buffer into the live
parameters in a later step. A round in between would be overwritten, after its commit, by what the buffer holds. So a
worker drains the balancer before it says that it stands still: vLLM's own ``EplbState.drain_async`` lets the thread
finish its cycle and throws its results away. The maps are committed layer by layer together with the experts, so what
was moved before stays true, and what was not moved stays where it was until the next rearrangement.
"""

import functools
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final

from weightsync.agents.errors import AgentError
from weightsync.agents.vllm.backend import logger
from weightsync.orchestrator.protocol.messages import Fault

READY: Final = "_all_ranks_result_ready"
"""Method of vLLM's balancer that its drain asks, on all ranks in step, until every rank has a result."""

_balancers: list[weakref.ref[Any]] = []
"""Of this process, in the order in which they were made: draining is collective, so ranks must agree on it."""


class BalancerBusy(AgentError):
    """The load balancer did not come to rest in time. The engine's fault; may be tried again."""

    fault: Fault = "engine"
    retry = True


class BalancerUnknown(AgentError):
    """This vLLM moves experts in the background and offers no way to stop that. Another setting is needed."""


def install() -> None:
    """Remember every load balancer that this process makes. Repeating it does no harm; older vLLMs have none."""
    try:
        from vllm.distributed.eplb.eplb_state import EplbState
    except ImportError as error:
        logger.debug("weightsync: no expert load balancing in this vLLM (%s)", error)
        return
    original = EplbState.__init__
    if getattr(original, "weightsync_balancer", False):
        return

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _balancers.append(weakref.ref(self))

    init.weightsync_balancer = True  # type: ignore[attr-defined]
    EplbState.__init__ = init


def require(parallel_config: Any) -> None:
    """Refuse asynchronous balancing that could not be drained.

    Args:
        parallel_config: vLLM's ``ParallelConfig``.

    Raises:
        BalancerUnknown: experts would be moved behind a round's back.
    """
    if not is_asynchronous(parallel_config):
        return
    try:
        from vllm.distributed.eplb.eplb_state import EplbState
    except ImportError:
        missing = True
    else:
        # Without our hook in its constructor nobody would know which balancer to drain.
        watched = getattr(EplbState.__init__, "weightsync_balancer", False)
        missing = not watched or not callable(getattr(EplbState, "drain_async", None))
    if missing:
        raise BalancerUnknown(
            "eplb_config.use_async is true and this vLLM has no EplbState.drain_async: a copy of old experts could be "
            "moved into the weights after a commit; start with --eplb-config '{\"use_async\": false}' or without "
            "--enable-eplb"
        )


def is_asynchronous(parallel_config: Any) -> bool:
    """Whether this configuration moves experts on a thread of its own."""
    eplb = getattr(parallel_config, "eplb_config", None)
    return bool(getattr(parallel_config, "enable_eplb", False)) and bool(getattr(eplb, "use_async", False))


def may_move(vllm_config: Any) -> bool:
    """Whether experts may move while an engine of this configuration serves; of one that nobody knows they may.

    Without load balancing only ``reinitialize_distributed`` would move them, which is refused.
    """
    parallel_config = getattr(vllm_config, "parallel_config", None)
    return parallel_config is None or bool(getattr(parallel_config, "enable_eplb", True))


def drain(seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
    """Bring every asynchronous balancer of this process to rest; collective over the ranks that share experts.

    On the thread that runs the batches: nobody else begins a rearrangement, so the rest lasts until that thread goes
    on. Copies that the background thread made are complete and thrown away when this returns.

    Args:
        seconds: total wait; all ranks give up together when the first one's has passed.
        clock: for tests.

    Raises:
        BalancerBusy: a balancer is still at work, or its thread has died in the middle of it.
    """
    ends = clock() + seconds
    for balancer in _living():
        if getattr(balancer, "is_async", False):
            _drain(balancer, lambda: clock() >= ends)
            _require_rest(balancer)


def _living() -> Iterator[Any]:
    _balancers[:] = [reference for reference in _balancers if reference() is not None]
    for reference in list(_balancers):
        balancer = reference()
        if balancer is not None:
            yield balancer


def _drain(balancer: Any, late: Callable[[], bool]) -> None:
    """vLLM's drain, which by itself waits for ever, for instance for a thread that has ended with an error."""
    ready = getattr(balancer, READY, None)
    if ready is None:
        balancer.drain_async()
        return

    @functools.wraps(ready)
    def ready_or_late(model_state: Any) -> bool:
        if ready(model_state):
            return True
        thread = getattr(balancer, "async_worker", None)
        dead = thread is not None and not thread.is_alive()
        if _any_rank(dead or late()):
            why = "its thread has ended with an error" if dead else "no result in time on every rank"
            raise BalancerBusy(f"expert load balancing of {model_state.model_name} does not come to rest: {why}")
        return False

    setattr(balancer, READY, ready_or_late)
    try:
        balancer.drain_async()
    finally:
        delattr(balancer, READY)  # the instance's own attribute; the method of its class is there again


def _any_rank(says: bool) -> bool:
    """Whether any rank of the expert-parallel group says so. ``READY`` is asked in step, so this is, too."""
    import torch
    from torch.distributed import ReduceOp, all_reduce
    from vllm.distributed.parallel_state import get_ep_group

    group = getattr(get_ep_group(), "cpu_group", None)
    if group is None or group.size() <= 1:
        return says
    flag = torch.tensor([int(says)], dtype=torch.int32)
    all_reduce(flag, op=ReduceOp.MAX, group=group)
    return bool(flag.item())


def _require_rest(balancer: Any) -> None:
    for state in balancer.model_states.values():
        if getattr(state, "rebalanced", False) or getattr(state, "pending_result", None) is not None:
            raise BalancerBusy(
                f"expert load balancing of {state.model_name} still holds copies of experts after vLLM's drain_async; "
                "start with --eplb-config '{\"use_async\": false}'"
            )
