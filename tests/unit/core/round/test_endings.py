"""COMMITTED, another attempt, or FAILED; and who is told, once and again."""

from typing import Any

import msgspec
import pytest
from fleets import rank, trainer
from weightsync.orchestrator.core import conditions
from weightsync.orchestrator.core.commands import WriteMarker
from weightsync.orchestrator.core.events import Call, CallFailed, MarkersSeen, StableSeen
from weightsync.orchestrator.core.records import (
    AnyRecord,
    Committed,
    Decided,
    LiveDirty,
    RoundBegan,
    RoundEnded,
    StagedAgain,
    Taint,
    VersionFailed,
)
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.protocol.messages import EngineStatus, Left, Outcome, Staged, TrainerStatus
from weightsync.orchestrator.protocol.names import RoundName, Version

TRAINER, ENGINE = trainer(), rank("e0")
VERSION = Version(7, 1)
NAME = RoundName(1, 1)
BEGAN = RoundBegan(round=NAME, version=VERSION, attempt=1, engines=("e0",))
DIRTY = LiveDirty(round=NAME, writers={"trainer/0": Taint(100, "h1", "b1", {"e0/0": 100})})
DECIDED = Decided(round=NAME, version=VERSION, digests={"e0/0": "ab"})
STAGED = Staged(version=VERSION, bytes=1, convert_seconds=0.0, digest_seconds=0.0)


def test_attempts_are_spread_and_bounded_by_time(drive: Any) -> None:
    fleet = drive.joined(retry=3.0, backoff=1.0)
    fleet.says(TRAINER, STAGED)
    fleet.happens(MarkersSeen(fleet.id(), (StableSeen(1, 7),)))
    pauses = []
    for attempt in (1, 2, 3):
        assert fleet.round.attempt == attempt
        fleet.fails("e0", Call.PAUSE, "connection reset")
        assert fleet.fleet.round is None
        pauses.append(fleet.fleet.retry_at[VERSION] - fleet.now)
        fleet.passes(pauses[-1])
        fleet.settle()
    assert pauses == [1.0, 2.0, 4.0]
    assert fleet.failures() == ["3 attempts failed; the last one: e0: pause failed: connection reset"]
    assert fleet.fleet.engines["e0"].failures == 3
    fleet.passes(1000.0)
    assert fleet.fleet.round is None


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (Committed(round=NAME, version=VERSION, sequence=1), "COMMITTED"),
        (VersionFailed(version=VERSION, reason="no plan fits"), "FAILED"),
    ],
)
@pytest.mark.parametrize("generation", [7, None])
def test_an_outcome_that_was_not_written_is_written_once(
    drive: Any, record: AnyRecord, kind: str, generation: int | None
) -> None:
    """From the journal, when STABLE is found without it."""
    fleet = drive(records=[record])
    fleet.connect(TRAINER)
    for _ in range(2):
        fleet.happens(MarkersSeen(fleet.id(), (StableSeen(1, generation), StableSeen(2, 7), StableSeen(1, 6))))
    assert fleet.marked() == [(kind, VERSION)]
    assert sum(isinstance(command, WriteMarker) for command in fleet.commands) == 1


def test_a_trainer_that_returns_learns_the_fate_that_it_missed(drive: Any) -> None:
    fleet = drive(records=[BEGAN, DIRTY, DECIDED])
    fleet.connect(TRAINER, TrainerStatus(staged=VERSION))
    assert fleet.sent(TRAINER, Outcome) == [Outcome(version=VERSION, committed=True, sequence=1)]


def test_a_rank_that_stages_too_late_learns_that_the_version_has_failed(drive: Any) -> None:
    fleet = drive.joined(staged=50.0)
    fleet.says(TRAINER, STAGED)
    fleet.passes(50.0)
    before = len(fleet.sent(TRAINER, Outcome))
    fleet.says(TRAINER, STAGED)
    assert len(fleet.sent(TRAINER, Outcome)) == before + 1


