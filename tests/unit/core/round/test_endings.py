"""COMMITTED, another attempt, or FAILED; and who is told, once and again."""

from typing import Any

import pytest
from fleets import rank, trainer
from weightsync.orchestrator.core.commands import (
    WriteMarker,
)
from weightsync.orchestrator.core.events import Call, MarkersSeen, StableSeen
from weightsync.orchestrator.core.records import AnyRecord, Committed, Decided, LiveDirty, RoundBegan, VersionFailed
from weightsync.orchestrator.protocol.messages import Outcome, Staged, TrainerStatus
from weightsync.orchestrator.protocol.names import RoundName, Version

TRAINER, ENGINE = trainer(), rank("e0")
VERSION = Version(7, 1)
NAME = RoundName(1, 1)
BEGAN = RoundBegan(round=NAME, version=VERSION, attempt=1, engines=("e0",))
DIRTY = LiveDirty(round=NAME, writers={"trainer/0": 100}, ranks={"e0/0": 100})
DECIDED = Decided(round=NAME, version=VERSION, digests={})
STAGED = Staged(version=VERSION, bytes=1, convert_seconds=0.0, digest_seconds=0.0)


def test_attempts_are_bounded_and_spread(drive: Any) -> None:
    fleet = drive.joined(attempts=3, backoff=1.0)
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
