"""Each of S1-S6 raises when a state is made that violates it; nothing of that turn is performed."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from weightsync.orchestrator.core import invariants
from weightsync.orchestrator.core.commands import Append, CallEngine, Command, Send
from weightsync.orchestrator.core.errors import InvariantViolation
from weightsync.orchestrator.core.events import AbortAsked, AgentSaid, Call
from weightsync.orchestrator.core.records import Committed, RoundBegan
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.state import Unclosed
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.messages import Abort, EngineStatus, Exposed, Grant
from weightsync.orchestrator.protocol.names import Member, RoundName, Version

TRAINER, ENGINE = Member("trainer", "", 0), Member("inference", "e0", 0)


def judge(driven: Any, *commands: Command) -> None:
    for command in commands:
        invariants.commanded(driven.fleet, command)
    invariants.check(driven.fleet, invariants.snapshot(driven.fleet), list(commands))


def resume() -> CallEngine:
    return CallEngine("e0", Call.RESUME, 1, 1.0, ranks=((0, 100), (1, 101)))


def grant(driven: Any) -> Send:
    going = driven.round
    fingerprint = driven.fleet.agents[TRAINER].fingerprint
    message = Grant(
        round=going.name, version=going.version, fingerprint=fingerprint, members=(ENGINE,), deadline_seconds=1.0
    )
    return Send(TRAINER, message)


@pytest.fixture
def resuming(drive: Any) -> Any:
    driven = drive()
    going = driven.to(Phase.SWITCHING)
    driven.leave(going.version)
    return driven


@pytest.fixture
def writing(drive: Any) -> Any:
    driven = drive()
    driven.to(Phase.WRITING)
    return driven


@pytest.fixture
def recorded(drive: Any) -> Any:
    """About to say COMMITTED."""
    driven = drive()
    driven.to(Phase.RECORDING)
    return driven


def commit(driven: Any, version: Version | None = None) -> Append:
    going = driven.round
    return Append(Committed(round=going.name, version=version or going.version, sequence=1), answer=True)


def test_an_honest_round_violates_nothing(resuming: Any, writing: Any, recorded: Any) -> None:
    judge(resuming, resume())
    judge(writing, grant(writing))
    judge(recorded, commit(recorded))


@pytest.mark.parametrize(
    "status",
    [
        EngineStatus(),
        EngineStatus(applied=Version(7, 1), torn=True),
        EngineStatus(applied=Version(7, 1), window=RoundName(1, 1)),
        EngineStatus(applied=Version(7, 99)),
    ],
    ids=["nothing committed here", "torn", "still inside", "another version"],
)
def test_s1_no_resume_of_what_may_not_serve(resuming: Any, status: EngineStatus) -> None:
    resuming.fleet.agents[ENGINE].status = status
    with pytest.raises(InvariantViolation, match="S1: resume of e0"):
        judge(resuming, resume())


@pytest.mark.parametrize("ranks", [(), ((0, 100),), ((0, 100), (1, 555)), ((0, 100), (1, 101), (2, 102))])
def test_s1_nor_of_processes_that_have_not_said_what_they_hold(resuming: Any, ranks: Any) -> None:
    with pytest.raises(InvariantViolation, match="S1: resume of e0 means"):
        judge(resuming, msgspec.structs.replace(resume(), ranks=ranks))


def test_s1_a_lost_connection_takes_nothing_of_what_they_said(resuming: Any) -> None:
    resuming.fleet.leave(ENGINE)
    judge(resuming, resume())


def test_s2_no_grant_outside_the_round(writing: Any) -> None:
    stray = grant(writing)
    writing.fleet.round = None
    with pytest.raises(InvariantViolation, match=r"S2: grant 1\.1"):
        judge(writing, stray)


def test_s2_no_grant_of_another_epoch(writing: Any) -> None:
    writing.fleet.epoch += 1
    with pytest.raises(InvariantViolation, match="S2: grant"):
        judge(writing, grant(writing))


def test_s2_no_grant_while_another_is_open(writing: Any) -> None:
    writing.fleet.unclosed[Member("trainer", "", 1), RoundName(1, 0)] = Unclosed(5, "", "", {ENGINE: 100})
    with pytest.raises(InvariantViolation, match=r"S2: grant .* to e0, within reach of \['trainer/1'\]"):
        judge(writing, grant(writing))


def test_s2_no_round_begins_while_a_grant_is_open(writing: Any) -> None:
    began = RoundBegan(round=RoundName(1, 2), version=Version(7, 2), attempt=1, engines=("e0",))
    with pytest.raises(InvariantViolation, match=r"S2: round 1\.2 begins"):
        judge(writing, Append(began))


@pytest.mark.parametrize("field", ["epoch", "sequence"])
def test_s3_nothing_goes_back(writing: Any, field: str) -> None:
    before = replace(invariants.snapshot(writing.fleet), **{field: 99})
    with pytest.raises(InvariantViolation, match="S3"):
        invariants.check(writing.fleet, before, [])


def test_s4_no_commit_without_a_decision(recorded: Any) -> None:
    recorded.round.live = ()
    with pytest.raises(InvariantViolation, match=r"S4: COMMITTED of step 1 .* without a decided round"):
        judge(recorded, commit(recorded))


def test_s4_no_commit_of_another_version(recorded: Any) -> None:
    with pytest.raises(InvariantViolation, match="S4"):
        judge(recorded, commit(recorded, Version(7, 2)))


@pytest.mark.parametrize("wrong", [{"digest": (0, 0)}, {"bytes": 0}, None])
def test_s4_no_commit_of_unverified_bytes(recorded: Any, wrong: dict[str, Any] | None) -> None:
    if wrong is None:
        del recorded.round.verified[ENGINE]
    else:
        recorded.round.verified[ENGINE] = msgspec.structs.replace(recorded.round.verified[ENGINE], **wrong)
    with pytest.raises(InvariantViolation, match=r"S4: .* e0/0 is not verified"):
        judge(recorded, commit(recorded))


@pytest.mark.parametrize("left", [None, EngineStatus(), EngineStatus(applied=Version(7, 9))])
def test_s4_no_commit_before_the_workers_say_so(recorded: Any, left: EngineStatus | None) -> None:
    if left is None:
        del recorded.round.left[ENGINE]
    else:
        recorded.round.left[ENGINE] = left
    with pytest.raises(InvariantViolation, match=r"S4: .* has not confirmed it"):
        judge(recorded, commit(recorded))


@pytest.mark.parametrize("member", [TRAINER, ENGINE])
def test_s5_no_grant_with_an_outdated_edge_set(writing: Any, member: Member) -> None:
    command = grant(writing)
    writing.fleet.agents[member].fingerprint = "of an older plan"
    with pytest.raises(InvariantViolation, match=f"S5: .* involves {member}"):
        judge(writing, command)


@pytest.mark.parametrize("member", [TRAINER, ENGINE])
def test_s5_no_grant_to_or_towards_somebody_who_was_never_here(writing: Any, member: Member) -> None:
    command = grant(writing)
    writing.fleet.leave(member)
    judge(writing, command)  # a lost connection changes nothing in its process
    del writing.fleet.gone[member]
    with pytest.raises(InvariantViolation, match=f"S5: .* involves {member}"):
        judge(writing, command)


def test_s5_no_grant_towards_another_incarnation(writing: Any) -> None:
    writing.round.ranks[ENGINE] += 1
    with pytest.raises(InvariantViolation, match="S5"):
        judge(writing, grant(writing))


def test_s6_no_grant_on_an_unproved_plan(writing: Any) -> None:
    writing.round.plan = replace(writing.round.plan, proved=False)
    with pytest.raises(InvariantViolation, match="S6"):
        judge(writing, grant(writing))


def test_what_comes_together_with_the_last_word_before_a_grant_may_end_its_round(drive: Any) -> None:
    """The grant was right when it was given, and its writer is told to stop."""
    fleet = drive()
    going = fleet.to(Phase.EXPOSING)
    exposed = [
        AgentSaid(fleet.id(), member, fleet.connections[member], Exposed(round=going.name))
        for member in fleet.ranks_of()
    ]
    fleet.happens(*exposed, AbortAsked(fleet.id(), "ann", ""))
    assert len(fleet.sent(TRAINER, Grant)) == 1
    assert (fleet.fleet.round, going.reason) == (None, "aborted: ann")
    assert all(fleet.sent(member, Abort)[-1].torn for member in fleet.ranks_of())


def test_a_right_that_nobody_has_is_not_given(writing: Any) -> None:
    stray = grant(writing)
    turn = Turn(writing.fleet, writing.now, 0)
    writing.fleet.round = None
    with pytest.raises(InvariantViolation, match="S2: grant"):
        turn.send(TRAINER, stray.message)
    with pytest.raises(InvariantViolation, match="S1: resume of e0"):
        turn.call("e0", Call.RESUME, 1.0, ranks=((0, 1),))
    assert turn.commands == []
