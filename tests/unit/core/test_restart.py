"""A daemon may die after any record: whatever prefix of the journal the next one reads, it begins consistently."""

from functools import cache
from typing import Any

import pytest
from weightsync.orchestrator.core.commands import Accept, Append, Command, Refuse, Send, WriteMarker
from weightsync.orchestrator.core.events import MarkersSeen, StableSeen
from weightsync.orchestrator.core.machine import start
from weightsync.orchestrator.core.policy import Policy
from weightsync.orchestrator.core.records import (
    REMEMBERED_ROUNDS,
    AnyRecord,
    Committed,
    Decided,
    EpochBegan,
    LiveDirty,
    Memory,
    RoundBegan,
    RoundEnded,
    VersionFailed,
    decode_record,
    encode_record,
    replay,
)
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.protocol.messages import Abort, Commit, EngineStatus, Outcome, TrainerStatus
from weightsync.orchestrator.protocol.names import Member, RoundName, Version
from world import World

TRAINER, ENGINE = Member("trainer", "", 0), Member("inference", "e0", 0)
VERSION, NAME = Version(7, 1), RoundName(1, 1)
BEGAN = RoundBegan(round=NAME, version=VERSION, attempt=1, engines=("e0",))
DIRTY = LiveDirty(round=NAME, writers={"trainer/0": 100}, ranks={"e0/0": 100})
DECIDED = Decided(round=NAME, version=VERSION, digests={})


@cache
def recording(seed: int) -> tuple[Policy, tuple[AnyRecord, ...]]:
    """The journal of a simulated fleet: calm for seed 0, else with everything going wrong."""
    world = World(seed, engines=2, ranks=1, trainers=1 + seed % 2, faults=0.03 if seed else 0.0)
    if seed:
        for at in range(7, 90, 11):
            world.later(at, world.crash_daemon)
            world.later(at + 5, lambda: world.kill_engine("e1"))
        world.later(50, world.kill_trainer)
    world.run(120.0)
    return world.policy, tuple(decode_record(body) for body in world.disk)


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
        assert all(fleet.engines[engine].ours_paused for engine in opened.began.engines)
        tainted = {str(writer) for writer, grant in fleet.unclosed.items() if grant.round == name}
        assert tainted == (set(opened.writers) if opened.dirty and not opened.decided else set())
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


@pytest.mark.parametrize("seed", range(4))
def test_commits_only_grow(seed: int) -> None:
    _, records = recording(seed)
    order = [record.sequence for record in records if isinstance(record, Committed)]
    assert order == sorted(order)
    epochs = [record.epoch for record in records if isinstance(record, EpochBegan)]
    assert epochs == sorted(set(epochs))


@pytest.mark.parametrize("seed", range(2))
def test_records_survive_the_journal(seed: int) -> None:
    for record in recording(seed)[1]:
        assert decode_record(encode_record(record)) == record


@pytest.mark.parametrize(
    ("records", "told"),
    [
        ([BEGAN], Abort(round=NAME, torn=False, reason="the round ended while this worker was away")),
        ([BEGAN, DIRTY], Abort(round=NAME, torn=True, reason="the round ended while this worker was away")),
        ([BEGAN, DIRTY, DECIDED], Commit(round=NAME, version=VERSION)),
        ([], Abort(round=NAME, torn=True, reason="the round ended while this worker was away")),
    ],
    ids=["begun", "dirty", "decided", "unknown"],
)
@pytest.mark.parametrize("lives", [1, 2, 3])
def test_a_worker_inside_is_let_out_as_the_round_ended(
    drive: Any, records: list[AnyRecord], told: Abort | Commit, lives: int
) -> None:
    """Also by a daemon that starts after the one that ended the round."""
    for _ in range(lives):
        fleet = drive(records=records)
        records = [*records, *fleet.written()]
    fleet.connect(ENGINE, EngineStatus(window=NAME))
    assert fleet.sent(ENGINE, type(told)) == [told]
    to_agent = [type(command) for command in fleet.commands if isinstance(command, Accept | Send)]
    assert to_agent == [Accept, Send], "nothing reaches an agent before it is accepted"


@pytest.mark.parametrize(
    ("phase", "word"),
    [
        (Phase.QUIESCING, Abort(round=NAME, torn=False, reason="e0/0 was lost: reset")),
        (Phase.WRITING, Abort(round=NAME, torn=True, reason="e0/0 was lost: reset")),
        (Phase.APPLYING, Commit(round=NAME, version=VERSION)),
    ],
)
def test_so_is_one_that_comes_back_into_the_round_under_way(drive: Any, phase: Phase, word: Abort | Commit) -> None:
    """The word that was sent while it was away is sent again."""
    fleet = drive(("e0", "e1"))
    fleet.to(phase)
    fleet.loses(ENGINE)
    fleet.connect(ENGINE, EngineStatus(window=NAME))
    assert fleet.sent(ENGINE, type(word))[-1] == word


