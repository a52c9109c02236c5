"""Which versions begin a round, which are marked in vain, and how they fail."""

from typing import Any

import msgspec
import pytest
from fleets import rank, trainer
from weightsync.orchestrator.core import memory, versions
from weightsync.orchestrator.core.commands import LookForStable
from weightsync.orchestrator.core.events import AbortAsked, Call, MarkersSeen, StableSeen
from weightsync.orchestrator.core.memory import replay
from weightsync.orchestrator.core.records import Committed, VersionFailed
from weightsync.orchestrator.core.round import endings
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.versions import STABLE_LOOK_DELAYS
from weightsync.orchestrator.protocol.messages import EngineStatus, Outcome, Staged
from weightsync.orchestrator.protocol.names import RoundName, Version

TRAINER, ENGINE = trainer(), rank("e0")
VERSION = Version(7, 1)
STAGED = Staged(version=VERSION, bytes=1, convert_seconds=0.0, digest_seconds=0.0)


@pytest.mark.parametrize("generation", [None, 7])
def test_a_marked_and_staged_version_begins_a_round(drive: Any, generation: int | None) -> None:
    """STABLE from ``touch`` is enough."""
    fleet = drive.joined()
    fleet.says(TRAINER, STAGED)
    assert fleet.fleet.round is None
    fleet.happens(MarkersSeen(fleet.id(), (StableSeen(1, generation),)))
    assert fleet.round.version == VERSION


def test_a_missing_marker_fails_the_version_and_is_named(drive: Any) -> None:
    fleet = drive.joined(staged=50.0)
    fleet.says(TRAINER, STAGED)
    fleet.passes(49.0)
    assert fleet.failures() == []
    fleet.passes(1.0)
    assert fleet.failures() == ["after 50 s: broadcasts/step_1/STABLE is missing"]
    assert fleet.sent(TRAINER, Outcome)[-1].reason == fleet.failures()[0]
    assert fleet.marked() == [("FAILED", VERSION)]


def test_a_marker_without_a_staged_version_does_nothing(drive: Any) -> None:
    fleet = drive.joined(staged=50.0)
    fleet.happens(MarkersSeen(fleet.id(), (StableSeen(1, 7), StableSeen(2, None))))
    fleet.passes(1000.0)
    assert fleet.fleet.round is None
    assert fleet.failures() == []


def test_a_stale_marker_is_ignored_with_one_line(drive: Any) -> None:
    fleet = drive.joined()
    for _ in range(3):
        fleet.happens(MarkersSeen(fleet.id(), (StableSeen(1, 6), StableSeen(9, 6))))
    fleet.says(TRAINER, STAGED)
    assert fleet.fleet.round is None
    assert fleet.told().count("STABLE of step 1 is of an earlier trainer (6); ignored") == 1
    assert fleet.told().count("STABLE of step 9 is of an earlier trainer (6); ignored") == 1


def test_an_engine_that_comes_later_gets_a_round_of_its_own(drive: Any) -> None:
    """From the trainer's slots; the others serve on, and the commit sequence stays."""
    fleet = drive()
    fleet.to(Phase.RECORDING)
    fleet.durable()
    fleet.loses_engine("e0")
    fleet.bring("e0", EngineStatus(), incarnation=555)
    fleet.happens(MarkersSeen(fleet.id(), ()))
    fleet.plan()
    fleet.settle()
    assert fleet.round.catch_up
    fleet.to(Phase.RECORDING)
    fleet.durable()
    assert fleet.fleet.memory.sequence == 1
    assert [kind for kind, _ in fleet.marked()] == ["TRANSFER_READY", "COMMITTED", "TRANSFER_READY"]


def test_a_version_that_waits_for_its_next_attempt_holds_up_no_other(drive: Any) -> None:
    """As a catch-up round would that fails again and again."""
    fleet = drive.joined(backoff=50.0)
    fleet.says(TRAINER, STAGED)
    fleet.happens(MarkersSeen(fleet.id(), (StableSeen(1, 7),)))
    fleet.answers("e0", Call.PAUSE, True)
    fleet.happens(AbortAsked(fleet.id(), "an operator", ""))
    fleet.fails("e0", Call.UPDATE, "aborted")
    fleet.stage(2)
    fleet.settle()
    assert fleet.round.version == Version(7, 2)


