"""Virtual time, and processes that live in it: they can be killed, stopped and thawed."""

import itertools
from collections.abc import Callable
from heapq import heappop, heappush

Work = Callable[[], None]


class VirtualTime:
    """``now`` in seconds. Two things of one instant happen in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Work]] = []
        self._next = itertools.count().__next__

    def at(self, when: float, work: Work) -> None:
        heappush(self._heap, (when, self._next(), work))

    def later(self, delay: float, work: Work) -> None:
        heappush(self._heap, (self.now + delay, self._next(), work))

    def run(self, until: float) -> None:
        """Let happen what happens until then."""
        heap, pop = self._heap, heappop
        while heap and heap[0][0] <= until:
            self.now, _, work = pop(heap)
            work()
        self.now = until


class Process:
    """Something with a process id. What it would do while it is stopped (SIGSTOP) it does when it is thawed."""

    def __init__(self, time: VirtualTime) -> None:
        self._time = time
        self.alive = True
        self.stopped = False
        self._backlog: list[Work] = []

    def do(self, work: Work) -> None:
        """As soon as it runs; never, if it is dead."""
        if not self.alive:
            return
        if self.stopped:
            self._backlog.append(work)
        else:
            work()

    def later(self, delay: float, work: Work) -> None:
        self._time.later(delay, lambda: self.do(work))

    def stop(self) -> None:
        self.stopped = True

    def thaw(self) -> None:
        self.stopped = False
        backlog, self._backlog = self._backlog, []
        for work in backlog:
            self.do(work)

    def die(self, *, silently: bool = False) -> None:
        self.alive = False
        self._backlog = []