def test_nor_is_one_forgotten_that_was_away_while_the_decision_was_written(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    fleet.to(Phase.DECIDING)
    fleet.loses(ENGINE)
    fleet.connect(ENGINE, EngineStatus(window=NAME))
    assert fleet.sent(ENGINE, Commit) == [], "it is not durable yet"
    fleet.durable()
    assert fleet.sent(ENGINE, Commit) == [Commit(round=NAME, version=VERSION)]


def test_nobody_remembers_for_ever(drive: Any) -> None:
    memory = Memory()
    for number in range(1, 3 * REMEMBERED_ROUNDS):
        name = RoundName(1, number)
        replay(memory, RoundBegan(round=name, version=VERSION, attempt=1, engines=()))
        replay(memory, RoundEnded(
            round=name, version=VERSION, attempt=1, engines=(), evicted=(), outcome="failed", reason="", bytes=0,
            descriptors=0, times={},
        ))  # fmt: skip
    assert len(memory.ended) == REMEMBERED_ROUNDS
    assert RoundName(1, number) in memory.ended


@pytest.mark.parametrize(
    ("hello", "closed"),
    [
        ({"incarnation": 100, "status": TrainerStatus(open_round=NAME)}, False),
        ({"incarnation": 100, "status": TrainerStatus()}, True),
        ({"incarnation": 101, "status": TrainerStatus(), "generation": 8}, True),
    ],
    ids=["still writing", "closed meanwhile", "the process before it is dead"],
)
def test_writers_of_a_dirty_round_count_as_unclosed_until_they_say_otherwise(
    drive: Any, hello: dict[str, Any], closed: bool
) -> None:
    fleet = drive(records=[BEGAN, DIRTY])
    assert set(fleet.fleet.unclosed) == {TRAINER}
    fleet.connect(TRAINER, **hello)
    assert (fleet.fleet.unclosed == {}) is closed


def test_a_restarted_target_is_out_of_reach_of_a_writer_that_never_returns(drive: Any) -> None:
    fleet = drive(records=[BEGAN, DIRTY])
    fleet.connect(ENGINE, incarnation=100)
    assert set(fleet.fleet.unclosed) == {TRAINER}
    fleet.loses(ENGINE)
    fleet.connect(ENGINE, incarnation=101)
    assert fleet.fleet.unclosed == {}


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


def test_an_agent_that_obeyed_a_later_daemon_raises_the_epoch(drive: Any) -> None:
    """The journal was lost: the agents know better."""
    fleet = drive()
    fleet.connect(TRAINER, epoch_seen=41, journal_id="of the lost journal")
    assert fleet.fleet.epoch == 42
    assert EpochBegan(epoch=42) in fleet.written()


@pytest.mark.parametrize(
    ("member", "wrong", "reason"),
    [
        (TRAINER, {"schema": 99}, "it speaks schema 99"),
        (TRAINER, {"run_id": "other"}, "it belongs to run 'other'"),
        (Member("trainer", "", 5), {}, "rank 5 is outside its world of 1"),
        (Member("inference", "e9", 0), {}, "engine 'e9' is not configured; engines are: e0"),
    ],
)
def test_a_hello_of_somebody_else_is_refused_for_good(
    drive: Any, member: Member, wrong: dict[str, Any], reason: str
) -> None:
    fleet = drive()
    fleet.connect(member, **wrong)
    (refusal,) = [command for command in fleet.commands if isinstance(command, Refuse)]
    assert reason in refusal.refused.reason
    assert not refusal.refused.retry
    assert fleet.fleet.agents == {}


def test_a_second_process_of_the_same_rank_is_refused_by_name(drive: Any) -> None:
    fleet = drive()
    fleet.connect(TRAINER, host="first", pid=11)
    fleet.connect(TRAINER, incarnation=5, host="second", pid=12)
    (refusal,) = [command for command in fleet.commands if isinstance(command, Refuse)]
    assert refusal.refused.reason == "duplicate rank: trainer/0 is already connected from first pid 11"
    assert refusal.refused.retry, "the first one may be dead, and its connection not known to be"
    assert fleet.fleet.agents[TRAINER].hello.pid == 11


def test_a_second_start_of_the_trainer_waits_for_the_end_of_the_first(drive: Any) -> None:
    fleet = drive()
    fleet.connect(TRAINER)
    first = fleet.connections[TRAINER]
    fleet.connect(TRAINER, incarnation=5, generation=8)
    (refusal,) = [command for command in fleet.commands if isinstance(command, Refuse)]
    assert "of another trainer start is still connected" in refusal.refused.reason
    fleet.connections[TRAINER] = first
    fleet.loses(TRAINER)
    fleet.connect(TRAINER, incarnation=5, generation=8)
    assert fleet.fleet.generation == 8
    fleet.loses(TRAINER)
    fleet.connect(TRAINER, incarnation=100, generation=7)
    assert fleet.fleet.agents == {}, "the first start is over for good"
