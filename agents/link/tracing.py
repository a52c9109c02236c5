"""An agent's spans of each version, from what it hears and says; nothing where no collector is configured.

``OTEL_EXPORTER_OTLP_ENDPOINT`` or ``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`` in the environment configures one, as for any
program that speaks OTLP.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Final

from weightsync.orchestrator.protocol.messages import (
    Abort,
    Closed,
    Commit,
    FromAgent,
    FromDaemon,
    Grant,
    Left,
    Outcome,
    Staged,
    Verified,
    Verify,
)
from weightsync.orchestrator.protocol.names import Member, RoundName, Version
from weightsync.orchestrator.protocol.traces.context import Span, SpanSink, Value, child, is_context, of_version
from weightsync.orchestrator.protocol.traces.export import OtlpSpans, TracesUnavailable

log = logging.getLogger(__name__)

VARIABLES: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

MAX_OPEN: Final = 64
"""Spans whose end is waited for; one whose end never comes makes room for a newer one."""

NANO: Final = 10**9

UNFINISHED: Final = "the agent has left before its end"


def span_sink(run_id: str, member: Member, environ: Mapping[str, str] = os.environ) -> SpanSink | None:
    """Where this process's spans go; None where none are wanted, or OpenTelemetry is missing, which is logged."""
    if not any(environ.get(name) for name in VARIABLES):
        return None
    try:
        return OtlpSpans(None, run_id, member)
    except TracesUnavailable as error:
        log.warning("%s: %s", member, error)
        return None


class AgentTraces:
    """Belongs to the agent's thread. ``clock`` in unix nanoseconds."""

    def __init__(
        self, run_id: str, member: Member, sink: SpanSink | None, clock: Callable[[], int] = time.time_ns
    ) -> None:
        self._run_id, self._member, self._sink, self._clock = run_id, member, sink, clock
        self._open: dict[tuple[str, object], tuple[str, int]] = {}
        """What was begun: (what, round or version) → context of what it is done for, and when."""

    def heard(self, message: FromDaemon) -> None:
        """The daemon's word, before it is obeyed."""
        if self._sink is None:
            return
        match message:
            case Grant():
                self._begin("write", message.round, message.trace)
            case Verify():
                self._begin("verify", message.round, message.trace)
                self._begin("switch", message.round, message.trace)
            case Commit():
                self._begin("switch", message.round, message.trace)
            case Abort():  # nobody switches any more; what a writer has begun ends when it has closed
                self._end("verify", message.round, message.reason or "given up", {})
                self._open.pop(("switch", message.round), None)
            case Outcome():
                self._published(message)
            case _:
                pass

    def said(self, message: FromAgent) -> None:
        """A word to the daemon, as it is said."""
        if self._sink is None:
            return
        match message:
            case Staged():
                self._staged(message)
            case Closed(final=True):
                failed = message.error or next((peer.error for peer in message.peers if peer.error), "")
                about: dict[str, Value] = {
                    "weightsync.bytes": sum(peer.bytes for peer in message.peers),
                    "weightsync.peers": len(message.peers),
                    "weightsync.links": ",".join(sorted({peer.link for peer in message.peers})),
                }
                self._end("write", message.round, failed, about)
            case Verified():
                self._end("verify", message.round, message.error, {"weightsync.bytes": message.bytes})
            case Left():
                self._left(message)
            case _:
                pass

    def close(self) -> None:
        """Nothing more is heard or said: what has not ended ends here, as failed."""
        if self._sink is None:
            return
        for what, about in list(self._open):
            if isinstance(about, RoundName) and what != "switch":  # one that was due may never have begun
                self._end(what, about, UNFINISHED, {})
            elif isinstance(about, Version):
                self._published(Outcome(version=about, committed=False, reason=UNFINISHED))
        self._sink.close()

    def _begin(self, what: str, about: object, parent: str) -> None:
        if is_context(parent):
            self._open[what, about] = parent, self._clock()
            while len(self._open) > MAX_OPEN:
                del self._open[next(iter(self._open))]

    def _end(self, what: str, about: RoundName, error: str, attributes: Mapping[str, Value]) -> None:
        parent, began = self._open.pop((what, about), ("", 0))
        self._tell(what, parent, began, self._clock(), attributes, error)

    def _tell(
        self, what: str, parent: str, start: int, end: int, attributes: Mapping[str, Value] = {}, error: str = ""
    ) -> None:
        if parent and self._sink is not None:
            about = {"weightsync.member": str(self._member), **attributes}
            self._sink(Span(what, child(parent, f"{self._member} {what}"), parent, start, end, about, error))

    def _staged(self, message: Staged) -> None:
        now = self._clock()
        digests = now - int(message.digest_seconds * NANO)
        converts = digests - int(message.convert_seconds * NANO)
        self._begin("publish", message.version, message.trace)
        if message.trace:
            self._open["publish", message.version] = message.trace, converts
        self._tell("convert", message.trace, converts, digests, {"weightsync.bytes": message.bytes})
        self._tell("digest slots", message.trace, digests, now)

    def _published(self, message: Outcome) -> None:
        context, began = self._open.pop(("publish", message.version), ("", 0))
        if not context or self._sink is None:
            return
        root = of_version(self._run_id, message.version, message.restaged)
        about: dict[str, Value] = {
            "weightsync.member": str(self._member), "weightsync.step": message.version.step,
            "weightsync.sequence": message.sequence,
        }  # fmt: skip
        parent, error = "" if context == root else root, "" if message.committed else message.reason or "FAILED"
        self._sink(Span("publish", context, parent, began, self._clock(), about, error))

    def _left(self, message: Left) -> None:
        """One that serves through the round says how long its switch took, and the audit after it."""
        parent, began = self._open.pop(("switch", message.round), ("", 0))
        now, torn = self._clock(), "torn" if message.status.torn else ""
        if message.switch_seconds or message.audit_seconds:
            audits = now - int(message.audit_seconds * NANO)
            self._tell("switch", parent, audits - int(message.switch_seconds * NANO), audits)
            self._tell("audit", parent, audits, now, error=torn)
        else:
            self._tell("switch", parent, began, now, error=torn or message.fault)
