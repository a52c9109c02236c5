"""The metrics of a status, read as Prometheus reads them."""

import json
import platform
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from weightsync.orchestrator.daemon.admin.views import (
    EngineView,
    ProblemView,
    RoundRow,
    StatusView,
    TrainerView,
    VersionView,
)
from weightsync.orchestrator.daemon.meters import Meters
from weightsync.orchestrator.daemon.metrics import StatusCollector, render
from weightsync.orchestrator.protocol.limits import SCHEMA_VERSION

COMMITTED = VersionView(step=40, generation=7, sequence=3, unix_time=900.5)
ROUND = RoundRow(
    round="2.9", step=40, generation=7, attempt=1, outcome="committed", engines=("a",), bytes=10**9,
    wire_gb_per_s=12.5, pause_ms=30, stall_ms=210, verify_ms=25, total_ms=220, switch_ms=2, skew_ms=4, unix_time=1000.0,
)  # fmt: skip
ENGINES = (
    EngineView(name="a", url="http://a", role="both", state="serving", paused=False, ranks_connected=2,
               ranks_expected=4, version=VersionView(step=40, generation=7)),
    EngineView(name='q"\n', url="http://b", role="decode", state="torn", torn=True),
)  # fmt: skip


ROOT = Path(__file__).parents[3]
ALERTS = ROOT / "deploy/monitoring/alerts.yaml"
DASHBOARD = ROOT / "deploy/monitoring/grafana.json"


def samples(status: StatusView, meters: Meters | None = None, now: float = 0.0) -> dict[tuple[str, ...], float]:
    """Of the status: value by name and label values; every family comes once."""
    families = list(StatusCollector(status, meters or Meters(), now).collect())
    assert len({family.name for family in families}) == len(families)
    return {
        (s.name.removeprefix("weightsync_"), *s.labels.values()): s.value
        for family in families
        if family.name != "weightsync_build_info"
        for s in family.samples
    }


def exposed() -> set[str]:
    """Names of all series, once everything has happened."""
    busy = StatusView(run="glm", state="", committed=COMMITTED, engines=ENGINES, rounds=(ROUND,))
    families = list(text_string_to_metric_families(render(busy, Meters(), 0.0).decode()))
    assert len({family.name for family in families}) == len(families)
    names = {family.name for family in families} | {s.name for family in families for s in family.samples}
    # A counter or histogram with labels has no series before the first event.
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return names | {family.name + end for family in families for end in suffixes.get(family.type, ())}


def test_a_daemon_that_has_committed() -> None:
    status = StatusView(
        run="glm", state="all is well", epoch=2, committed=COMMITTED, engines=ENGINES, rounds=(ROUND,), unix_time=960.5,
        problems=(ProblemView(severity="critical", what="torn"), ProblemView(severity="degraded", what="late")),
        trainers=tuple(TrainerView(rank=rank, state="ready") for rank in range(3)),
    )  # fmt: skip
    torn = ('q"\n', "decode")
    assert samples(status) == {
        ("epoch",): 2,
        ("started_timestamp_seconds",): 0,
        ("maintenance",): 0,
        ("round_running",): 0,
        ("problems", "critical"): 1,
        ("problems", "degraded"): 1,
        ("committed_step",): 40,
        ("committed_sequence",): 3,
        ("committed_timestamp_seconds",): 900.5,
        ("engine_torn", "a", "both"): 0,
        ("engine_torn", *torn): 1,
        ("engine_paused", "a", "both"): 0,
        ("engine_paused", *torn): -1,
        ("engine_serving_committed", "a", "both"): 1,
        ("engine_serving_committed", *torn): 0,
        ("engine_ranks_connected", "a", "both"): 2,
        ("engine_ranks_connected", *torn): 0,
        ("engine_ranks_expected", "a", "both"): 4,
        ("engine_ranks_expected", *torn): 0,
        ("engine_behind_seconds", "a", "both"): 0,
        ("engine_behind_seconds", *torn): 60,
        ("engine_state", "a", "serving"): 1,
        ("engine_state", torn[0], "torn"): 1,
        ("engine_state_timestamp_seconds", "a"): 0,
        ("engine_state_timestamp_seconds", torn[0]): 0,
        ("engine_step", "a"): 40,
        ("engine_paused_seconds_total", "a"): 0,
        ("engine_paused_seconds_total", torn[0]): 0,
        ("engine_left_out_total", "a"): 0,
        ("engine_left_out_total", torn[0]): 0,
        ("agents", "trainer", "ready"): 3,
        ("agents", "inference", ""): 2,
        ("versions_waiting",): 0,
        ("last_round_committed",): 1,
        ("last_round_bytes",): 10**9,
        ("last_round_timestamp_seconds",): 1000,
        ("last_round_seconds", "pause"): 0.03,
        ("last_round_seconds", "stall"): 0.21,
        ("last_round_seconds", "verify"): 0.025,
        ("last_round_seconds", "total"): 0.22,
        ("last_round_seconds", "switch"): 0.002,
        ("last_round_seconds", "skew"): 0.004,
    }


