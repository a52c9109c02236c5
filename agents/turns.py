"""How the threads of a process take turns with the interpreter while one of them writes, and what takes it from all."""

import ctypes
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

SWITCH_SECONDS: Final = 0.00002
"""How long another thread may keep the interpreter from one that writes. Python's default of 5 ms is several times what
the copy of a chunk takes: beside a training loop that is bound by Python, a write took twice as long or more."""

SLACK_NANOSECONDS: Final = 1_000
"""By how much the kernel may be late with what a writing thread waits for. Its default of 50 µs comes on top of each
wait for the interpreter."""

HALF_MICROSECOND: Final = 5e-7
"""Python cuts the interval to whole microseconds; without it, what is put back could be one less each time."""

PR_SET_TIMERSLACK, PR_GET_TIMERSLACK = 29, 30
"""Of Linux's ``prctl``; both are about the calling thread."""


def _prctl() -> Callable[..., int] | None:
    return ctypes.CDLL(None).prctl if sys.platform == "linux" else None


_call: Final = _prctl()


class _Shared:
    """A setting that several who overlap want: the first changes it, the last puts it back.

    Args:
        change: returns how to put it back.
    """

    def __init__(self, change: Callable[[], Callable[[], None]]) -> None:
        self._change = change
        self._users = 0
        self._back: Callable[[], None] = lambda: None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with _lock:
            if not self._users:
                self._back = self._change()
            self._users += 1
        try:
            yield
        finally:
            with _lock:
                self._users -= 1
                if not self._users:
                    self._back()


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.woken_in_time = _Shared(_less_slack)


@contextmanager
def quick_turns() -> Iterator[None]:
    """The process's threads take turns every SWITCH_SECONDS, unless somebody else has a say in it meanwhile, and the
    calling one is woken in time for its own. Several may overlap: the last one to end puts back what was before."""
    with _short_turns(), _of_thread.woken_in_time():
        yield


@contextmanager
def no_collection() -> Iterator[None]:
    """Python collects no garbage meanwhile, on no thread. Looking at all that torch brings takes 0.1 s."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _shorter_turns() -> Callable[[], None]:
    before = sys.getswitchinterval()
    if before <= SWITCH_SECONDS:
        return lambda: None
    sys.setswitchinterval(SWITCH_SECONDS)
    during = sys.getswitchinterval()

    def back() -> None:
        if sys.getswitchinterval() == during:
            sys.setswitchinterval(before + HALF_MICROSECOND)

    return back


def _less_slack() -> Callable[[], None]:
    before = timer_slack()
    if before <= SLACK_NANOSECONDS:
        return lambda: None
    timer_slack(SLACK_NANOSECONDS)

    def back() -> None:
        timer_slack(before)

    return back


def timer_slack(nanoseconds: int = 0) -> int:
    """Set the calling thread's, unless it is 0; what it is. 0 where there is none."""
    if _call is None:
        return 0
    if nanoseconds:
        _call(PR_SET_TIMERSLACK, ctypes.c_ulong(nanoseconds))
    return _call(PR_GET_TIMERSLACK)


_lock: Final = threading.Lock()
_short_turns: Final = _Shared(_shorter_turns)
_of_thread: Final = _OfThread()
