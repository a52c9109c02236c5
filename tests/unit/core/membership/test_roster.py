"""Which engines are members: those of the configuration that may change, without those that were forgotten."""

from dataclasses import replace
from typing import Any

import pytest
from fleets import ANNOUNCE, rank, trainer
from weightsync.orchestrator.core.commands import Drop, MakePlan, Refuse
from weightsync.orchestrator.core.events import Call, CallDone, DrainAsked, ForgetAsked, HoldAsked, PolicyChanged, Tick
from weightsync.orchestrator.core.membership.engines import Wish, wish
from weightsync.orchestrator.core.policy import EngineConfig
from weightsync.orchestrator.core.records import Committed, EngineDrained, EngineForgotten
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.protocol.messages import Abort, EngineStatus, Left
from weightsync.orchestrator.protocol.names import Version

TRAINER = trainer()
THREE = ("e0", "e1", "e2")


def drain(fleet: Any, engine: str) -> None:
    fleet.happens(DrainAsked(fleet.id(), "ann", "new image", engine))


def forget(fleet: Any, engine: str) -> None:
    fleet.happens(ForgetAsked(fleet.id(), "ann", "scaled down", engine))


def release(fleet: Any, engine: str) -> None:
    fleet.happens(HoldAsked(fleet.id(), "ann", "", engine, False))


def configured(fleet: Any, *names: str, **more: Any) -> None:
    policy = replace(fleet.fleet.policy, engines=tuple(EngineConfig(name) for name in names), **more)
    fleet.happens(PolicyChanged(fleet.id(), policy))


def commit(fleet: Any, number: int) -> None:
    """A whole round by those that are members now."""
    fleet.stage(number)
    fleet.settle()
    fleet.engines = tuple(fleet.round.engines)
    while fleet.fleet.round is not None:
        fleet._forward(fleet.round)
    fleet.settle()


def committed(fleet: Any, engines: tuple[str, ...] = THREE) -> Any:
    going = fleet(engines=engines)
    going.to(Phase.PAUSING)
    commit_of(going)
    return going


def commit_of(fleet: Any) -> None:
    while fleet.fleet.round is not None:
        fleet._forward(fleet.round)
    fleet.settle()


def test_a_drained_engine_serves_on_until_another_version_is_decided(drive: Any) -> None:
    fleet = committed(drive)
    drain(fleet, "e1")
    assert EngineDrained(engine="e1", drained=True, reason="ann: new image") in fleet.written()
    fleet.settle()
    assert wish(fleet.fleet, "e1")[0] is Wish.SERVE
    assert fleet.fleet.quorum() == 1, "half of the two that are there to be"
    fleet.stage(2)
    fleet.settle()
    assert list(fleet.round.engines) == ["e0", "e2"]
    fleet.engines = ("e0", "e2")
    commit_of(fleet)
    assert fleet.fleet.memory.committed == Version(7, 2)
    assert wish(fleet.fleet, "e1") == (Wish.PAUSE, f"it holds {Version(7, 1)}, not {Version(7, 2)}")
    release(fleet, "e1")
    fleet.answers("e1", Call.PAUSE, True)
    fleet.settle()
    assert list(fleet.round.engines) == ["e1"], "it catches up"


def test_a_drain_outlives_the_daemon_and_is_of_the_whole_pair(drive: Any) -> None:
    fleet = drive(engines=THREE, pairs=(("e0", "e1"),))
    drain(fleet, "e1")
    again = drive(engines=THREE, pairs=(("e0", "e1"),), records=fleet.written())
    assert sorted(again.fleet.memory.drains) == ["e0", "e1"]
    assert again.fleet.expected() == ["e2"]
    release(again, "e0")
    assert again.fleet.expected() == ["e0", "e1", "e2"]


def test_a_pair_is_forgotten_and_taken_back_as_one(drive: Any) -> None:
    fleet = drive(engines=THREE, pairs=(("e0", "e1"),))
    forget(fleet, "e0")
    assert list(fleet.fleet.engines) == ["e2"]
    release(fleet, "e1")
    assert list(fleet.fleet.engines) == list(THREE)


def test_what_is_not_over_with_a_forgotten_engine_is_said(drive: Any) -> None:
    fleet = drive(engines=("e0", "e1"))
    fleet.to(Phase.WRITING)
    for member in fleet.ranks_of("e1"):
        fleet.says(member, Left(round=fleet.round.name, status=EngineStatus(torn=True)))
    forget(fleet, "e1")
    assert "e1 is forgotten: ann: scaled down; its memory may be torn: it stays paused, end it" in fleet.told()
    assert "trainer/0 of round 1.1 may still write into it" in fleet.told()


