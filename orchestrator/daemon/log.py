"""The daemon's log: for people on a terminal, JSON otherwise, one canonical line per round, and no secrets.

Everything goes to standard error, also what libraries say through the standard ``logging``.
"""

import logging
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger
from weightsync.orchestrator.core.commands import Say
from weightsync.orchestrator.daemon.admin.views import RoundRow
from weightsync.orchestrator.protocol.names import Version
from weightsync.orchestrator.settings.sections import LogSection

WITHHELD: Final = "[withheld]"

MIN_SECRET_CHARS: Final = 6
"""Shorter strings are in too many words to be searched for."""

WINDOW_SECONDS: Final = 60.0

MAX_LINES: Final = 1000
"""Of one event within WINDOW_SECONDS: nobody reads more, and whoever holds a token, or may write the run directory,
could otherwise fill the disk. A fleet that pushes a version each second says some 300."""

_SECRET_KEY = re.compile(r"(^|_)(token|authorization|api_key|secret|password|passphrase|credentials?)$", re.IGNORECASE)
_BEARER = re.compile(r"(?i)\bbearer\s+\S+")

_secrets: set[str] = set()
_run = ""


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
    renderers: list[Processor] = (
        [_sentence_first, structlog.dev.ConsoleRenderer(colors=out.isatty(), exception_formatter=plain)]
        if console
        else [structlog.processors.JSONRenderer(default=str)]
    )
    # Redaction comes before them: it must see the finished texts, and everything that will be printed.
    rendering: list[Processor] = [_of_run, structlog.processors.format_exc_info, _redact, *renderers]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,  # or modules that logged already would keep the old configuration
    )
    handler = logging.StreamHandler(out)
    formatter = _ForJournald if in_journal(out) else structlog.stdlib.ProcessorFormatter
    handler.addFilter(_Bounded(time.monotonic))
    handler.setFormatter(
        formatter(
            foreign_pre_chain=[
                *shared,
                structlog.stdlib.add_logger_name,
                structlog.stdlib.PositionalArgumentsFormatter(),
            ],
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


def about(run_id: str) -> None:
    """From now on each line says that it is of this run."""
    global _run
    _run = run_id


def say(command: Say) -> None:
    """A sentence of the core under the name of its event."""
    fields = {
        "engine": command.engine, "round": str(command.round or ""),
        "version": "" if command.version is None else str(command.version),
    }  # fmt: skip
    told = {name: value for name, value in fields.items() if value}
    level = logging.getLevelNamesMapping()[command.level.upper()]
    structlog.get_logger("weightsync").log(level, command.event, message=command.sentence, cause=command.cause, **told)


def round_line(row: RoundRow) -> None:
    """The one line that says what a round did, cost and why it ended so; fields as in ``RoundRow``."""
    logger = structlog.get_logger("weightsync.round")
    say = logger.info if row.outcome == "committed" else logger.warning
    fields = {name: value for name, value in row.fields().items() if value not in ("", None, ()) and name != "outcome"}
    say(f"round {row.outcome}", version=str(Version(row.generation, row.step)), **fields)


PRIORITIES: Final = {"CRITICAL": 2, "ERROR": 3, "WARNING": 4, "INFO": 6, "DEBUG": 7}
"""Of syslog, which journald reads off the beginning of a line: ``journalctl -p warning`` finds what hurts."""


def in_journal(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether ``stream`` goes to journald, as systemd says in JOURNAL_STREAM (systemd.exec(5))."""
    try:
        about = os.fstat(stream.fileno())
    except (OSError, ValueError):  # it is no file
        return False
    return environ.get("JOURNAL_STREAM") == f"{about.st_dev}:{about.st_ino}"


class _Bounded(logging.Filter):
    """Lets MAX_LINES of each event through within WINDOW_SECONDS, and one line that counts the others.

    Of what a library says its logger's name stands for the event: the number of events is bounded, too.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock, self._began, self._lock = clock, clock(), threading.Lock()
        self._lines: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is printed. Those of many threads come here."""
        now, over = self._clock(), Counter[str]()
        kind = str(record.msg.get("event", "")) if isinstance(record.msg, dict) else record.name
        with self._lock:
            if now - self._began >= WINDOW_SECONDS:
                over, self._lines, self._began = self._lines, Counter(), now
            self._lines[kind] += 1
            lets = self._lines[kind] <= MAX_LINES
        for other, lines in over.items():
            if lines > MAX_LINES:
                structlog.get_logger(__name__).warning("further lines", lines=other, more=lines - MAX_LINES)
        return lets


class _ForJournald(structlog.stdlib.ProcessorFormatter):
    """Each line begins with its priority."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{PRIORITIES.get(record.levelname, 6)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())


def _of_run(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    if _run:
        event.setdefault("run", _run)
    return event


def _sentence_first(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """On a terminal a sentence says more than the name of its event, and there is one run."""
    event.pop("run", None)
    event["event"] = event.pop("message", event["event"])
    return event


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
