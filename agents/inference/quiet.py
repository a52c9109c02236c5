"""A thread for what computes beside an engine that serves: one thing at a time, at low priority."""

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import torch
from weightsync.agents.turns import quick_turns

log = logging.getLogger(__name__)

NICE: Final = 10
"""Added to the thread's niceness where it computes itself: on a busy core it gets a tenth of what the engine's threads
get, never nothing. One that launches kernels keeps its own: it would hold the interpreter while it waits for a core."""


class Quiet:
    """The thread; it begins with the first thing to do. Call it with that.

    While it has something to do that is waited for, the process's threads take quick turns: a device computes for it
    in milliseconds, and an engine whose steps are bound by Python would keep it from the interpreter for 5 ms before
    and after.

    Args:
        device: on CUDA the thread has a stream of its own, of the lowest priority, so that it never waits in front of
            a batch.
        waited_for: whether anybody waits for what it does.
    """

    def __init__(self, device: torch.device, *, waited_for: bool = True) -> None:
        self._device = device
        self._turns = quick_turns if waited_for else contextlib.nullcontext
        self._thread = ThreadPoolExecutor(1, "weightsync beside", self._begin)

    def __call__(self, work: Callable[[], None]) -> None:
        """Do ``work`` when everything before is done; what it raises is logged."""
        self._thread.submit(self._perform, work)

    def _begin(self) -> None:
        if self._device.type != "cuda":
            with contextlib.suppress(OSError, AttributeError):  # a system that knows no priorities of threads
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        else:
            torch.cuda.set_device(self._device)
            stream: Any = torch.cuda.Stream  # torch has no types for it
            torch.cuda.set_stream(stream(self._device))  # 0, the priority by default, is the lowest

    def _perform(self, work: Callable[[], None]) -> None:
        try:
            with self._turns():
                work()
        except Exception:
            log.exception("weightsync: a thread beside the engine failed")
