"""How many strangers are served a second: no more than leaves the loop to those who are known.

One costs a quarter of a millisecond from accept to end, ten times what it costs to turn it away. A fleet that returns
at once is within the burst. Once that is used up, or more come for a while than the pace, we are *besieged*: until
fewer come only a tenth of the pace is served on and on, and beyond that an address that had few in the last while, so
that whoever brings thousands from some addresses keeps no other out. So a siege costs what ``besieged`` and ``beyond``
say, whatever its size.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Final

MAX_ADDRESSES: Final = 4096
"""Of those that had some in one while, beyond which a new one is not remembered, and so not served beyond the pace."""


@dataclass(frozen=True, slots=True)
class PaceLimits:
    """``burst`` at once, and ``a_second`` on and on; ``besieged`` a second where more than that come.

    Meanwhile also ``few`` of one address in ``while_seconds``, and ``beyond`` a second of all such addresses.
    """

    burst: int = 4096
    a_second: float = 250.0
    besieged: float = 25.0
    few: int = 4
    beyond: float = 50.0
    while_seconds: float = 10.0

    def of_dearer(self, times: float) -> "PaceLimits":
        """The same cost, of strangers each of whom costs ``times`` as much; one at once at the least."""
        rates = {name: getattr(self, name) / times for name in ("a_second", "besieged")}
        return replace(self, burst=max(1, int(self.burst / times)), beyond=max(1.0, self.beyond / times), **rates)


class Pace:
    """One per door. ``now`` in seconds of one clock.

    Attributes:
        is_besieged: whether more come than ``a_second``.
    """

    def __init__(self, limits: PaceLimits, now: float) -> None:
        self.limits, self.is_besieged = limits, False
        self._left, self._left_beyond, self._at = float(limits.burst), limits.beyond, now
        self._recent: Counter[str] = Counter()
        self._came, self._began = 0, now

    def serves(self, address: str, now: float) -> bool:
        """One more comes from ``address``: whether it may be served."""
        self._refill(now)
        self._came += 1
        if self._left >= 1 or (self._left_beyond >= 1 and not self._had_its_few(address)):
            return True
        self.is_besieged = True
        return False

    def takes(self, address: str) -> bool:
        """One that may be served is; whether it is beyond the pace."""
        self._recent[address] += 1
        is_beyond = self._left < 1
        if is_beyond:
            self._left_beyond -= 1
        else:
            self._left -= 1
        return is_beyond

    def give_back(self, address: str, is_beyond: bool) -> None:
        """One from ``address`` has shown that it is none: it does not count. ``is_beyond``: as ``takes`` said."""
        if is_beyond:
            self._left_beyond += 1
        else:
            self._left += 1
        self._came -= 1
        self._recent[address] -= 1

    def _refill(self, now: float) -> None:
        limits, seconds = self.limits, now - self._at
        self._at = now
        if now - self._began >= limits.while_seconds:
            self.is_besieged = self._came > limits.a_second * (now - self._began)
            self._recent.clear()
            self._came, self._began = 0, now
        rate = limits.besieged if self.is_besieged else limits.a_second
        self._left = min(limits.burst, self._left + seconds * rate)
        self._left_beyond = min(limits.beyond, self._left_beyond + seconds * limits.beyond)

    def _had_its_few(self, address: str) -> bool:
        had = self._recent.get(address)
        return had >= self.limits.few if had is not None else len(self._recent) >= MAX_ADDRESSES
