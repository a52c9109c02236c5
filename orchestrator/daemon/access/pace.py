"""How many strangers are served a second: no more than leaves the loop to those who are known.

One costs a quarter of a millisecond from accept to end, so that a few thousand a second are all that a core can do. A
fleet that returns at once is within the burst. Beyond the pace an address that had few in the last while is still
served, so that whoever brings thousands from some addresses keeps no other out.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Final

MAX_ADDRESSES: Final = 4096
"""That are served beyond the pace in one while."""


@dataclass(frozen=True, slots=True)
class PaceLimits:
    """``burst`` at once, and ``a_second`` on and on; beyond that ``few`` of one address in ``while_seconds``."""

    burst: int = 4096
    a_second: float = 250.0
    few: int = 16
    while_seconds: float = 10.0


class Pace:
    """One per door. ``now`` in seconds of one clock."""

    def __init__(self, limits: PaceLimits, now: float) -> None:
        self.limits = limits
        self._left, self._at = float(limits.burst), now
        self._recent: Counter[str] = Counter()
        self._began = now

    def takes(self, address: str, now: float) -> bool:
        """Whether one more from ``address`` is served; if so, it counts."""
        limits = self.limits
        self._left = min(limits.burst, self._left + (now - self._at) * limits.a_second)
        self._at = now
        if now - self._began >= limits.while_seconds:
            self._recent.clear()
            self._began = now
        if self._left >= 1:
            self._left -= 1
        elif self._recent[address] >= limits.few or len(self._recent) >= MAX_ADDRESSES:
            return False
        self._recent[address] += 1
        return True

    def give_back(self, address: str) -> None:
        """One from ``address`` has shown that it is none: it does not count."""
        self._left += 1
        self._recent[address] -= 1
