"""Spans to an OpenTelemetry collector, by OTLP over HTTP. OpenTelemetry is imported when there is one to send to."""

import threading
from typing import TYPE_CHECKING, Final

from weightsync.orchestrator.protocol.names import Member
from weightsync.orchestrator.protocol.text import clean
from weightsync.orchestrator.protocol.traces.context import Span, ids

if TYPE_CHECKING:
    pass

QUEUED_SPANS: Final = 4096
"""A round of 128 engines makes about 700; of more than a collector takes, the newest are dropped."""

BATCH: Final = 512

DELAY_MILLISECONDS: Final = 1000

EXPORT_SECONDS: Final = 5.0
"""Of one request. The daemon's end waits for one at most."""


class TracesUnavailable(RuntimeError):
    """OpenTelemetry is not installed; the message says what to do."""


class OtlpSpans:
    """A SpanSink. A thread of OpenTelemetry's own sends what is added; what cannot be sent is logged by it and lost.

    Args:
        endpoint: URL that spans are posted to, such as ``http://collector:4318/v1/traces``; None: as the standard
            variables ``OTEL_EXPORTER_OTLP_…`` say.
        run_id: of the spans' run.
        member: whose spans they are; None: the daemon's.

    Raises:
        TracesUnavailable: OpenTelemetry's SDK or its exporter is not installed.
    """

    def __init__(self, endpoint: str | None, run_id: str, member: Member | None = None) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise TracesUnavailable(
                f"traces are to be sent, and OpenTelemetry is not installed ({error}):"
                " pip install 'weightsync-orchestrator[otel]'"
            ) from error
        about = {
            "service.name": "weightsync-orchestrator" if member is None else f"weightsync-{member.role}",
            "service.instance.id": str(member or "daemon"),
            "weightsync.run": run_id,
        }
        self._resource = Resource.create(about)
        self._processor: BatchSpanProcessor = BatchSpanProcessor(
            OTLPSpanExporter(endpoint, timeout=EXPORT_SECONDS),
            max_queue_size=QUEUED_SPANS,
            max_export_batch_size=BATCH,
            schedule_delay_millis=DELAY_MILLISECONDS,
        )

    def __call__(self, span: Span) -> None:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

        def context(told: str) -> SpanContext:
            return SpanContext(*ids(told), is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))

        self._processor.on_end(
            ReadableSpan(
                span.name,
                context(span.context),
                context(span.parent) if span.parent else None,
                self._resource,
                span.attributes,
                kind=SpanKind.INTERNAL,
                status=Status(StatusCode.ERROR, clean(span.error)) if span.error else Status(StatusCode.OK),
                start_time=span.start,
                end_time=max(span.start, span.end),
                instrumentation_scope=InstrumentationScope("weightsync"),
            )
        )

    def close(self) -> None:
        """Send what is left, within EXPORT_SECONDS; later spans are dropped."""
        # OpenTelemetry's own waits for half a minute if the collector does not answer.
        last = threading.Thread(target=self._processor.shutdown, name="weightsync last spans", daemon=True)
        last.start()
        last.join(EXPORT_SECONDS)
