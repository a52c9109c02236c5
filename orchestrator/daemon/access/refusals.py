"""What is said of those who are not let in: enough to see who it is, whatever their number."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import structlog

log = structlog.get_logger(__name__)

WINDOW_SECONDS: Final = 60.0
LOUD: Final = 3
"""Lines of one kind of stranger within WINDOW_SECONDS; the others of that time are counted in one more."""

LOUD_OF_AGENTS: Final = 100
"""The same of agents that hold a token: a fleet that is lost is one story, and each of its hosts has its own reason."""


@dataclass(slots=True)
class _Window:
    began: float
    said: int = 0
    more: int = 0


class Refusals:
    """One per daemon. ``clock`` in seconds.

    Attributes:
        audited: told of the first of each kind within WINDOW_SECONDS, and of the others' number.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.audited: Callable[[str, Mapping[str, object]], None] = lambda kind, fields: None
        self._windows: dict[str, _Window] = {}
        self.counts: Counter[str] = Counter()
        """Of each kind, since the beginning."""

    def say(self, kind: str, loud: int = LOUD, **fields: object) -> None:
        """One refusal. ``kind`` is a constant of the code, so their number is bounded; ``loud`` of it are said."""
        self.sweep()
        self.counts[kind] += 1
        if kind not in self._windows:
            self.audited(kind, fields)
        window = self._windows.setdefault(kind, _Window(self._clock()))
        if window.said < loud:
            window.said += 1
            log.warning(kind, **fields)
        else:
            window.more += 1

    def sweep(self) -> None:
        """Say how many were not said in the windows that are over."""
        now = self._clock()
        for kind, window in list(self._windows.items()):
            if now - window.began >= WINDOW_SECONDS:
                del self._windows[kind]
                if window.said + window.more > 1:
                    self.audited(kind, {"further ones": window.said + window.more - 1})
                if window.more:
                    seconds = round(now - window.began, 1)
                    log.warning("further refusals", refusals=kind, more=window.more, seconds=seconds)
