"""A version on its way, and how it may fail."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from weightsync.agents.errors import AgentError
from weightsync.orchestrator.protocol.names import Version

log = logging.getLogger(__name__)

SAY_SECONDS: Final = 30.0
"""Between two log lines of a publish that waits: long beside a round, short beside a person's patience."""

LOOK_SECONDS: Final = 0.5
"""Between two looks of a publish that waits whether another rank has left it."""


class PublishError(AgentError, RuntimeError):
    """The version was not committed. The message says why and names the rank or engine at fault.

    A RuntimeError too, as training scripts expect of a step that failed.
    """


class BusyError(PublishError):
    """An earlier version still needs the slots: wait for its publication first, then try again."""

    fault = "trainer"
    retry = True


def _silence() -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Publication:
    """Handle of one version. ``wait`` may be called from any thread, and again.

    ``standing`` gives what the daemon does at the moment, as far as this rank knows; empty where it knows nothing.
    """

    version: Version
    _outcome: Future[int] = field(repr=False)
    _standing: Callable[[], str] = field(default=_silence, repr=False)

    def wait(self, seconds: float, look: Callable[[], None] | None = None) -> int:
        """The commit sequence number of the version; what the daemon waits for is logged every SAY_SECONDS.

        Args:
            seconds: total deadline.
            look: called every LOOK_SECONDS; what it raises ends the wait.

        Raises:
            PublishError: FAILED, with the reason; or nothing was decided within ``seconds``.
        """
        began = said = time.monotonic()
        while True:
            now = time.monotonic()
            remaining = began + seconds - now
            try:
                return self._outcome.result(timeout=max(0.0, min(remaining, LOOK_SECONDS)))
            except TimeoutError:
                if remaining <= 0:
                    standing = self._standing()
                    why = f"; the daemon: {standing}" if standing else ""
                    what = f"{self.version} was neither committed nor failed within {seconds:g} s{why}"
                    raise PublishError(what) from None
            if look is not None:
                look()
            if now - said >= SAY_SECONDS:
                said = now
                standing = self._standing() or "nothing heard of it"
                log.warning("%s waits for %.0f s; the daemon: %s", self.version, now - began, standing)

    def done(self) -> bool:
        """Whether the fate of the version is known."""
        return self._outcome.done()

    def committed(self) -> bool:
        """Whether it is known to be committed."""
        return self._outcome.done() and self._outcome.exception() is None
