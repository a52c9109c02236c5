"""The metrics of a status, read as Prometheus reads them."""

import pytest
from prometheus_client.parser import text_string_to_metric_families
from weightsync.orchestrator.daemon.admin.views import EngineView, ProblemView, RoundRow, StatusView, VersionView
from weightsync.orchestrator.daemon.metrics import render

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


def samples(status: StatusView) -> dict[tuple[str, ...], float]:
    """Value by name and label values; every family is a gauge and comes once."""
    families = list(text_string_to_metric_families(render(status).decode()))
    assert len({family.name for family in families}) == len(families)
    assert {family.type for family in families} == {"gauge"}
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_a_daemon_that_has_committed() -> None:
    status = StatusView(
        run="glm", state="all is well", epoch=2, committed=COMMITTED, engines=ENGINES, rounds=(ROUND,),
        problems=(ProblemView(severity="critical", what="torn"), ProblemView(severity="degraded", what="late")),
    )  # fmt: skip
    torn = ('q"\n', "decode")
    assert samples(status) == {
        ("weightsync_epoch",): 2,
        ("weightsync_round_running",): 0,
        ("weightsync_problems", "critical"): 1,
        ("weightsync_problems", "degraded"): 1,
        ("weightsync_committed_step",): 40,
        ("weightsync_committed_sequence",): 3,
        ("weightsync_committed_unix_seconds",): 900.5,
        ("weightsync_engine_torn", "a", "both"): 0,
        ("weightsync_engine_torn", *torn): 1,
        ("weightsync_engine_paused", "a", "both"): 0,
        ("weightsync_engine_paused", *torn): -1,
        ("weightsync_engine_serving_committed", "a", "both"): 1,
        ("weightsync_engine_serving_committed", *torn): 0,
        ("weightsync_engine_ranks_connected", "a", "both"): 2,
        ("weightsync_engine_ranks_connected", *torn): 0,
        ("weightsync_engine_ranks_expected", "a", "both"): 4,
        ("weightsync_engine_ranks_expected", *torn): 0,
        ("weightsync_last_round_committed",): 1,
        ("weightsync_last_round_bytes",): 10**9,
        ("weightsync_last_round_unix_seconds",): 1000,
        ("weightsync_last_round_seconds", "pause"): 0.03,
        ("weightsync_last_round_seconds", "stall"): 0.21,
        ("weightsync_last_round_seconds", "verify"): 0.025,
        ("weightsync_last_round_seconds", "total"): 0.22,
        ("weightsync_last_round_seconds", "switch"): 0.002,
        ("weightsync_last_round_seconds", "skew"): 0.004,
    }


def test_a_daemon_that_has_done_nothing_yet() -> None:
    empty = StatusView(run="glm", state="")
    none = {("weightsync_problems", severity): 0 for severity in ("critical", "degraded")}
    assert samples(empty) == {("weightsync_epoch",): 0, ("weightsync_round_running",): 0, **none}


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
    assert samples(status)["weightsync_engine_serving_committed", "a", "both"] == serving
