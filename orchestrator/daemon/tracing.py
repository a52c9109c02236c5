"""The daemon's spans of each version: the round, its phases, and each call to an engine."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from weightsync.orchestrator.core.commands import CallEngine
from weightsync.orchestrator.core.records import RoundEnded
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.protocol.traces.context import Span, SpanSink, Value, child

NANO: Final = 10**9

traceparent: ContextVar[str] = ContextVar("traceparent", default="")
"""W3C context of the call to an engine that is being made, which its server is told."""


@dataclass(slots=True)
class Calling:
    """A call under way; ``error``: why it has failed."""

    error: str = ""


class RoundTraces:
    """Nothing without a ``sink``. ``clock`` in unix nanoseconds."""

    def __init__(self, sink: SpanSink | None = None, clock: Callable[[], int] = time.time_ns) -> None:
        self._sink, self._clock = sink, clock

    def ended(self, record: RoundEnded, unix_time: float) -> None:
        """A round has ended: its span, and one of each phase that it was in, in their order."""
        if self._sink is None or not record.trace:
            return
        end = int(unix_time * NANO)
        began = end - int(record.times.get("total", 0.0) * NANO)
        name = str(record.round)
        context = child(record.trace, f"round {name}")
        about: dict[str, Value] = {
            "weightsync.round": name, "weightsync.step": record.version.step, "weightsync.attempt": record.attempt,
            "weightsync.kind": record.kind, "weightsync.outcome": record.outcome, "weightsync.bytes": record.bytes,
            "weightsync.engines": len(record.engines), "weightsync.left_out": ",".join(record.left_out[:8]),
        }  # fmt: skip
        error = record.reason if record.outcome != "committed" else ""
        self._sink(Span("round", context, record.trace, began, end, about, error))
        for phase in Phase:
            seconds = record.times.get(phase.value)
            if seconds is not None:
                until = began + int(seconds * NANO)
                self._sink(Span(phase.value, child(context, phase.value), context, began, until))
                began = until

    @contextmanager
    def calling(self, command: CallEngine) -> Iterator[Calling]:
        """Around a call to an engine, which is told its context as the header ``traceparent``."""
        call = Calling()
        context = child(command.trace, f"{command.engine} {command.call.value} {command.number}")
        began, before = self._clock(), traceparent.set(context)
        try:
            yield call
        finally:
            traceparent.reset(before)
            if self._sink is not None and context:
                about = {"weightsync.engine": command.engine}
                name = f"{command.call.value} engine"
                self._sink(Span(name, context, command.trace, began, self._clock(), about, call.error))


UNTRACED: Final = RoundTraces()