# ------------------------------------------------------------------------------------------------------ staged again
AGAIN = msgspec.structs.replace(STAGED, restaged=1)


def failed_once(drive: Any, **options: Any) -> Any:
    """A fleet of which VERSION has FAILED, for lack of its marker."""
    fleet = drive.joined(staged=50.0, **options)
    fleet.says(TRAINER, STAGED)
    fleet.passes(50.0)
    assert fleet.failures() == ["after 50 s: broadcasts/step_1/STABLE is missing"]
    return fleet


def test_a_version_that_failed_is_tried_anew_when_it_is_staged_again(drive: Any) -> None:
    fleet = failed_once(drive)
    fleet.happens(MarkersSeen(fleet.id(), (StableSeen(1, 7),)))
    assert fleet.fleet.round is None
    fleet.says(TRAINER, AGAIN)
    fleet.settle()
    assert (fleet.round.version, fleet.round.attempt) == (VERSION, 1)
    assert fleet.written().count(StagedAgain(version=VERSION, restaged=1)) == 1


def test_it_may_fail_again_and_its_outcomes_say_of_which_staging_they_are(drive: Any) -> None:
    fleet = failed_once(drive)
    fleet.says(TRAINER, AGAIN)
    fleet.says(TRAINER, AGAIN)  # a second word of the same staging begins nothing
    fleet.passes(50.0)
    assert len(fleet.failures()) == 2
    assert [outcome.restaged for outcome in fleet.sent(TRAINER, Outcome)] == [0, 1]
    markers = [c for c in fleet.commands if isinstance(c, WriteMarker) and c.kind == "FAILED"]
    assert [marker.facts.get("restaged", 0) for marker in markers] == [0, 1]
    assert fleet.written().count(StagedAgain(version=VERSION, restaged=1)) == 1


def test_a_restarted_daemon_knows_it_too(drive: Any) -> None:
    failure = VersionFailed(version=VERSION, reason="no plan fits")
    told_later = drive(records=[failure])
    told_later.connect(TRAINER, TrainerStatus(staged=VERSION, restaged=1))
    assert told_later.sent(TRAINER, Outcome) == []
    again = drive(records=[failure, StagedAgain(version=VERSION, restaged=1)])
    again.connect(TRAINER, TrainerStatus(staged=VERSION, restaged=1))
    assert again.sent(TRAINER, Outcome) == []
    twice = drive(records=[failure, StagedAgain(version=VERSION, restaged=1), failure])
    twice.connect(TRAINER, TrainerStatus(staged=VERSION, restaged=1))
    assert twice.sent(TRAINER, Outcome) == [
        Outcome(version=VERSION, committed=False, reason="no plan fits", restaged=1)
    ]


def test_a_committed_version_that_another_daemon_called_failed_is_refused_by_name(drive: Any) -> None:
    """The engines hold the bytes of the staging before; a publish that waits must not wait for ever, nor be told so."""
    fleet = drive(records=[BEGAN, DIRTY, DECIDED])
    fleet.connect(TRAINER, TrainerStatus(staged=VERSION, restaged=1))
    why = "an earlier staging of it is committed; publish another step"
    assert fleet.sent(TRAINER, Outcome) == [Outcome(version=VERSION, committed=False, reason=why, restaged=1)]


def test_ranks_whose_slots_still_are_of_the_failed_staging_are_waited_for(drive: Any) -> None:
    fleet = drive(records=[StagedAgain(version=VERSION, restaged=1)])
    fleet.connect(TRAINER, TrainerStatus(staged=VERSION))
    assert conditions.waits_for(fleet.fleet, VERSION, fleet.now) == "not STAGED by trainer/0"
    fleet.says(TRAINER, AGAIN)
    assert "not STAGED by trainer/0" not in conditions.waits_for(fleet.fleet, VERSION, fleet.now)


# ------------------------------------------------------------------------------------------- whether to try once more
def refused(fleet: Any, call: Call, retry: bool) -> None:
    """The call that is under way fails by somebody's configuration."""
    number = fleet.fleet.engines["e0"].calls[call]
    fleet.happens(CallFailed(fleet.id(), "e0", call, number, "no such route", "config", retry))


