"""The dead man's switch: an engine that its daemon paused and left does not stay paused for ever.

It resumes by itself when each of its workers says that it holds a whole committed version, is neither held nor inside
a round, and has not heard the daemon for the time that Welcome gave. Nor may its server have heard it: a daemon that
lives pauses an engine for a reason, and whose agents are cut off it introduces itself to, again and again
(``/init_weight_transfer_engine``). Only a pause of the daemon's counts: it opens an update session with each
(``/start_weight_update``), which an operator who pauses by hand does not. Workers answer on their main thread, so it is
all asked on the engine core's own loop, between two steps.

Data-parallel ranks in step (mixture-of-experts models) are left out: they meet in a barrier when they resume, and one
whose lease ran out alone would wait in it, deaf to the daemon that comes back.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, Final

from weightsync.agents.vllm.backend import logger

LOOK_SECONDS: Final = 1.0
"""Between two questions to the workers; a round is over before the first."""

CHECK: Final = object()
"""What the timer puts into the engine core's input queue behind WAKEUP, which vLLM itself ignores."""


class Lease:
    """One engine core's switch. ``arm``, ``disarm`` and ``check`` are called on the core's loop.

    Args:
        wake: puts CHECK into the core's input queue; called on a timer's thread.
        left: given for how long the server has heard nothing of the daemon, seconds until the engine may resume; None:
            not as things are.
        paused: whether the scheduler is paused.
        resume: resumes it.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        wake: Callable[[], object],
        left: Callable[[float], float | None],
        paused: Callable[[], bool],
        resume: Callable[[], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wake, self._left, self._paused, self._resume, self._clock = wake, left, paused, resume, clock
        self._heard_at = clock()
        self._timer: threading.Timer | None = None

    def arm(self) -> None:
        """The daemon has begun an update session; its pause comes with it."""
        self.heard()
        if self._timer is None:
            self._schedule()

    def heard(self) -> None:
        """The daemon has called."""
        self._heard_at = self._clock()

    def disarm(self) -> None:
        """Somebody has resumed the engine."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def check(self) -> None:
        """The timer's look. Raises nothing: that would end the engine."""
        if self._timer is None:
            return  # disarmed while this look was in the queue
        try:
            left = self._left(self._clock() - self._heard_at) if self._paused() else None
            if left is not None and left <= 0:
                logger.warning(
                    "weightsync: the daemon is gone for longer than its lease; resuming with what is committed"
                )
                self._resume()
                self.disarm()
                return
        except Exception:
            logger.exception("weightsync: the lease of this engine cannot be judged; it stays paused for now")
        self._schedule()

    def _schedule(self) -> None:
        self._timer = threading.Timer(LOOK_SECONDS, self._wake)
        self._timer.daemon = True
        self._timer.start()


def lease_of(core: Any, left: Callable[[float], float | None]) -> Lease | None:
    """The switch of a vLLM engine core; None where it has no loop of its own or steps together with others."""
    if getattr(core, "input_queue", None) is None or getattr(core, "dp_group", None) is not None:
        return None
    from vllm.v1.engine import EngineCoreRequestType

    def wake() -> None:
        core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, CHECK))

    return Lease(wake, left, core.is_scheduler_paused, core.resume_scheduler)
