"""Ctrl-C and SIGTERM wait for the end of a section that other ranks cannot leave alone."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_interrupts() -> Iterator[None]:
    """Signals that have a handler in Python are handled at the end of the section; a second one at once.

    For collectives: a rank that is interrupted between two of them leaves the others in the next one, where nobody can
    tell them. Python handles signals on the main thread alone, so elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def hold(number: int, frame: FrameType | None) -> None:
        held.append((number, frame))
        signal.signal(number, before[signal.Signals(number)])

    for number, handler in before.items():
        if callable(handler):
            signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in before.items():
            if callable(handler):
                signal.signal(number, handler)
        for first, frame in held[:1]:
            handler = before[signal.Signals(first)]
            assert callable(handler)
            handler(first, frame)
