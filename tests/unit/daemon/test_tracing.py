"""The daemon's spans; every time worked out by hand."""

from told_spans import KeptSpans
from weightsync.orchestrator.core.commands import CallEngine
from weightsync.orchestrator.core.events import Call
from weightsync.orchestrator.core.records import RoundEnded
from weightsync.orchestrator.daemon.tracing import UNTRACED, RoundTraces, traceparent
from weightsync.orchestrator.protocol.names import RoundName, Version
from weightsync.orchestrator.protocol.traces.context import child, of_version

VERSION, NAME = Version(7, 42), RoundName(3, 1)
ROOT = of_version("glm", VERSION)
ROUND = child(ROOT, "round 3.1")
SECOND = 10**9


def ended(outcome: str = "committed", reason: str = "", trace: str = ROOT) -> RoundEnded:
    return RoundEnded(
        round=NAME, version=VERSION, attempt=2, engines=("e0", "e1"), left_out=("e1",), outcome=outcome, reason=reason,
        bytes=10, descriptors=1, trace=trace,
        times={"total": 6.0, "pausing": 1.0, "writing": 3.0, "switching": 2.0, "stall": 5.0},
    )  # fmt: skip


def test_a_round_is_below_its_publish_and_its_phases_follow_each_other_below_it() -> None:
    sink = KeptSpans()
    RoundTraces(sink).ended(ended(), 100.0)
    assert [(span.name, span.parent, span.start / SECOND, span.end / SECOND) for span in sink.spans] == [
        ("round", ROOT, 94.0, 100.0), ("pausing", ROUND, 94.0, 95.0), ("writing", ROUND, 95.0, 98.0),
        ("switching", ROUND, 98.0, 100.0),
    ]  # fmt: skip
    first = sink.spans[0]
    assert (first.context, first.error) == (ROUND, "")
    assert first.attributes == {
        "weightsync.round": "3.1", "weightsync.step": 42, "weightsync.attempt": 2, "weightsync.kind": "publish",
        "weightsync.outcome": "committed", "weightsync.bytes": 10, "weightsync.engines": 2,
        "weightsync.left_out": "e1",
    }  # fmt: skip


def test_one_that_failed_says_why_and_one_without_a_publish_is_not_told() -> None:
    sink = KeptSpans()
    RoundTraces(sink).ended(ended("failed", "the wire broke"), 100.0)
    assert sink.spans[0].error == "the wire broke"
    sink.spans.clear()
    RoundTraces(sink).ended(ended(trace=""), 100.0)
    UNTRACED.ended(ended(), 100.0)
    assert sink.spans == []


def call(trace: str = ROUND) -> CallEngine:
    return CallEngine("e0", Call.SWITCH, 8, 1.0, NAME, VERSION, (), trace)


def test_a_call_is_below_the_round_and_its_server_is_told_its_context() -> None:
    sink, now = KeptSpans(), [5 * SECOND]
    traces = RoundTraces(sink, lambda: now[0])
    with traces.calling(call()) as calling:
        told = traceparent.get()
        now[0] += SECOND
        calling.error = "no answer"
    assert traceparent.get() == ""
    [span] = sink.spans
    assert (span.name, span.parent, span.context, span.error) == ("switch engine", ROUND, told, "no answer")
    assert (span.start, span.end) == (5 * SECOND, 6 * SECOND)
    assert span.attributes == {"weightsync.engine": "e0"}


def test_outside_of_a_round_no_context_is_told() -> None:
    sink = KeptSpans()
    with RoundTraces(sink).calling(call(trace="")):
        assert traceparent.get() == ""
    assert (sink.spans, traceparent.get()) == ([], "")
