"""What a real fleet tells of faults: all that rules and dashboards ask for is there, and every trace has its end.

One fleet has an engine killed in a round, a version that FAILS for want of engines, and callers with wrong tokens.
"""

import asyncio
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from otlp_receiver import Received, collecting
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from several import SETTINGS, Several, StandIn

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

MONITORING = Path(__file__).resolve().parents[2] / "deploy" / "monitoring"
NAMES = ("e0", "e1")
FAILS = {
    "commit": {"patience_seconds": 2, "min_engines": 2},
    "deadlines": {**SETTINGS["deadlines"], "join_seconds": 5},
    "retry": {"backoff_seconds": 0.2, "give_up_seconds": 5},
}
"""Both engines are needed, and a version that has not got them fails soon."""


def asked() -> set[tuple[str, frozenset[str]]]:
    """Every series that a rule or a dashboard of metrics asks for, with the labels by which it is chosen."""
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    panels = json.loads((MONITORING / "grafana.json").read_text())["panels"]
    texts = [rule["expr"] for group in rules for rule in group["rules"]]
    texts += [target["expr"] for panel in panels for target in panel["targets"]]
    found = set()
    for text in texts:
        by = {word for words in re.findall(r"\bby \(([^)]*)\)", text) for word in words.replace(" ", "").split(",")}
        names = re.findall(r"\b((?:weightsync|process)_\w+)(?:\{([^}]*)\})?", text)
        for name, chosen in names:
            labels = set(re.findall(r"(\w+)(?:=|!)", chosen))
            # Of several in one expression, which one a "by" is about is not told apart.
            found.add((name, frozenset(labels | (by if len(names) == 1 else set())) - {"instance", "job"}))
    return found


def scraped(several: Several) -> list[Metric]:
    request = urllib.request.Request(f"{several.whole.url}/metrics", headers=several.whole._operator())
    with urllib.request.urlopen(request) as answer:
        return list(text_string_to_metric_families(answer.read().decode()))


def value(families: list[Metric], name: str, **labels: str) -> float:
    return sum(s.value for f in families for s in f.samples if s.name == name and labels.items() <= s.labels.items())


def refused(several: Several) -> None:
    """Somebody with a wrong token, who says so to the page's routes and to the agents' one."""
    for path in ("/status", "/metrics"):
        request = urllib.request.Request(several.whole.url + path, headers={"Authorization": "Bearer wrong"})
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(request)


def harm(several: Several) -> list[Metric]:
    """The faults, one after the other; what /metrics says while the engine is away, and at the end."""
    several.open()
    refused(several)
    failed = lose_an_engine(several)
    away = scraped(several)
    several.engines["e0"].start()
    several.whole.until(lambda: several.whole.engine("e0")["ranks_connected"], "the engine to be back")
    several.publish()
    assert failed not in several.committed
    return away


def lose_an_engine(several: Several) -> int:
    """Killed while its round writes: the round fails, is tried again, and its version FAILS. The version's step."""
    with several.stopped_at("hearing Closed") as step:
        several.engines["e0"].kill()
    told = several.trainer.hear()
    assert told["step"] == step
    assert told.get("error"), told
    return step


@pytest.fixture
def several(tmp_path: Path) -> Iterator[Several]:
    made = Several(tmp_path, [StandIn(name, tmp_path, mode="copy") for name in NAMES], {**SETTINGS, **FAILS})
    try:
        yield made
    finally:
        made.close()


async def test_rules_and_traces_of_a_real_fleet_with_faults(several: Several, monkeypatch: pytest.MonkeyPatch) -> None:
    async with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", collector.endpoint)
        several.daemon_env["WEIGHTSYNC__TRACES__OTLP_ENDPOINT"] = collector.endpoint
        away = await asyncio.to_thread(harm, several)
        families = await asyncio.to_thread(scraped, several)
        await collector.until(lambda spans: all_came(spans, several.committed[-1]))  # each process sends its own, late
    by_fault_of_each_rule(away, families)
    present = {sample.name: set() for family in families for sample in family.samples}
    for family in families:
        for sample in family.samples:
            present[sample.name] |= set(sample.labels)
    lacking = {name: labels - present.get(name, set()) for name, labels in asked() if name not in present}
    assert lacking == {}
    assert {(name, label) for name, labels in asked() for label in labels - present[name]} == set()
    closed(collector.spans, several)


def by_fault_of_each_rule(away: list[Metric], families: list[Metric]) -> None:
    assert value(away, "weightsync_engine_state", engine="e0", state="unreachable") == 1
    assert value(away, "weightsync_engine_serving_committed", engine="e0") == 0
    assert value(away, "weightsync_engine_behind_seconds", engine="e0") > 0
    assert value(away, "weightsync_agents_lost_total", role="inference") >= 1
    assert value(families, "weightsync_rounds_total", outcome="failed") >= 1
    assert value(families, "weightsync_engine_state", engine="e0", state="serving") == 1
    assert value(families, "weightsync_turned_away_total") >= 2
    assert value(families, "weightsync_journal_append_seconds_count") > 0
    assert value(families, "weightsync_loop_lag_seconds_count") > 0


def failures(spans: list[Received]) -> list[Received]:
    return [span for span in spans if span.name == "publish" and span.failed]


def all_came(spans: list[Received], step: int) -> bool:
    return bool(failures(spans)) and ends_well(spans, step) and not orphans(spans)


def ends_well(spans: list[Received], step: int) -> bool:
    mine = [span.name for span in spans if span.trace in traces_of(spans, step)]
    return mine.count("publish") == 1 and mine.count("switch") == len(NAMES)


def traces_of(spans: list[Received], step: int) -> set[str]:
    return {span.trace for span in spans if span.attributes.get("weightsync.step") == step}


def orphans(spans: list[Received]) -> list[Received]:
    """Spans of traces that have ended whose parent has not come."""
    ids, ended = {span.span for span in spans}, {span.trace for span in spans if not span.parent}
    return [span for span in spans if span.trace in ended and span.parent and span.parent not in ids]


def closed(spans: list[Received], several: Several) -> None:
    """Each span is below one that came, too; and what failed says why."""
    assert orphans(spans) == []
    (publish,) = failures(spans)
    rounds = [span for span in spans if span.trace == publish.trace and span.name == "round"]
    assert rounds, "the attempts at it"
    assert all(span.failed and span.attributes["weightsync.outcome"] == "failed" for span in rounds)
    good: dict[str, Any] = {span.trace: span for span in spans if span.name == "publish" and not span.failed}
    assert len(good) == len(several.committed)
