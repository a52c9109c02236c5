"""The daemon's log: for people on a terminal, JSON otherwise, one canonical line per round, and no secrets.

Everything goes to standard error, also what libraries say through the standard ``logging``.
"""

import logging
import re
import sys
from collections.abc import Mapping
from typing import Any, Final, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger
from weightsync.orchestrator.daemon.admin.views import RoundRow
from weightsync.orchestrator.settings.sections import LogSection

WITHHELD: Final = "[withheld]"

MIN_SECRET_CHARS: Final = 6
"""Shorter strings are in too many words to be searched for."""

_SECRET_KEY = re.compile(r"(^|_)(token|authorization|api_key|secret|password|passphrase|credentials?)$", re.IGNORECASE)
_BEARER = re.compile(r"(?i)\bbearer\s+\S+")

_secrets: set[str] = set()


def withhold(secret: str) -> None:
    """From now on no log line shows ``secret``, wherever it stands."""
    if len(secret) >= MIN_SECRET_CHARS:
        _secrets.add(secret)


def configure(settings: LogSection, stream: TextIO | None = None) -> None:
    """Sets up structlog and the standard ``logging``. ``stream`` defaults to standard error."""
    out = sys.stderr if stream is None else stream
    console = settings.format == "console" or (settings.format == "auto" and out.isatty())
    level: int = logging.getLevelNamesMapping()[settings.level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    # Tracebacks become text before the redaction, and show no local variables: both may hold a token.
    plain = structlog.dev.plain_traceback
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(colors=out.isatty(), exception_formatter=plain)
        if console
        else structlog.processors.JSONRenderer(default=str)
    )
    # Redaction comes last but one: it must see the finished texts, and everything that will be printed.
    rendering: list[Processor] = [structlog.processors.format_exc_info, _redact, renderer]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,  # or modules that logged already would keep the old configuration
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.PositionalArgumentsFormatter()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    # It tells of each change that it sees, our own markers among them, and of nothing else.
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    root = logging.getLogger()
    # A second call replaces what the first set up; handlers of others stay.
    for old in [h for h in root.handlers if getattr(h, "of_weightsync", False)]:
        root.removeHandler(old)
    handler.of_weightsync = True  # type: ignore[attr-defined]
    root.addHandler(handler)
    root.setLevel(level)


def round_line(row: RoundRow) -> None:
    """The one line that says what a round did, cost and why it ended so; fields as in ``RoundRow``."""
    logger = structlog.get_logger("weightsync.round")
    say = logger.info if row.outcome == "committed" else logger.warning
    fields = {name: value for name, value in row.fields().items() if value not in ("", None, ()) and name != "outcome"}
    say(f"round {row.outcome}", **fields)


def _redact(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    for key, value in event.items():
        event[key] = WITHHELD if _SECRET_KEY.search(key) else _clean(value)
    return event


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        for secret in _secrets:
            value = value.replace(secret, WITHHELD)
        return _BEARER.sub(f"Bearer {WITHHELD}", value)
    if isinstance(value, Mapping):
        return {key: WITHHELD if _SECRET_KEY.search(str(key)) else _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value if isinstance(value, int | float | bool | None) else _clean(str(value))
