"""A daemon may die after any record: whatever prefix of the journal the next one reads, it begins consistently."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from fleets import rank, trainer
from recordings import recording
from weightsync.orchestrator.core.commands import Append, Command
from weightsync.orchestrator.core.errors import InvariantViolation
from weightsync.orchestrator.core.events import AgentSaid, Call, CallDone
from weightsync.orchestrator.core.machine import start
from weightsync.orchestrator.core.memory import Memory, replay
from weightsync.orchestrator.core.policy import Policy
from weightsync.orchestrator.core.records import (
    AnyRecord,
    Committed,
    Decided,
    EpochBegan,
    LiveDirty,
    RoundBegan,
    RoundEnded,
)
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.state import Fleet, Unclosed
from weightsync.orchestrator.protocol.findings import Finding
from weightsync.orchestrator.protocol.messages import EngineStatus, Examined, Staged, TrainerStatus
from weightsync.orchestrator.protocol.names import RoundName, Version

TRAINER, ENGINE = trainer(), rank("e0")
VERSION = Version(7, 1)
STAGED = Staged(version=VERSION, bytes=1, convert_seconds=0.0, digest_seconds=0.0)


def appended(commands: list[Command]) -> list[AnyRecord]:
    return [command.record for command in commands if isinstance(command, Append)]  # type: ignore[misc]


def check_start(policy: Policy, records: list[AnyRecord]) -> tuple[Fleet, list[AnyRecord]]:
    """Start on ``records`` and compare the result with what a reader of the journal expects."""
    before = Memory()
    for record in records:
        replay(before, record)
    fleet, commands = start(policy, "journal", records, 0.0)
    fresh = appended(commands)
    assert fleet.epoch == before.epoch + 1
    assert fresh[0] == EpochBegan(epoch=fleet.epoch)
    assert fleet.memory.open_rounds == {}
    assert fleet.round is None
    decided = [opened.began.version for opened in before.open_rounds.values() if opened.decided]
    assert fleet.memory.committed == (decided[-1] if decided else before.committed)
    assert before.sequence <= fleet.memory.sequence <= before.sequence + len(decided)
    for name, opened in before.open_rounds.items():
        torn = opened.dirty and not opened.decided
        assert torn <= all(fleet.engines[engine].torn_by == opened.began.version for engine in opened.began.engines)
        tainted = {str(writer) for writer, grant in fleet.unclosed if grant == name}
        assert tainted == (set(opened.writers) if torn else set())
    return fleet, fresh


@pytest.mark.parametrize("seed", range(4))
def test_every_prefix_of_a_journal_is_a_beginning(seed: int) -> None:
    policy, records = recording(seed)
    kinds = {type(record) for record in records}
    assert kinds >= {RoundBegan, LiveDirty, Decided, RoundEnded, Committed}
    for length in range(len(records) + 1):
        check_start(policy, list(records[:length]))


@pytest.mark.parametrize("seed", range(4))
def test_so_is_a_start_that_died_after_any_of_its_own_records(seed: int) -> None:
    """Once more from every prefix of what the start itself had written: it comes to the same commit."""
    policy, records = recording(seed)
    for length in range(len(records) + 1):
        fleet, fresh = check_start(policy, list(records[:length]))
        for done in range(1, len(fresh) + 1):
            again, _ = check_start(policy, [*records[:length], *fresh[:done]])
            assert (again.memory.committed, again.memory.sequence) == (fleet.memory.committed, fleet.memory.sequence)


def test_words_of_an_earlier_connection_are_not_heard(drive: Any) -> None:
    fleet = drive.joined()
    old = fleet.connections[TRAINER]
    fleet.loses(TRAINER)
    fleet.connect(TRAINER, TrainerStatus())
    fleet.happens(AgentSaid(fleet.id(), TRAINER, old, STAGED))
    assert fleet.fleet.agents[TRAINER].staged is None


def test_what_is_wrong_around_an_agent_is_kept_as_long_as_its_connection(drive: Any) -> None:
    fleet = drive.joined()
    found = (Finding("warning", "64 MB are free", "more", "shared memory"),)
    fleet.says(ENGINE, Examined(findings=found))
    assert fleet.fleet.agents[ENGINE].findings == found
    fleet.loses(ENGINE)
    fleet.connect(ENGINE, EngineStatus())
    assert fleet.fleet.agents[ENGINE].findings == (), "until it says so again"


def test_the_answer_to_a_call_that_another_one_replaced_says_nothing(drive: Any) -> None:
    fleet = drive()
    fleet.to(Phase.PAUSING)
    number = fleet.fleet.engines["e0"].calls[Call.PAUSE]
    fleet.happens(CallDone(fleet.id(), "e0", Call.PAUSE, number - 1, 0.01, True))
    assert not fleet.round.engines["e0"].paused
    fleet.happens(CallDone(fleet.id(), "e0", Call.PAUSE, number, 0.01, True))
    assert fleet.round.phase is Phase.QUIESCING


def _told_twice_of_a_grant(fleet: Any) -> None:
    """A writer of a round that is over may still write to the engine."""
    fleet.to(Phase.EXPOSING)
    fleet.fleet.unclosed[trainer(7), RoundName(1, 77)] = Unclosed(1, "h", "b", {ENGINE: 100}, outlived=True)
    fleet.to(Phase.WRITING)


def _torn_when_resumed(fleet: Any) -> None:
    going = fleet.to(Phase.SWITCHING)
    fleet.leave(going.version)
    fleet.fleet.agents[ENGINE].status = EngineStatus(going.version, torn=True)
    fleet.answers("e0", Call.FINISH)


def _of_no_proved_plan(fleet: Any) -> None:
    fleet.to(Phase.EXPOSING)
    fleet.round.plan = dataclasses.replace(fleet.round.plan, proved=False)
    fleet.to(Phase.WRITING)


def _with_another_digest(fleet: Any) -> None:
    going = fleet.to(Phase.SWITCHING)
    going.expected[ENGINE] = ((0, 0), 0)
    fleet.leave(going.version)
    fleet.answers("e0", Call.FINISH)
    fleet.answers("e0", Call.RESUME, False)


def _to_who_has_not_confirmed(fleet: Any) -> None:
    fleet.to(Phase.EXPOSING)
    fleet.fleet.agents[ENGINE].fingerprint = ""
    fleet.to(Phase.WRITING)


@pytest.mark.parametrize(
    ("name", "breaks"),
    [
        ("S1", _torn_when_resumed),
        ("S2", _told_twice_of_a_grant),
        ("S4", _with_another_digest),
        ("S5", _to_who_has_not_confirmed),
        ("S6", _of_no_proved_plan),
    ],
)
def test_a_step_that_would_break_an_invariant_is_not_taken(
    drive: Any, name: str, breaks: Callable[[Any], None]
) -> None:
    with pytest.raises(InvariantViolation, match=f"^{name}: "):
        breaks(drive())
