"""Plans: who is left out of them, what is delivered, and what becomes of layouts that do not fit."""

import dataclasses
from typing import Any

import pytest
from fleets import ANNOUNCE, plan_facts
from weightsync.orchestrator.core.commands import MakePlan, OpenGroup, SendPlan
from weightsync.orchestrator.core.events import Call, MarkersSeen, PlanReady, PlanRejected, StableSeen
from weightsync.orchestrator.core.policy import GroupAddress
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.protocol.layout import Layout, LeftOut
from weightsync.orchestrator.protocol.messages import (
    Announce,
    EdgeFailure,
    Outcome,
    Ready,
    Staged,
    TcpStoreRendezvous,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Member, Version

TRAINER, FIRST, SECOND = Member("trainer", "", 0), Member("inference", "e0", 0), Member("inference", "e1", 0)
WHY = "tensor 'w' has shape (2, 2) at trainer/0 but (3, 2) at e0/0"


def plans(fleet: Any) -> list[MakePlan]:
    return [command for command in fleet.commands if isinstance(command, MakePlan)]


def restart_trainer(fleet: Any, generation: int) -> None:
    fleet.loses(TRAINER)
    fleet.connect(TRAINER, incarnation=1000 + generation, generation=generation)
    fleet.says(TRAINER, ANNOUNCE)


def reject(fleet: Any, engine: str = "e0") -> None:
    fleet.happens(PlanRejected(fleet.id(), fleet.fleet.plan_number, WHY, engine))


def test_a_trainer_that_does_not_fit_fails_its_version_and_the_engine_serves_on(drive: Any) -> None:
    fleet = drive()
    fleet.to(Phase.RECORDING)
    fleet.durable()
    restart_trainer(fleet, 8)
    reject(fleet)
    pauses = fleet.called("e0", Call.PAUSE)
    version = Version(8, 2)
    fleet.says(TRAINER, Staged(version=version, bytes=1, convert_seconds=0.0, digest_seconds=0.0))
    fleet.happens(MarkersSeen(fleet.id(), (StableSeen(2, 8),)))
    (outcome,) = [o for o in fleet.sent(TRAINER, Outcome) if o.version == version]
    assert (outcome.committed, outcome.reason) == (False, WHY)
    assert fleet.called("e0", Call.PAUSE) == pauses


@pytest.mark.parametrize("engine", ["e0", ""], ids=["one engine's", "nobody's in particular"])
def test_the_next_trainer_is_planned_anew(drive: Any, engine: str) -> None:
    fleet = drive()
    fleet.to(Phase.RECORDING)
    fleet.durable()
    restart_trainer(fleet, 8)
    reject(fleet, engine)
    restart_trainer(fleet, 9)
    wanted = plans(fleet)[-1]
    assert (wanted.number, {party.incarnation for party in wanted.sources}) == (fleet.fleet.plan_number, {1009})
    fleet.plan()
    assert fleet.fleet.is_confirmed(TRAINER)
    assert fleet.fleet.is_confirmed(FIRST)


def test_an_old_plan_is_never_delivered_to_new_layouts(drive: Any) -> None:
    fleet = drive()
    fleet.to(Phase.RECORDING)
    fleet.durable()
    before = len(fleet.commands)
    restart_trainer(fleet, 8)
    reject(fleet, "")
    fleet.passes(1.0)
    assert [command for command in fleet.commands[before:] if isinstance(command, SendPlan)] == []
    assert fleet.fleet.plan is None


@pytest.mark.parametrize("member", [TRAINER, FIRST])
def test_a_connect_that_may_be_lost_with_its_connection_is_sent_again(drive: Any, member: Member) -> None:
    """Or its confirmation: nobody else would ever say it, and no round begins without it."""
    fleet = drive()
    fleet.connect(TRAINER)
    fleet.says(TRAINER, ANNOUNCE)
    fleet.passes(0.0)
    fleet.answers("e0", Call.PROBE, True)
    fleet.bring("e0")
    wanted = plans(fleet)[-1]
    fleet.happens(PlanReady(fleet.id(), wanted.number, plan_facts(wanted)))
    before = len(fleet.commands)
    fleet.connect(member)
    fleet.says(member, ANNOUNCE)
    again = [command for command in fleet.commands[before:] if isinstance(command, SendPlan)]
    assert [command.member for command in again] == [member]
    fleet.says(member, Ready(fingerprint=again[0].connect.fingerprint))
    assert fleet.fleet.is_confirmed(member)
    before = len(fleet.commands)
    fleet.connect(member)
    again = [command for command in fleet.commands[before:] if isinstance(command, SendPlan)]
    assert [command.member for command in again] == [member], "by which it looks after its edges again"
    assert fleet.fleet.is_confirmed(member), "and a round may begin meanwhile"


def test_an_edge_counts_as_dead_until_its_writer_says_after_a_reconnect_what_it_is(drive: Any) -> None:
    """The word that it is alive again may have been lost with the connection; its Connect has it said anew."""
    fleet = drive.joined()
    said = fleet.fleet.agents[TRAINER].fingerprint
    fleet.says(TRAINER, Ready(fingerprint=said, failed=(EdgeFailure(FIRST, "no route"),)))
    assert fleet.fleet.dead_edge("e0")
    fleet.connect(TRAINER)
    assert fleet.fleet.dead_edge("e0")
    assert fleet.fleet.agents[TRAINER].delivered == said, "it is sent again"
    fleet.says(TRAINER, Ready(fingerprint=said))
    assert not fleet.fleet.dead_edge("e0")


def test_a_confirmation_of_an_older_plan_that_comes_late_changes_nothing(drive: Any) -> None:
    fleet = drive.joined()
    fleet.says(TRAINER, Ready(fingerprint="of the plan before", failed=(EdgeFailure(FIRST, "no route"),)))
    assert fleet.fleet.is_confirmed(TRAINER)
    assert not fleet.fleet.dead_edge("e0")


def test_the_engine_that_does_not_fit_is_left_out_of_the_next_plan(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    fleet.connect(TRAINER)
    fleet.says(TRAINER, ANNOUNCE)
    for name in ("e0", "e1"):
        fleet.passes(0.0)
        fleet.answers(name, Call.PROBE, True)
        fleet.bring(name)
    assert {party.member for party in plans(fleet)[-1].targets} == set(fleet.ranks_of("e0", "e1"))
    reject(fleet)
    assert {party.member for party in plans(fleet)[-1].targets} == set(fleet.ranks_of("e1"))
    assert fleet.fleet.engines["e0"].misfit == WHY


def test_a_version_that_waits_for_engines_names_the_one_that_does_not_fit(drive: Any) -> None:
    """Beside one that has not come: nobody else can say what is wrong."""
    fleet = drive(("e0", "e1"), options={"join": 10.0, "patience": 5.0})
    fleet.connect(TRAINER)
    fleet.says(TRAINER, ANNOUNCE)
    fleet.passes(0.0)
    fleet.answers("e0", Call.PROBE, True)
    fleet.bring("e0")
    fleet.passes(10.0)
    reject(fleet)
    fleet.says(TRAINER, Staged(version=Version(7, 1), bytes=1, convert_seconds=0.0, digest_seconds=0.0))
    fleet.happens(MarkersSeen(fleet.id(), (StableSeen(1, 7),)))
    fleet.passes(15.0)
    assert fleet.sent(TRAINER, Outcome)[-1].reason == f"after 15 s: an engine that fits: {WHY}"


def test_an_outdated_plan_or_refusal_is_ignored(drive: Any) -> None:
    fleet = drive()
    fleet.join()
    facts = fleet.fleet.plan
    fleet.happens(PlanRejected(fleet.id(), 99, WHY, "e0"))
    fleet.happens(PlanReady(fleet.id(), 99, facts))
    assert fleet.fleet.plan is facts
    assert fleet.fleet.engines["e0"].misfit == ""


GROUP = GroupAddress("127.0.0.1", 29501, 60.0)


def groups(fleet: Any) -> list[list[Member]]:
    opened = [command for command in fleet.commands if isinstance(command, OpenGroup)]
    return [[member for member, _ in command.connections] for command in opened]


def test_a_group_waits_for_all_and_tells_each_its_rank(drive: Any) -> None:
    fleet = drive(("e0", "e1"), ranks=1, options={"group": GROUP, "join": 100.0})
    for member in (TRAINER, SECOND):
        fleet.connect(member)
    assert groups(fleet) == []
    fleet.connect(FIRST)
    assert groups(fleet) == [[TRAINER, FIRST, SECOND]]
    for place, member in enumerate((TRAINER, FIRST, SECOND), start=1):
        told = [welcome.rendezvous for welcome in fleet.sent(member, Welcome)]
        assert told == [TcpStoreRendezvous("127.0.0.1", 29501, place, 4, 60.0)]


def test_a_group_does_not_wait_for_ever_and_grows_when_somebody_comes(drive: Any) -> None:
    fleet = drive(("e0", "e1"), ranks=1, options={"group": GROUP, "patience": 20.0})
    fleet.connect(TRAINER)
    fleet.passes(500.0)
    fleet.connect(FIRST)
    fleet.passes(19.0)
    assert groups(fleet) == []
    fleet.passes(1.0)
    assert groups(fleet) == [[TRAINER, FIRST]]
    fleet.passes(1.0)
    assert len(groups(fleet)) == 1
    fleet.connect(SECOND)
    assert groups(fleet)[1:] == [[TRAINER, FIRST, SECOND]]


def test_an_engine_that_does_not_fit_leaves_the_group(drive: Any) -> None:
    fleet = drive(("e0", "e1"), ranks=1, options={"group": GROUP})
    for member in (TRAINER, FIRST, SECOND):
        fleet.connect(member)
    fleet.fleet.engines["e0"].misfit = WHY
    fleet.passes(1.0)
    assert groups(fleet)[1:] == [[TRAINER, SECOND]]


def test_what_the_trainer_has_and_nobody_needs_is_said_once(drive: Any) -> None:
    fleet = drive()
    fleet.join()
    for names in (("head", "adapter"), ("head", "adapter"), tuple(f"t{number}" for number in range(9))):
        restart_trainer(fleet, fleet.fleet.generation + 1)
        wanted = plans(fleet)[-1]
        fleet.happens(PlanReady(fleet.id(), wanted.number, dataclasses.replace(plan_facts(wanted), unneeded=names)))
    said = [line for line in fleet.told().splitlines() if "no engine needs" in line]
    assert said == [
        "the trainer has 2 tensors that no engine needs: head, adapter",
        "the trainer has 9 tensors that no engine needs: t0, t1, t2, t3, t4, t5, t6, t7, …",
    ]


def test_another_layout_of_the_same_process_is_planned_anew(drive: Any) -> None:
    fleet = drive.joined()
    before = len(plans(fleet))
    fleet.says(TRAINER, ANNOUNCE)
    assert fleet.fleet.is_confirmed(TRAINER), "it says again what it has said"
    fleet.says(TRAINER, Announce(layout=Layout((), (), b"another")))
    assert not fleet.fleet.is_confirmed(TRAINER)
    assert len(plans(fleet)) == before + 1
    fleet.plan()
    assert fleet.fleet.is_confirmed(TRAINER)


def test_what_an_engine_leaves_out_is_said_once(drive: Any) -> None:
    fleet = drive()
    fleet.join()
    entries = (
        LeftOut("unwritten", "a buffer", ("cache",), 1),
        LeftOut("unneeded", "nothing", tuple(f"mtp.{number}" for number in range(9)), 900),
    )
    for _ in range(2):
        fleet.says(FIRST, Announce(layout=Layout((), (), b"", left_out=entries)))
    assert [line for line in fleet.told().splitlines() if "leave out" in line] == [
        "e0/0: rounds leave out 1 unwritten (a buffer): cache; "
        "900 unneeded (nothing): mtp.0, mtp.1, mtp.2, mtp.3, mtp.4, mtp.5, mtp.6, mtp.7, …"
    ]
