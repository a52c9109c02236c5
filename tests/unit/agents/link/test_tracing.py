"""An agent's spans, from what it hears and says; every time worked out by hand."""

import pytest
from told_spans import KeptSpans
from weightsync.agents.link import tracing
from weightsync.agents.link.tracing import MAX_OPEN, AgentTraces, span_sink
from weightsync.orchestrator.protocol.edges import PeerTransfer
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Closed,
    Commit,
    EngineStatus,
    Grant,
    Left,
    Outcome,
    Staged,
    Verified,
    Verify,
)
from weightsync.orchestrator.protocol.names import Member, RoundName, Version
from weightsync.orchestrator.protocol.traces.context import Span, child, of_rank, of_version
from weightsync.orchestrator.protocol.traces.export import TracesUnavailable

VERSION, NAME = Version(7, 42), RoundName(3, 1)
ROOT = of_version("glm", VERSION)
ROUND = child(ROOT, "round 3.1")
TRAINER, WORKER = Member("trainer", "", 0), Member("inference", "e0", 1)
SECOND = 10**9


class Clock:
    now = 100 * SECOND

    def __call__(self) -> int:
        return self.now


def traces_of(member: Member) -> tuple[AgentTraces, KeptSpans, Clock]:
    sink, clock = KeptSpans(), Clock()
    return AgentTraces("glm", member, sink, clock), sink, clock


def times(span: Span) -> tuple[float, float]:
    return span.start / SECOND, span.end / SECOND


def staged(trace: str) -> Staged:
    return Staged(version=VERSION, bytes=5, convert_seconds=2.0, digest_seconds=0.5, trace=trace)


def test_a_publish_begins_with_its_conversion_and_ends_with_its_outcome() -> None:
    traces, sink, clock = traces_of(TRAINER)
    traces.said(staged(ROOT))
    clock.now += 4 * SECOND
    traces.heard(Outcome(version=VERSION, committed=True, sequence=9))
    traces.heard(Outcome(version=VERSION, committed=True, sequence=9))
    convert, digest, publish = sink.spans
    assert [(span.name, *times(span)) for span in sink.spans] == [
        ("convert", 97.5, 99.5), ("digest slots", 99.5, 100.0), ("publish", 97.5, 104.0),
    ]  # fmt: skip
    assert (convert.parent, digest.parent, publish.context, publish.parent) == (ROOT, ROOT, ROOT, "")
    assert publish.attributes == {"weightsync.member": "trainer/0", "weightsync.step": 42, "weightsync.sequence": 9}


def test_another_rank_is_below_the_first_and_a_failure_says_why() -> None:
    traces, sink, _ = traces_of(Member("trainer", "", 5))
    traces.said(staged(of_rank(ROOT, 5)))
    traces.heard(Outcome(version=VERSION, committed=False, reason="torn"))
    publish = sink.spans[-1]
    assert (publish.context, publish.parent, publish.error) == (of_rank(ROOT, 5), ROOT, "torn")


def test_a_write_lasts_from_the_grant_to_the_last_closed() -> None:
    traces, sink, clock = traces_of(TRAINER)
    traces.heard(
        Grant(round=NAME, version=VERSION, fingerprint="f", members=(WORKER,), deadline_seconds=1, trace=ROUND)
    )
    moved = [PeerTransfer(WORKER, 10, 1, 0.5, (1, 2), link="nic"), PeerTransfer(TRAINER, 4, 1, 0.5, (1, 2), "gone")]
    clock.now += SECOND
    traces.said(Closed(round=NAME, peers=(moved[0],), final=False))
    clock.now += SECOND
    for _ in range(2):  # said again on another connection
        traces.said(Closed(round=NAME, peers=tuple(moved), final=True))
    [write] = sink.spans
    assert (write.name, write.parent, times(write), write.error) == ("write", ROUND, (100.0, 102.0), "gone")
    assert write.attributes == {
        "weightsync.member": "trainer/0", "weightsync.bytes": 14, "weightsync.peers": 2,
        "weightsync.links": "nic,unknown",
    }  # fmt: skip


def verified(traces: AgentTraces, clock: Clock) -> None:
    traces.heard(Verify(round=NAME, version=VERSION, deadline_seconds=1, trace=ROUND))
    clock.now += SECOND
    traces.said(Verified(round=NAME, digest=(1, 2), bytes=10, apply_seconds=0, digest_seconds=0))


