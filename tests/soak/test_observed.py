"""What a fleet of real processes tells of itself: one trace of each version."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest
from otlp_receiver import Received, collecting
from soak import Soak

ROUNDS = 2


def of_step(spans: list[Received], step: int) -> list[Received]:
    traces = {span.trace for span in spans if span.attributes.get("weightsync.step") == step}
    return [span for span in spans if span.trace in traces]


def complete(spans: list[Received]) -> bool:
    """Everything of the last version has come; each process sends its spans by itself."""
    names = Counter(span.name for span in of_step(spans, ROUNDS))
    return names["publish"] == 1 and names["round"] == 1 and names["switch"] == 2


@pytest.mark.e2e
@pytest.mark.timeout(120)
async def test_a_version_is_one_trace_from_publish_to_each_engines_switch(tmp_path: Path) -> None:
    async with collecting() as collector:
        names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "WEIGHTSYNC__TRACES__OTLP_ENDPOINT")
        soak = Soak(tmp_path, ROUNDS, restarts=0, seed=1, environment=dict.fromkeys(names, collector.endpoint))
        try:
            await asyncio.to_thread(soak.run)
            spans = of_step(await collector.until(complete), ROUNDS)
        finally:
            await asyncio.to_thread(soak.close)
    [root] = [span for span in spans if not span.parent]
    assert root.name == "publish"
    assert {span.trace for span in spans} == {root.trace}
    ids = {span.span: span for span in spans}
    assert len(ids) == len(spans), "no two spans have one id"
    assert all(span.parent in ids for span in spans if span is not root)
    [round_] = [span for span in spans if span.name == "round"]
    assert round_.parent == root.span
    told = {
        (span.name, span.attributes.get("weightsync.member"), ids[span.parent].name) for span in spans if span.parent
    }
    assert told >= {
        ("convert", "trainer/0", "publish"), ("write", "trainer/0", "round"),
        ("verify", "e0/0", "round"), ("verify", "e1/0", "round"),
        ("switch", "e0/0", "round"), ("switch", "e1/0", "round"),
        ("writing", None, "round"), ("pause engine", None, "round"),
    }  # fmt: skip
    assert {span.attributes["weightsync.engine"] for span in spans if span.name == "resume engine"} == {"e0", "e1"}
    assert root.start <= round_.start
    assert round_.end <= root.end + 10**9, "two clocks of one host"
    assert {span.resource["service.name"] for span in spans} == {
        "weightsync-orchestrator", "weightsync-trainer", "weightsync-inference",
    }  # fmt: skip
    assert {span.resource["weightsync.run"] for span in spans} == {"soak"}
    assert not any(span.failed for span in spans)
