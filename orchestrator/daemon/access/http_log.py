"""What the HTTP server says of requests that are none, or that broke: bounded, whatever their number."""

import logging
from typing import Final

from aiohttp.http_exceptions import HttpProcessingError
from weightsync.orchestrator.daemon.access.refusals import Refusals
from weightsync.orchestrator.protocol.text import clean

MAX_SHOWN: Final = 200
"""Characters of what was wrong with a request, which quotes it."""


class HttpLog(logging.Logger):
    """Stands in for the logger of aiohttp's server, which writes a traceback for each line that is no HTTP."""

    def __init__(self, refusals: Refusals) -> None:
        super().__init__("weightsync.http", logging.WARNING)
        self._refusals = refusals

    def handle(self, record: logging.LogRecord) -> None:
        """Takes what a logger would hand to its handlers."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            reason = clean(f"{type(error).__name__}: {error.message}", MAX_SHOWN)
            self._refusals.say("request turned away: no HTTP", reason=reason)
        elif isinstance(error, ConnectionError):
            self._refusals.say("a peer left before its answer", reason=clean(str(error), MAX_SHOWN))
        else:
            self._refusals.say("a request broke", reason=clean(record.getMessage(), MAX_SHOWN), exc_info=error)