def test_a_live_worker_switches_from_commit_to_left() -> None:
    traces, sink, clock = traces_of(WORKER)
    verified(traces, clock)
    clock.now += SECOND
    traces.heard(Commit(round=NAME, version=VERSION, trace=ROUND))
    clock.now += SECOND
    traces.said(Left(round=NAME, status=EngineStatus(applied=VERSION)))
    assert [(span.name, span.parent, *times(span), span.error) for span in sink.spans] == [
        ("verify", ROUND, 100.0, 101.0, ""), ("switch", ROUND, 102.0, 103.0, ""),
    ]  # fmt: skip


def test_a_shadow_worker_says_how_long_its_switch_and_its_audit_took() -> None:
    traces, sink, clock = traces_of(WORKER)
    verified(traces, clock)
    clock.now += 9 * SECOND
    traces.said(Left(round=NAME, status=EngineStatus(torn=True), switch_seconds=0.25, audit_seconds=2.0))
    assert [(span.name, *times(span), span.error) for span in sink.spans[1:]] == [
        ("switch", 107.75, 108.0, ""), ("audit", 108.0, 110.0, "torn"),
    ]  # fmt: skip


def test_a_round_that_is_given_up_ends_what_its_worker_had_begun() -> None:
    traces, sink, clock = traces_of(WORKER)
    traces.heard(Verify(round=NAME, version=VERSION, deadline_seconds=1, trace=ROUND))
    clock.now += SECOND
    traces.heard(Abort(round=NAME, torn=False, reason="e1 is gone"))
    traces.said(Left(round=NAME, status=EngineStatus()))
    assert [(span.name, *times(span), span.error) for span in sink.spans] == [("verify", 100.0, 101.0, "e1 is gone")]
    assert traces._open == {}


def test_what_an_agent_leaves_undone_ends_with_it_as_failed() -> None:
    traces, sink, clock = traces_of(TRAINER)
    traces.said(staged(ROOT))
    traces.heard(
        Grant(round=NAME, version=VERSION, fingerprint="f", members=(WORKER,), deadline_seconds=1, trace=ROUND)
    )
    clock.now += SECOND
    traces.close()
    assert [(span.name, span.parent, span.end / SECOND, span.error) for span in sink.spans[2:]] == [
        ("publish", "", 101.0, tracing.UNFINISHED), ("write", ROUND, 101.0, tracing.UNFINISHED),
    ]  # fmt: skip
    assert sink.closed


def test_what_has_no_context_or_never_ends_costs_nothing() -> None:
    traces, sink, _ = traces_of(WORKER)
    traces.heard(Verify(round=NAME, version=VERSION, deadline_seconds=1))
    traces.said(Verified(round=NAME, digest=(1, 2), bytes=10, apply_seconds=0, digest_seconds=0))
    traces.heard(Verify(round=NAME, version=VERSION, deadline_seconds=1, trace="no context"))
    traces.said(Left(round=NAME, status=EngineStatus()))
    assert sink.spans == []
    for number in range(5 * MAX_OPEN):
        traces.heard(Commit(round=RoundName(3, number), version=VERSION, trace=ROUND))
    assert len(traces._open) == MAX_OPEN
    silent = AgentTraces("glm", WORKER, None)
    silent.heard(Verify(round=NAME, version=VERSION, deadline_seconds=1, trace=ROUND))
    assert silent._open == {}
    silent.close()
    traces.close()
    assert sink.closed


def test_the_environment_says_whether_there_is_a_collector(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = []
    monkeypatch.setattr(tracing, "OtlpSpans", lambda endpoint, run, member: made.append((endpoint, run, member)))
    assert span_sink("glm", WORKER, {}) is None
    assert span_sink("glm", WORKER, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}) is None
    for name in tracing.VARIABLES:
        span_sink("glm", WORKER, {name: "http://collector:4318"})
    assert made == [(None, "glm", WORKER)] * 2

    def missing(*_: object) -> None:
        raise TracesUnavailable("install it")

    monkeypatch.setattr(tracing, "OtlpSpans", missing)
    assert span_sink("glm", WORKER, {tracing.VARIABLES[0]: "http://collector:4318"}) is None
    assert "e0/1: install it" in caplog.text