def ended(fleet: Any) -> list[RoundEnded]:
    return [record for record in fleet.written() if isinstance(record, RoundEnded)]


def test_what_cannot_succeed_is_not_tried_again(drive: Any) -> None:
    fleet = drive(options={"retry": 100.0})
    going = fleet.to(Phase.PAUSING)
    refused(fleet, Call.PAUSE, retry=False)
    why = "e0: pause failed: no such route"
    assert [(round.outcome, round.reason, round.fault) for round in ended(fleet)] == [("failed", why, "config")]
    assert fleet.failures() == [f"{why}; another attempt would fail in the same way"]
    assert fleet.sent(TRAINER, Outcome)[-1].reason == fleet.failures()[0]
    assert fleet.marked()[-1] == ("FAILED", going.version)
    fleet.passes(1000.0)
    assert fleet.fleet.round is None


def test_what_may_pass_is(drive: Any) -> None:
    fleet = drive(options={"retry": 100.0, "backoff": 1.0})
    fleet.to(Phase.PAUSING)
    refused(fleet, Call.PAUSE, retry=True)
    assert fleet.failures() == []
    fleet.passes(1.0)
    fleet.settle()
    assert fleet.round.attempt == 2


@pytest.mark.parametrize(
    ("report", "fault"),
    [({"error": "no such device", "fault": "config", "retry": False}, "config"), ({"digest": (0, 0)}, "network")],
)
def test_who_is_torn_is_repaired_by_another_attempt_all_the_same(
    drive: Any, report: dict[str, Any], fault: str
) -> None:
    """FAILED is for versions by which nobody is torn: only bytes can mend what bytes have torn."""
    fleet = drive(options={"retry": 100.0, "backoff": 1.0})
    going = fleet.to(Phase.VERIFYING)
    fleet.says(ENGINE, fleet.verified(**report))
    assert [round.fault for round in ended(fleet)] == [fault]
    for member in fleet.ranks_of():
        fleet.says(member, Left(round=going.name, status=EngineStatus(torn=True)))
    fleet.fails("e0", Call.UPDATE, "aborted")
    fleet.settle()
    for attempt in (2, 3):
        fleet.passes(1000.0)
        fleet.settle()
        assert fleet.failures() == [], "long after its time, since e0 is torn"
        assert fleet.round.attempt == attempt
        refused(fleet, Call.PAUSE, retry=False)


def test_a_version_whose_trainer_is_gone_fails_once_nobody_is_torn_by_it(drive: Any) -> None:
    fleet = drive()
    going = fleet.to(Phase.VERIFYING)
    fleet.says(ENGINE, fleet.verified(digest=(0, 0)))
    for member in fleet.ranks_of():
        fleet.says(member, Left(round=going.name, status=EngineStatus(torn=True)))
    fleet.loses(TRAINER)
    fleet.connect(TRAINER, generation=8, incarnation=5)
    fleet.passes(1000.0)
    assert fleet.failures() == []
    fleet.loses_engine("e0")
    fleet.bring("e0", EngineStatus(), incarnation=555)
    assert fleet.failures() == ["its trainer ended before the version was committed"]


def test_a_catch_up_round_fails_no_version(drive: Any) -> None:
    fleet = drive()
    fleet.to(Phase.RECORDING)
    fleet.durable()
    fleet.loses_engine("e0")
    fleet.bring("e0", EngineStatus(), incarnation=555)
    fleet.plan()
    fleet.settle()
    assert fleet.round.catch_up
    refused(fleet, Call.PAUSE, retry=False)
    assert fleet.failures() == []
    assert fleet.fleet.retry_at[VERSION] > fleet.now


def test_a_round_that_a_restart_ends_is_nobody_elses_fault(drive: Any) -> None:
    fleet = drive(records=[BEGAN, DIRTY])
    assert [(round.reason, round.fault) for round in ended(fleet)] == [("the daemon was restarted", "daemon")]
