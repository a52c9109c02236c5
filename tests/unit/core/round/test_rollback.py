"""Back to the version before: on whom, what stands against it, and that it is a commit like any other."""

from typing import Any

import pytest
from fleets import rank
from weightsync.orchestrator.core.events import Call, HoldAsked, RollbackAsked
from weightsync.orchestrator.core.records import Committed, Decided, RoundBegan, RoundEnded
from weightsync.orchestrator.core.round import rollback
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.protocol.messages import EngineStatus, Grant, Left, Outcome
from weightsync.orchestrator.protocol.names import RoundName, Version

FIRST, SECOND = Version(7, 1), Version(7, 2)
ENGINES = ("e0", "e1")


def served_twice(drive: Any, modes: tuple[str, ...] = ("flip", "flip"), **more: Any) -> Any:
    """A fleet that has committed FIRST, then SECOND, with other bytes."""
    fleet = drive(engines=ENGINES, lands=dict(zip(ENGINES, modes, strict=True)), **more)
    commits(fleet)
    fleet.stage(2)
    fleet.digest = (12, 13)
    commits(fleet)
    return fleet


def commits(fleet: Any) -> None:
    fleet.to(Phase.RECORDING)
    fleet.durable()
    fleet.settle()


def asks(fleet: Any, step: int | None = None) -> None:
    fleet.happens(RollbackAsked(fleet.id(), "ann", "it talks in riddles", step))


def objection(fleet: Any, step: int | None = None) -> str:
    found = rollback.found(fleet.fleet, step)
    assert bool(found.objection) == (found.version is None)
    return found.objection


@pytest.mark.parametrize("step", [None, 1])
def test_a_rollback_is_a_commit_of_its_own(drive: Any, step: int | None) -> None:
    fleet = served_twice(drive)
    before = len(fleet.written())
    asks(fleet, step)
    going = fleet.round
    assert (going.phase, going.version, going.rollback, list(going.engines)) == (
        Phase.DECIDING, FIRST, True, ["e0", "e1"],
    )  # fmt: skip
    assert fleet.called("e0", Call.SWITCH) == 2, "of the rounds before; nothing is done before the decision is durable"
    fleet.durable()
    assert [fleet.called(name, Call.SWITCH) for name in ENGINES] == [3, 3]
    fleet.digest = (11, 13)
    commits(fleet)
    kinds = [RoundBegan, Decided, Committed, RoundEnded]
    records = fleet.written()[before:]
    assert [type(record) for record in records] == kinds
    assert records[1].digests == {str(member): f"{11:016x}{13:016x}" for member in fleet.ranks_of()}
    assert (records[2].version, records[2].sequence) == (FIRST, 3)
    assert (records[3].kind, records[3].outcome, records[3].bytes) == ("rollback", "committed", 0)
    assert fleet.fleet.memory.committed == FIRST
    assert fleet.marked()[-1] == ("COMMITTED", FIRST)
    assert [m.version for m in fleet.sent(fleet.fleet.trainers()[0].member, Outcome)] == [FIRST, SECOND]
    assert not [m for m in fleet.sent(fleet.fleet.trainers()[0].member, Grant) if m.round == going.name]


def test_a_rollback_and_back(drive: Any) -> None:
    fleet = served_twice(drive)
    asks(fleet)
    fleet.digest = (11, 13)
    commits(fleet)
    asks(fleet)
    assert fleet.round.version == SECOND
    fleet.digest = (12, 13)
    commits(fleet)
    assert (fleet.fleet.memory.committed, fleet.fleet.memory.sequence) == (SECOND, 4)


def test_the_next_version_is_committed_after_it(drive: Any) -> None:
    fleet = served_twice(drive)
    asks(fleet)
    fleet.digest = (11, 13)
    commits(fleet)
    fleet.stage(3)
    fleet.digest = (14, 13)
    commits(fleet)
    assert (fleet.fleet.memory.committed, fleet.fleet.memory.sequence) == (Version(7, 3), 4)


def test_a_rollback_that_was_decided_is_finished_by_the_next_daemon(drive: Any) -> None:
    fleet = served_twice(drive)
    asks(fleet)
    again = drive(engines=ENGINES, lands=fleet.lands, records=fleet.written())
    assert (again.fleet.memory.committed, again.fleet.memory.sequence) == (FIRST, 3)
    again.passes(0.25)
    for name in ENGINES:
        again.answers(name, Call.PROBE, False)
        again.bring(name, EngineStatus(applied=SECOND, standby=FIRST, standby_digest=(11, 13)))
    again.settle()
    assert [again.called(name, Call.SWITCH) for name in ENGINES] == [1, 1]


def test_one_that_was_not_decided_never_was(drive: Any) -> None:
    fleet = served_twice(drive)
    asks(fleet)
    records = fleet.written()
    while not isinstance(records[-1], RoundBegan):
        records.pop()
    again = drive(engines=ENGINES, lands=fleet.lands, records=records)
    assert (again.fleet.memory.committed, again.fleet.memory.sequence) == (SECOND, 2)


