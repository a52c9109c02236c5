"""When an agent's thread looks after its transport, which has neither a file descriptor nor a callback to wait for."""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from weightsync.agents.turns import quick_turns

log = logging.getLogger(__name__)

IDLE_SECONDS: Final = 0.01
"""Between polls when nothing is expected: only warm-ups of peers wait for it."""

BUSY_SECONDS: Final = 0.001
"""While a grant is open on either side."""

SAY_SECONDS: Final = 10.0
"""Between two words in the log about polls that fail."""


class Polling:
    """Polls as long as it runs; of the event loop that runs it.

    While it is busy the process's threads take quick turns: whoever writes here waits for what is said of each chunk,
    and an engine whose steps are bound by Python would keep this thread from the interpreter for 5 ms at a time.

    Args:
        poll: looks after the transport; whether something is to come soon.
    """

    def __init__(self, poll: Callable[[], bool]) -> None:
        self._poll = poll
        self._woken = asyncio.Event()
        self._say_at = 0.0

    def wake(self) -> None:
        """Something may have become busy: poll now."""
        self._woken.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            self._woken.clear()
            if self._look():
                await self._busy()
            with suppress(TimeoutError):
                async with asyncio.timeout(IDLE_SECONDS):
                    await self._woken.wait()

    async def _busy(self) -> None:
        with quick_turns():
            busy = True
            while busy:
                await asyncio.sleep(BUSY_SECONDS)
                busy = self._look()

    def _look(self) -> bool:
        """Poll. One that fails costs what it was about: were it the last one, this process would answer heartbeats and
        nothing else, and every round would wait for it."""
        try:
            return self._poll()
        except Exception:
            if time.monotonic() >= self._say_at:
                self._say_at = time.monotonic() + SAY_SECONDS
                log.exception("a look at the transport has failed; the next one follows")
            return False