# --------------------------------------------------------------------------------------------------- looking for STABLE
def looks(fleet: Any) -> list[float]:
    return [command.after_seconds for command in fleet.commands if isinstance(command, LookForStable)]


def test_what_all_ranks_have_staged_is_looked_for_at_growing_intervals(drive: Any) -> None:
    """One look at a time, and not for ever: the file system's own notice and the rescan find it, too."""
    fleet = drive.joined()
    fleet.says(TRAINER, STAGED)
    fleet.passes(0.0)
    assert looks(fleet) == [0.002], "the first look is under way"
    for _ in range(10):
        fleet.happens(MarkersSeen(fleet.id(), ()))
    assert looks(fleet) == list(STABLE_LOOK_DELAYS) == sorted(STABLE_LOOK_DELAYS)


def test_it_is_not_looked_for_when_it_is_there_or_settled(drive: Any) -> None:
    fleet = drive.joined()
    fleet.happens(MarkersSeen(fleet.id(), (StableSeen(1, 7),)))
    fleet.says(TRAINER, STAGED)
    assert looks(fleet) == []
    fleet.to(Phase.RECORDING)
    fleet.durable()
    fleet.happens(MarkersSeen(fleet.id(), ()))
    assert looks(fleet) == []


def test_each_version_is_looked_for_anew(drive: Any) -> None:
    fleet = drive.joined(staged=10.0)
    fleet.says(TRAINER, STAGED)
    fleet.happens(MarkersSeen(fleet.id(), ()))
    fleet.passes(10.0)
    assert fleet.failures() == ["after 10 s: broadcasts/step_1/STABLE is missing"]
    fleet.happens(MarkersSeen(fleet.id(), ()))
    assert looks(fleet) == [0.002, 0.005]
    fleet.says(TRAINER, msgspec.structs.replace(STAGED, version=Version(7, 2)))
    assert looks(fleet) == [0.002, 0.005, 0.002]


# ------------------------------------------------------------------------------------------------- long ago committed
def test_a_step_of_too_long_ago_is_refused_by_name_and_not_committed_again(
    drive: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "REMEMBERED_VERSIONS", 1)
    fleet = drive.joined()
    for step in (1, 2):
        replay(fleet.fleet.memory, Committed(round=RoundName(1, step), version=Version(7, step), sequence=step))
    fleet.happens(MarkersSeen(fleet.id(), (StableSeen(1, 7),)))
    fleet.says(TRAINER, STAGED)
    fleet.passes(1.0)
    assert fleet.fleet.round is None
    (failure,) = fleet.failures()
    assert "whether step 1 was committed before" in failure
    assert fleet.sent(TRAINER, Outcome)[-1].reason == failure


def test_also_where_it_is_staged_again(drive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer waits for the outcome of that staging and of no other."""
    monkeypatch.setattr(memory, "REMEMBERED_FAILURES", 1)
    fleet = drive.joined()
    for step in (1, 2):
        replay(fleet.fleet.memory, VersionFailed(version=Version(7, step), reason="once"))
    fleet.says(TRAINER, msgspec.structs.replace(STAGED, restaged=1))
    fleet.passes(1.0)
    told = fleet.sent(TRAINER, Outcome)[-1]
    assert (told.version, told.committed, told.restaged) == (VERSION, False, 1)
    assert "publish it under a higher number" in told.reason


def test_nothing_is_kept_of_every_version_for_ever(drive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (memory, versions, endings):
        monkeypatch.setattr(module, "REMEMBERED_VERSIONS", 5)
    fleet = drive.joined(staged=10.0)
    for step in range(1, 41):
        seen = StableSeen(step, 7 if step % 2 else 6)
        fleet.says(TRAINER, msgspec.structs.replace(STAGED, version=Version(7, step)))
        fleet.happens(MarkersSeen(fleet.id(), (seen,)))
        if step % 2:
            fleet.to(Phase.RECORDING)
            fleet.durable()
        else:
            fleet.passes(10.0)
        fleet.settle()
    state = fleet.fleet
    assert (state.memory.sequence, len(state.memory.failed)) == (20, 20)
    assert list(state.memory.done) == [Version(7, step) for step in (31, 33, 35, 37, 39)]
    assert list(state.marked) == [Version(7, step) for step in range(36, 41)]
    assert [seen.step for seen in state.stale_said] == [32, 34, 36, 38, 40]
    assert (state.attempts, state.retry_at, state.first_attempt, state.waiting_since) == ({}, {}, {}, {})
