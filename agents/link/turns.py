"""How the threads of a process take turns with the interpreter while one of them writes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

SWITCH_SECONDS: Final = 0.0001
"""How long another thread may keep the interpreter from one that writes. Python's default of 5 ms is several times what
the copy of a chunk takes: beside a training loop that is bound by Python, a write took twice as long or more."""

HALF_MICROSECOND: Final = 5e-7
"""Python cuts the interval to whole microseconds; without it, what is put back could be one less each time."""


@contextmanager
def quick_turns() -> Iterator[None]:
    """The process's threads take turns every SWITCH_SECONDS, unless somebody else has a say in it meanwhile."""
    before = sys.getswitchinterval()
    if before <= SWITCH_SECONDS:
        yield
        return
    sys.setswitchinterval(SWITCH_SECONDS)
    during = sys.getswitchinterval()
    try:
        yield
    finally:
        if sys.getswitchinterval() == during:
            sys.setswitchinterval(before + HALF_MICROSECOND)
