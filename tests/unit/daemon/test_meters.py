"""What is counted, from real events and rows."""

from pathlib import Path

import msgspec
import pytest
from weightsync.orchestrator.core.commands import Refuse, Say
from weightsync.orchestrator.core.events import (
    AgentLost,
    Call,
    CallDone,
    CallFailed,
    PlanFacts,
    PlanReady,
    PlanRejected,
)
from weightsync.orchestrator.daemon.admin.views import LinkView, RoundRow
from weightsync.orchestrator.daemon.meters import Meters
from weightsync.orchestrator.protocol.messages import Refused
from weightsync.orchestrator.protocol.names import Member


@pytest.fixture
def meters() -> Meters:
    return Meters()


def value(meters: Meters, name: str, **labels: str) -> float | None:
    return meters.registry.get_sample_value(f"weightsync_{name}", labels)


def engines(meters: Meters, names: list[str], now: float) -> dict[tuple[str, str], float]:
    return {
        (family.name.removeprefix("weightsync_engine_"), sample.labels["engine"]): sample.value
        for family in meters.by_engine(names, now)
        for sample in family.samples
    }


def row(**fields: object) -> RoundRow:
    given: dict[str, object] = {"outcome": "committed", "attempt": 1, "bytes": 100} | fields
    return RoundRow(round="1.1", step=1, generation=7, **given)  # type: ignore[arg-type]


def test_rounds_by_outcome_with_their_costs(meters: Meters) -> None:
    assert value(meters, "rounds_total", outcome="failed", fault="network") == 0  # before any: a rate sees the first
    meters.ended(row(times_ms={"stall": 30.0, "writing": 20.0, "odd": 1.0}, wire_gb_per_s=12.5))
    meters.ended(row(outcome="failed", fault="network", attempt=2, left_out=("a", "b"), times_ms={"stall": 9e9}))
    meters.ended(row(left_out=("a",)))
    assert value(meters, "rounds_total", outcome="committed", fault="") == 2
    assert value(meters, "rounds_total", outcome="failed", fault="network") == 1
    assert value(meters, "round_retries_total") == 1
    assert value(meters, "moved_bytes_total") == 300
    assert value(meters, "round_seconds_sum", part="stall") == pytest.approx(0.03)
    assert value(meters, "round_seconds_count", part="writing") == 1
    assert value(meters, "round_seconds_bucket", part="stall", le="0.05") == 1
    assert value(meters, "round_seconds_bucket", part="stall", le="0.025") == 0
    assert value(meters, "wire_gigabytes_per_second_sum") == 12.5
    found = engines(meters, ["a", "b", "c"], 0.0)
    assert [found["left_out", name] for name in "abc"] == [2, 1, 0]


def test_what_each_kind_of_link_moved(meters: Meters) -> None:
    nic = LinkView(link="nic", edges=4, bytes=80, gb_per_s=40.0, slow_edges=3)
    meters.ended(row(links=(nic, LinkView(link="nvlink", edges=1, bytes=20, gb_per_s=0.0))))
    meters.ended(row(outcome="failed", fault="network", links=(msgspec.structs.replace(nic, slow_edges=0),)))
    assert value(meters, "link_moved_bytes_total", link="nic") == 160
    assert value(meters, "link_moved_bytes_total", link="nvlink") == 20
    assert value(meters, "link_gigabytes_per_second_sum", link="nic") == 80.0
    assert value(meters, "link_gigabytes_per_second_count", link="nvlink") is None, "it took no time"
    assert value(meters, "slow_edges", link="nic") == 0


def test_calls_and_how_long_an_engine_was_paused(meters: Meters) -> None:
    meters.happened(
        [CallDone(1, "a", Call.PAUSE, 1, 0.2, True), CallFailed(2, "b", Call.PAUSE, 1, "no", "network")], 10.0
    )
    meters.happened([CallDone(3, "a", Call.PROBE, 2, 0.1, True)], 12.0)  # found paused already: nothing begins anew
    assert engines(meters, ["a", "b"], 13.0)["paused_seconds", "a"] == 3.0  # of a pause that has not ended
    meters.happened([CallDone(4, "a", Call.FINISH, 3, 0.1, None), CallDone(5, "a", Call.RESUME, 4, 0.1, False)], 15.0)
    meters.happened([CallDone(6, "a", Call.PROBE, 5, 0.1, False)], 20.0)
    assert engines(meters, ["a", "b"], 30.0) == {
        ("paused_seconds", "a"): 5.0, ("paused_seconds", "b"): 0, ("left_out", "a"): 0, ("left_out", "b"): 0,
    }  # fmt: skip
    assert value(meters, "engine_calls_total", call="pause", outcome="done") == 1
    assert value(meters, "engine_calls_total", call="pause", outcome="network") == 1
    assert value(meters, "engine_call_seconds_sum", call="probe") == pytest.approx(0.2)


def test_an_engine_that_is_no_member_any_more_is_forgotten(meters: Meters) -> None:
    meters.happened([CallDone(1, "a", Call.PAUSE, 1, 0.2, True)], 10.0)
    assert engines(meters, [], 20.0) == {}
    assert engines(meters, ["a"], 30.0)["paused_seconds", "a"] == 0


def test_agents_plans_the_journal_and_the_loop(meters: Meters, tmp_path: Path) -> None:
    member = Member("inference", "a", 0)
    facts = PlanFacts("root", {}, {}, True, seconds=1.5)
    meters.happened(
        [AgentLost(1, member, 1, "gone"), PlanReady(2, 1, facts), PlanRejected(3, 2, "no", "a", "engine")], 0.0
    )
    meters.commanded([Refuse(member, 1, Refused(reason="no", fault="config", retry=False)), Say("info", "x")])
    meters.appended(3, 0.004)
    meters.late(-0.001)
    meters.late(0.4)
    assert value(meters, "agents_lost_total", role="inference") == 1
    assert value(meters, "plans_total", outcome="made") == value(meters, "plans_total", outcome="engine") == 1
    assert value(meters, "plan_seconds_sum") == 1.5
    assert value(meters, "agents_refused_total", fault="config") == 1
    assert value(meters, "journal_records_total") == 3
    assert value(meters, "journal_append_seconds_bucket", le="0.005") == 1
    assert value(meters, "loop_lag_seconds_count") == 2
    assert value(meters, "loop_lag_seconds_sum") == pytest.approx(0.4)
    journal = tmp_path / "journal"
    meters.journal_at(journal)
    assert value(meters, "journal_bytes") == 0
    journal.write_bytes(b"x" * 77)
    assert value(meters, "journal_bytes") == 77


def test_who_was_turned_away_by_kind(meters: Meters) -> None:
    counts = {"connection turned away": 3}
    meters.refusals_of(counts)
    counts["agent turned away"] = 1
    [family] = [family for family in meters.by_engine([], 0.0) if family.name == "weightsync_turned_away"]
    assert {sample.labels["kind"]: sample.value for sample in family.samples} == {
        "connection turned away": 3, "agent turned away": 1,
    }  # fmt: skip