def test_who_is_drained_is_not_waited_for(drive: Any) -> None:
    fleet = drive(engines=("e0", "e1"))
    drain(fleet, "e1")
    for member in fleet.ranks_of("e0"):
        fleet.connect(member)
        fleet.says(member, ANNOUNCE)
    fleet.answers("e0", Call.PROBE, True)
    fleet.connect(TRAINER)
    fleet.says(TRAINER, ANNOUNCE)
    assert any(isinstance(command, MakePlan) for command in fleet.commands)


def test_an_engine_that_is_forgotten_is_no_member_and_its_processes_stay_out(drive: Any) -> None:
    fleet = committed(drive)
    forget(fleet, "e1")
    assert list(fleet.fleet.engines) == ["e0", "e2"]
    assert [command.member for command in fleet.commands if isinstance(command, Drop)] == fleet.ranks_of("e1")
    assert "it goes on serving" in fleet.told()
    assert rank("e1") not in {*fleet.fleet.agents, *fleet.fleet.gone}
    refused = [command for command in fleet.connect(rank("e1")) if isinstance(command, Refuse)]
    assert (refused[0].refused.retry, "was forgotten (ann: scaled down)" in refused[0].refused.reason) == (True, True)
    again = drive(engines=THREE, records=fleet.written())
    assert list(again.fleet.engines) == ["e0", "e2"]
    fleet.plan()
    commit(fleet, 2)
    assert fleet.fleet.memory.live == {"e0", "e2"}
    release(fleet, "e1")
    assert list(fleet.fleet.engines) == ["e0", "e1", "e2"], "in the configuration's order"


def test_the_answer_to_a_call_of_a_forgotten_engine_is_nobodys(drive: Any) -> None:
    fleet = drive(engines=("e0", "e1"))
    fleet.happens(Tick(fleet.id()))
    number = fleet.fleet.engines["e1"].calls[Call.PROBE]
    forget(fleet, "e1")
    fleet.happens(CallDone(fleet.id(), "e1", Call.PROBE, number, 0.1, True))
    assert list(fleet.fleet.engines) == ["e0"]


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.RECORDING])
def test_an_engine_is_forgotten_in_any_phase_and_the_round_goes_on(drive: Any, phase: Phase) -> None:
    fleet = drive(engines=THREE, options={"min_engines": 1.0})
    going = fleet.to(phase)
    forget(fleet, "e1")
    assert not any(
        record for record in fleet.written() if isinstance(record, EngineForgotten) and record.engine != "e1"
    )
    fleet.engines = ("e0", "e2")
    if phase is Phase.DECIDING:
        assert going.has("e1"), "the decision is being written"
        fleet.durable()
    assert not going.has("e1")
    assert "e1" in fleet.fleet.engines, "until the round is over"
    commit_of(fleet)
    fleet.happens(Tick(fleet.id()))
    assert "e1" not in fleet.fleet.engines
    assert fleet.fleet.memory.committed == going.version
    assert fleet.fleet.memory.live == {"e0", "e2"}
    assert bool(fleet.sent(rank("e1"), Abort)) is (phase not in (Phase.DECIDING, Phase.SWITCHING))


def test_engines_come_and_go_with_the_configuration(drive: Any) -> None:
    fleet = committed(drive, ("e0", "e1"))
    configured(fleet, "e2", "e0")
    assert list(fleet.fleet.engines) == ["e2", "e0"]
    fleet.engines = ("e2",)
    for member in fleet.ranks_of("e2"):
        fleet.connect(member)
        fleet.says(member, ANNOUNCE)
    fleet.settle()
    fleet.plan()  # without the one that left …
    fleet.plan()  # … and with the new one
    fleet.settle()
    assert list(fleet.round.engines) == ["e2"], "it catches up"
    assert fleet.fleet.memory.committed == Version(7, 1)


def test_a_forgotten_engine_comes_back_when_the_configuration_names_it_anew(drive: Any) -> None:
    fleet = drive(engines=("e0", "e1"))
    forget(fleet, "e1")
    configured(fleet, "e0", "e1")
    assert list(fleet.fleet.engines) == ["e0"], "it named it before"
    configured(fleet, "e0")
    configured(fleet, "e0", "e1")
    assert list(fleet.fleet.engines) == ["e0", "e1"]
    assert fleet.fleet.memory.forgotten_engines == {}


def test_the_last_engine_may_go(drive: Any) -> None:
    fleet = committed(drive, ("e0",))
    configured(fleet)
    assert fleet.fleet.engines == {}
    fleet.stage(2)
    assert fleet.fleet.round is None
    assert [record.version for record in fleet.written() if isinstance(record, Committed)] == [Version(7, 1)]
