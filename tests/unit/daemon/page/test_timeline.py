"""Moments of a round, taken from what the real core is told."""

from typing import Any

import pytest
from fleets import BYTES_PER_EDGE, rank, trainer
from weightsync.orchestrator.core.events import Call
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.daemon.page import timeline as timelines
from weightsync.orchestrator.daemon.page.timeline import EdgeRate, TimeLane
from weightsync.orchestrator.protocol.messages import Exposed, Quiesced

TRAINER = trainer()


def lanes(lanes: tuple[TimeLane, ...]) -> dict[str, TimeLane]:
    return {lane.name: lane for lane in lanes}


def test_there_is_nothing_before_the_first_round(watch: Any) -> None:
    fleet = watch.joined()
    assert fleet.timeline.view(fleet.now) is None
    assert fleet.timeline.rates() == ()


def test_phases_follow_each_other_without_a_gap(watch: Any) -> None:
    fleet = watch()
    fleet.to(Phase.VERIFYING)
    seen = fleet.timeline.view(fleet.now)
    assert (seen.kind, seen.attempt, seen.over, seen.phase) == ("publish", 1, False, "verifying")
    names = [name for name, _ in seen.phases]
    assert names == ["pausing", "quiescing", "marking", "exposing", "writing", "verifying"]
    at = [begin for _, begin in seen.phases]
    assert at[0] == 0.0
    assert at == sorted(at)
    assert at[-1] <= seen.elapsed
    # Two ranks say Quiesced, a tenth of a second each; the record is one event.
    assert at[2] - at[1] == pytest.approx(0.2)
    assert at[3] - at[2] == pytest.approx(0.1)


def test_each_rank_has_its_own_marks(watch: Any) -> None:
    fleet = watch()
    going = fleet.to(Phase.QUIESCING)
    began = going.began
    fleet.says(rank("e0", 1), Quiesced(round=going.name))
    at = round(fleet.now - began, 3)
    seen = lanes(fleet.timeline.view(fleet.now).ranks)
    assert seen["e0/1"].marks == {"quiesced": at}
    assert seen["e0/0"].marks == {}
    assert seen["e0/0"].engine == "e0"


def test_whoever_is_behind_comes_first(watch: Any) -> None:
    fleet = watch()
    going = fleet.to(Phase.QUIESCING)
    fleet.says(rank("e0", 0), Quiesced(round=going.name))
    assert [lane.name for lane in fleet.timeline.view(fleet.now).ranks] == ["e0/1", "e0/0"]


def test_engines_say_since_when_they_stand_still_and_when_they_serve(watch: Any) -> None:
    fleet = watch()
    fleet.to(Phase.RECORDING)
    seen = fleet.timeline.view(fleet.now)
    marks = lanes(seen.engines)["e0"].marks
    assert marks["asked"] == 0.0
    assert marks["asked"] < marks["pause"] < marks["finish"] < marks["resume"] <= marks["serves"] <= seen.elapsed
    assert lanes(seen.engines)["e0"].lands == "live"


def test_a_writer_shows_what_it_moved_and_its_edges_keep_their_rate(watch: Any) -> None:
    fleet = watch()
    fleet.to(Phase.RECORDING)
    writer = lanes(fleet.timeline.view(fleet.now).writers)["trainer/0"]
    assert (writer.bytes, writer.seconds) == (2 * BYTES_PER_EDGE, 0.01)
    assert list(writer.marks) == ["closed"]
    assert fleet.timeline.rates() == ()
    fleet.durable()
    assert fleet.timeline.rates() == (
        EdgeRate("trainer/0", "e0/0", BYTES_PER_EDGE, 0.01),
        EdgeRate("trainer/0", "e0/1", BYTES_PER_EDGE, 0.01),
    )


def test_a_round_that_is_over_stays_as_it_ended(watch: Any) -> None:
    fleet = watch()
    fleet.to(Phase.RECORDING)
    fleet.durable()
    ended = fleet.timeline.view(fleet.now)
    assert (ended.over, ended.decided) == (True, True)
    changes = fleet.timeline.changes
    fleet.passes(100.0)
    later = fleet.timeline.view(fleet.now)
    assert later == ended
    assert fleet.timeline.changes == changes


def test_a_round_that_is_given_up_says_why(watch: Any) -> None:
    fleet = watch()
    fleet.to(Phase.PAUSING)
    fleet.fails("e0", Call.PAUSE, "no route")
    ended = fleet.timeline.view(fleet.now)
    assert (ended.over, ended.decided) == (True, False)
    assert "no route" in ended.reason
    assert "no route" in lanes(ended.engines)["e0"].trouble


def test_words_of_another_round_leave_no_mark(watch: Any) -> None:
    fleet = watch()
    going = fleet.to(Phase.RECORDING)
    fleet.durable()
    fleet.stage(2)
    fleet.settle()
    fleet.says(rank("e0", 0), Exposed(round=going.name))
    seen = fleet.timeline.view(fleet.now)
    assert seen.version.step == 2
    assert all(lane.marks == {} for lane in seen.ranks)


def test_a_large_fleet_is_cut_and_says_so(watch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timelines, "MAX_LANES", 1)
    monkeypatch.setattr(timelines, "MAX_RATES", 1)
    fleet = watch()
    fleet.to(Phase.RECORDING)
    fleet.durable()
    seen = fleet.timeline.view(fleet.now)
    assert (len(seen.ranks), len(seen.writers), seen.more) == (1, 1, 1)
    assert len(fleet.timeline.rates()) == 1


def test_rates_of_edges_that_the_plan_does_not_have_are_forgotten(watch: Any) -> None:
    fleet = watch()
    fleet.to(Phase.RECORDING)
    fleet.durable()
    assert len(fleet.timeline.rates()) == 2
    fleet.stage(2)
    fleet.settle()
    fleet.to(Phase.RECORDING)
    del fleet.fleet.plan.flows[TRAINER, rank("e0", 1)]
    fleet.durable()
    assert [(rate.source, rate.target) for rate in fleet.timeline.rates()] == [("trainer/0", "e0/0")]
