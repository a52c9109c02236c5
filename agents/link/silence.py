"""How long a daemon has said nothing."""

import time
from collections.abc import Callable
from typing import Final

STEP_SECONDS: Final = 1.0
"""What one look counts at most: a process that stood still for an hour has not waited for an hour."""


class Silence:
    """Counts the seconds without a byte from the daemon in which this process ran and could have heard one.

    Args:
        clock: monotonic seconds.

    Attributes:
        seconds: since the last byte; may be read on any thread.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = 0.0
        self._clock = clock
        self._looked_at = clock()
        self._heard_at = 0.0

    def look(self, heard_at: float) -> None:
        """Count on, to be called several times a second; ``heard_at``: when the last byte came, on the same clock."""
        now = self._clock()
        if heard_at > self._heard_at:
            self._heard_at, self.seconds = heard_at, 0.0
        else:
            self.seconds += min(now - self._looked_at, STEP_SECONDS)
        self._looked_at = now
