"""A daemon may die after any record: whatever prefix of the journal the next one reads, it begins consistently."""

from typing import Any

import pytest
from fleets import rank, trainer
from recordings import recording
from weightsync.orchestrator.core.commands import Append, Command
from weightsync.orchestrator.core.events import AgentSaid
from weightsync.orchestrator.core.machine import start
from weightsync.orchestrator.core.policy import Policy
from weightsync.orchestrator.core.records import (
    AnyRecord,
    Committed,
    Decided,
    EpochBegan,
    LiveDirty,
    Memory,
    RoundBegan,
    RoundEnded,
    replay,
)
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.protocol.messages import Staged, TrainerStatus
from weightsync.orchestrator.protocol.names import Version

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
