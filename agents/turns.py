"""How the threads of a process take turns with the interpreter while one of them writes."""

import ctypes
import sys
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


@contextmanager
def quick_turns() -> Iterator[None]:
    """The process's threads take turns every SWITCH_SECONDS, unless somebody else has a say in it meanwhile, and the
    calling one is woken in time for its own."""
    before = sys.getswitchinterval()
    if before <= SWITCH_SECONDS:
        yield
        return
    sys.setswitchinterval(SWITCH_SECONDS)
    during = sys.getswitchinterval()
    try:
        with _woken_in_time():
            yield
    finally:
        if sys.getswitchinterval() == during:
            sys.setswitchinterval(before + HALF_MICROSECOND)


@contextmanager
def _woken_in_time() -> Iterator[None]:
    before = timer_slack()
    if before > SLACK_NANOSECONDS:
        timer_slack(SLACK_NANOSECONDS)
    try:
        yield
    finally:
        timer_slack(before)


def timer_slack(nanoseconds: int = 0) -> int:
    """Set the calling thread's, unless it is 0; what it is. 0 where there is none."""
    if _call is None:
        return 0
    if nanoseconds:
        _call(PR_SET_TIMERSLACK, ctypes.c_ulong(nanoseconds))
    return _call(PR_GET_TIMERSLACK)