def test_an_engine_that_fails_to_switch_back_is_left_out(drive: Any) -> None:
    fleet = served_twice(drive)
    asks(fleet)
    fleet.durable()
    fleet.fails("e1", Call.SWITCH)
    going = fleet.round
    assert going.engines["e1"].left_out
    assert fleet.called("e1", Call.PAUSE) == 2, "it may not serve what is not committed; once before the first version"
    fleet.answers("e0", Call.SWITCH, False)
    for member in fleet.ranks_of("e0"):
        fleet.says(member, Left(round=going.name, status=EngineStatus(applied=FIRST)))
    fleet.durable()
    assert fleet.fleet.memory.committed == FIRST


@pytest.mark.parametrize(
    ("modes", "step", "says"),
    [
        (("flip", "live"), None, "the version before is not held by e1 (it holds no earlier version, as always in mode "
         "live)"),
        (("copy", "flip"), 1, "step 1 is not held by e0 (it holds no earlier version, as always in mode copy)"),
        (("flip", "flip"), 2, "step 2 is not held by e0 (it holds step 1), e1 (it holds step 1)"),
        (("flip", "flip"), 9, "step 9 is not held by e0 (it holds step 1), e1 (it holds step 1)"),
    ],
)  # fmt: skip
def test_who_does_not_hold_it_is_named(drive: Any, modes: tuple[str, ...], step: int | None, says: str) -> None:
    fleet = served_twice(drive, modes)
    assert objection(fleet, step) == says
    asks(fleet, step)
    assert fleet.fleet.round is None
    assert f"no rollback: {says}" in fleet.told()


def test_other_bytes_than_those_that_were_decided_are_not_served_again(drive: Any) -> None:
    fleet = served_twice(drive)
    agent = fleet.fleet.agents[rank("e1", 1)]
    agent.status = EngineStatus(applied=SECOND, standby=FIRST, standby_digest=(11, 14))
    assert objection(fleet) == "the version before is not held by e1 (it holds no earlier version)"


def test_engines_with_different_versions_before(drive: Any) -> None:
    fleet = served_twice(drive)
    fleet.fleet.memory.done[Version(7, 0)] = 0
    for member in fleet.ranks_of("e1"):
        fleet.fleet.memory.held[str(member)] = ((SECOND, f"{12:016x}{13:016x}"), (Version(7, 0), f"{9:016x}{9:016x}"))
        status = EngineStatus(applied=SECOND, standby=Version(7, 0), standby_digest=(9, 9))
        fleet.fleet.agents[member].status = status
    assert objection(fleet) == "engines hold different versions before it (steps 0, 1): name one"
    assert objection(fleet, 1) == "step 1 is not held by e1 (it holds step 0)"


def test_what_was_never_committed_is_no_version_before(drive: Any) -> None:
    fleet = served_twice(drive)
    del fleet.fleet.memory.done[FIRST]
    assert objection(fleet).startswith("the version before is not held by e0 (it holds no earlier version)")


def test_it_needs_as_many_engines_as_any_commit(drive: Any) -> None:
    fleet = served_twice(drive, options={"min_engines": 2})
    fleet.happens(HoldAsked(fleet.id(), "ann", "", "e1", True))
    assert objection(fleet) == f"1 engines serve {SECOND}, and a commit needs 2"


def test_who_is_held_is_not_asked(drive: Any) -> None:
    fleet = served_twice(drive, ("flip", "live"))
    fleet.happens(HoldAsked(fleet.id(), "ann", "", "e1", True))
    assert not objection(fleet)
    assert rollback.found(fleet.fleet, None).engines == ["e0"]


def test_not_while_something_else_is_under_way(drive: Any) -> None:
    fleet = served_twice(drive)
    fleet.fleet.stopping = True
    assert objection(fleet) == "the daemon is stopping"
    fleet.fleet.stopping = False
    fleet.stage(3)
    name = fleet.round.name
    says = f"round {name} for {Version(7, 3)} is under way: abort it, or wait for its end"
    assert objection(fleet) == says
    assert objection(drive()) == "nothing is committed yet"


def test_a_pair_is_paused_for_it(drive: Any) -> None:
    fleet = served_twice(drive, pairs=(ENGINES,))
    switches = fleet.called("e0", Call.SWITCH)
    asks(fleet)
    fleet.durable()
    fleet.answers("e0", Call.PAUSE, True)
    assert fleet.called("e0", Call.SWITCH) == switches, "not before both stand"
    fleet.answers("e1", Call.PAUSE, True)
    assert [fleet.called(name, Call.SWITCH) for name in ENGINES] == [switches + 1] * 2
    assert fleet.round.name == RoundName(1, 3)
