"""Spans arrive at a real OTLP receiver as they were told; without a collector nothing of it is imported."""

import asyncio
import socket
import subprocess
import sys
import time

import pytest
from otlp_receiver import collecting
from weightsync.orchestrator.protocol.names import Member, Version
from weightsync.orchestrator.protocol.traces import export
from weightsync.orchestrator.protocol.traces.context import Span, child, of_version
from weightsync.orchestrator.protocol.traces.export import OtlpSpans, TracesUnavailable

ROOT = of_version("glm", Version(7, 42))


async def test_what_is_told_arrives() -> None:
    async with collecting() as collector:
        sink = OtlpSpans(collector.endpoint, "glm", Member("inference", "e0", 3))
        failed = child(ROOT, "write")
        sink(Span("publish", ROOT, "", 1_000, 9_000, {"weightsync.step": 42}))
        sink(Span("write", failed, ROOT, 2_000, 1_500, {"weightsync.bytes": 2**40}, "the peer\nis gone"))
        await asyncio.to_thread(sink.close)
        publish, write = await collector.until(lambda spans: len(spans) == 2)
    assert (publish.trace, publish.span, publish.parent) == (ROOT[3:35], ROOT[36:52], "")
    assert (write.trace, write.span, write.parent) == (ROOT[3:35], failed[36:52], publish.span)
    assert (publish.name, publish.start, publish.end, publish.failed) == ("publish", 1_000, 9_000, "")
    assert (write.name, write.start, write.end) == ("write", 2_000, 2_000), "no span ends before it begins"
    assert write.failed == "the peer is gone"
    assert (publish.attributes, write.attributes) == ({"weightsync.step": 42}, {"weightsync.bytes": 2**40})
    assert publish.resource["service.name"] == "weightsync-inference"
    assert publish.resource["service.instance.id"] == "e0/3"
    assert publish.resource["weightsync.run"] == "glm"


def test_a_collector_that_is_not_there_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "EXPORT_SECONDS", 0.2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        sink = OtlpSpans(f"http://127.0.0.1:{taken.getsockname()[1]}/v1/traces", "glm")
        began = time.monotonic()
        for number in range(3 * export.QUEUED_SPANS):
            sink(Span("write", child(ROOT, str(number)), ROOT, 0, 1))
        sink.close()
        assert time.monotonic() - began < 10


def test_without_opentelemetry_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(TracesUnavailable, match=r"pip install 'weightsync-orchestrator\[otel\]'"):
        OtlpSpans(None, "glm")


def test_nothing_of_it_is_imported_before_there_is_a_sink() -> None:
    look = (
        "import sys, weightsync.orchestrator.daemon.runner, weightsync.agents.link.thread;"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
