"""What the fleet's state answers about engines, ranks and pairs."""

from typing import Any

import pytest
from fleets import policy_for, rank, trainer
from weightsync.orchestrator.core.machine import start
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.protocol.messages import EngineStatus
from weightsync.orchestrator.protocol.names import RoundName, Version

OLD, NEW = Version(7, 1), Version(7, 2)


def test_a_pair_is_one_unit() -> None:
    fleet, _ = start(policy_for(["e0", "e1", "e2", "e3"], [("e0", "e2")]), "journal", [], 0.0)
    assert [fleet.unit(name) for name in ("e0", "e1", "e2")] == [["e0", "e2"], ["e1"], ["e0", "e2"]]


@pytest.mark.parametrize(
    ("first", "second", "version"),
    [
        (EngineStatus(applied=NEW), EngineStatus(applied=NEW), NEW),
        (EngineStatus(applied=NEW), EngineStatus(applied=OLD), None),
        (EngineStatus(applied=NEW), EngineStatus(applied=NEW, torn=True), None),
        (EngineStatus(applied=NEW), EngineStatus(applied=NEW, window=RoundName(1, 1)), None),
        (EngineStatus(), EngineStatus(), None),
    ],
)
def test_an_engine_holds_what_all_its_ranks_hold_whole(
    drive: Any, first: EngineStatus, second: EngineStatus, version: Version | None
) -> None:
    fleet = drive()
    fleet.connect(rank("e0", 0), first)
    assert fleet.fleet.version_of("e0") is None, "a rank is missing"
    fleet.connect(rank("e0", 1), second)
    assert fleet.fleet.version_of("e0") == version
    assert fleet.fleet.torn("e0") is second.torn


def test_an_engine_is_attached_when_all_its_ranks_have_announced(drive: Any) -> None:
    fleet = drive()
    fleet.passes(0.0)
    fleet.bring("e0")
    assert not fleet.fleet.attached("e0"), "its routes have not answered"
    fleet.fleet.engines["e0"].reachable = True
    assert fleet.fleet.attached("e0")
    fleet.loses(rank("e0", 1))
    assert not fleet.fleet.attached("e0")
    assert [agent.member for agent in fleet.fleet.ranks_of("e0")] == [rank("e0", 0)]


def test_what_keeps_an_engine_away_and_whose_fault_it_is(drive: Any) -> None:
    engine = drive().fleet.engines["e0"]
    assert engine.complaint == ("", "")
    engine.error, engine.fault = "connection refused", "network"
    assert engine.complaint == ("connection refused", "network")
    engine.misfit, engine.misfit_fault = "two shapes", "config"
    assert engine.complaint == ("two shapes", "config")
    engine.misfit = engine.error = ""
    assert engine.complaint == ("", "")


def test_evicted_engines_are_no_longer_counted(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.APPLYING)
    assert going.remaining() == ["e0", "e1"]
    fleet.loses(rank("e0", 1))
    assert going.remaining() == ["e1"]
    assert going.remaining_ranks() == [rank("e1", 0), rank("e1", 1)]
    assert going.engines["e0"].left_out == "e0/1 was lost: reset"


def test_how_many_trainer_ranks_there_are(drive: Any) -> None:
    fleet = drive(options={"trainer_world": 3})
    assert fleet.fleet.trainer_world() == 3
    fleet.connect(trainer(1), world=3)
    assert not fleet.fleet.trainers_whole()
    assert [agent.member for agent in fleet.fleet.trainers()] == [trainer(1)]
