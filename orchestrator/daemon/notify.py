"""What a supervisor is told: systemd's sd_notify(3), where one asks for it; nothing elsewhere.

The watchdog is fed only by work that was done. A daemon whose loop turns while its disk or its core stand still lets it
starve, and is started again.
"""

import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Final

import structlog

log = structlog.get_logger(__name__)

MEALS: Final = 3
"""In the watchdog's time: one that comes late, or is lost, is not yet a reason to end a daemon."""

MAX_STATUS_CHARS: Final = 200
"""Of the line that ``systemctl status`` shows."""


class Supervisor:
    """One per daemon; belongs to its loop. ``clock`` in seconds.

    Attributes:
        watched: seconds after which the supervisor ends a daemon that says nothing; None: it does not watch.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ, clock: Callable[[], float] = time.monotonic) -> None:
        place = environ.get("NOTIFY_SOCKET", "")
        # "@": a name without a file, in the abstract namespace of Linux. Other kinds (vsock) are for virtual machines.
        self._address = f"\0{place[1:]}" if place.startswith("@") else place if place.startswith("/") else ""
        self._clock = clock
        self._fed = -float("inf")
        self._failed = False
        self.watched = _watchdog(environ) if self._address else None

    def ready(self, status: str) -> None:
        """The daemon serves: whatever waits for it may start."""
        self._say("READY=1", f"STATUS={_line(status)}")

    def stopping(self, status: str) -> None:
        """It was told to end, and may take its time for it."""
        self._say("STOPPING=1", f"STATUS={_line(status)}")

    def works(self, status: str) -> None:
        """What was to be done until now is done. Call it often: it is passed on as often as the watchdog needs it."""
        now = self._clock()
        if self.watched is not None and now - self._fed >= self.watched / MEALS:
            self._fed = now
            self._say("WATCHDOG=1", f"STATUS={_line(status)}")

    def _say(self, *lines: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as out:
                out.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:  # a supervisor that hears nothing acts on that; the daemon goes on until then
            if not self._failed:
                log.warning("the supervisor cannot be told", socket=self._address.replace("\0", "@"), reason=str(error))
            self._failed = True
        else:
            self._failed = False


def _watchdog(environ: Mapping[str, str]) -> float | None:
    """Seconds, where this very process is watched (sd_watchdog_enabled(3))."""
    text = environ.get("WATCHDOG_USEC", "")
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(text) / 1e6 if text.isascii() and text.isdigit() and 0 < int(text) < 1 << 63 else None


def _line(text: str) -> str:
    return " ".join(text.split())[:MAX_STATUS_CHARS]