def test_a_daemon_that_has_done_nothing_yet() -> None:
    found = samples(StatusView(run="glm", state=""))
    assert set(found.values()) == {0}
    assert ("committed_timestamp_seconds",) in found  # so that its age is long, and an alert fires
    assert ("committed_step",) not in found


def test_the_release_is_told() -> None:
    text = render(StatusView(run="glm", state="", release="1.2.3"), Meters(), 0.0).decode()
    [told] = re.findall(r"^weightsync_build_info\{(.*)\} 1.0$", text, re.MULTILINE)
    labels = dict(re.findall(r'(\w+)="([^"]*)"', told))
    assert labels == {"release": "1.2.3", "python": platform.python_version(), "protocol_schema": str(SCHEMA_VERSION)}
    assert "process_resident_memory_bytes " in text


def test_the_number_of_series_is_bounded_by_the_engines_and_not_by_ranks() -> None:
    def fleet(engines: int, ranks: int) -> int:
        views = tuple(
            EngineView(name=f"e{n}", url="", role="both", state="serving", version=COMMITTED, ranks_connected=ranks)
            for n in range(engines)
        )
        trainers = tuple(TrainerView(rank=rank, state="ready", host=f"h{rank}") for rank in range(ranks))
        status = StatusView(run="glm", state="", committed=COMMITTED, engines=views, trainers=trainers, rounds=(ROUND,))
        return len(samples(status))

    one, many = fleet(1, 1), fleet(128, 1024)
    assert many - one == 127 * (one - fleet(0, 1))
    assert one - fleet(0, 1) <= 12


def test_alerts_and_dashboard_name_what_is_exposed() -> None:
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    asked = [rule["expr"] for rule in rules]
    dashboard = json.loads(DASHBOARD.read_text())
    asked += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {name for expr in asked for name in re.findall(r"\b(?:weightsync|process)_\w+", expr)}
    assert len(names) > 20
    assert names - exposed() == set()
    assert all(expr.count("(") == expr.count(")") and expr.count("{") == expr.count("}") for expr in asked)


@pytest.mark.parametrize(
    ("change", "serving"),
    [
        ({}, 1),
        ({"paused": True}, 0),
        ({"paused": None}, 0),
        ({"torn": True}, 0),
        ({"version": None}, 0),
        ({"version": VersionView(step=39, generation=7)}, 0),
        ({"version": VersionView(step=40, generation=6)}, 0),
    ],
)
def test_serving_the_committed_version_means_that_very_one_and_not_paused(
    change: dict[str, object], serving: int
) -> None:
    facts = {"version": VersionView(step=40, generation=7), "paused": False} | change
    engine = EngineView(name="a", url="http://a", role="both", state="", **facts)  # type: ignore[arg-type]
    status = StatusView(run="glm", state="", committed=COMMITTED, engines=(engine,))
    assert samples(status)["engine_serving_committed", "a", "both"] == serving
