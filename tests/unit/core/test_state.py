"""What the fleet's state answers about engines, ranks and pairs."""

from typing import Any

import pytest
from fleets import BYTES_PER_EDGE, policy_for, rank, trainer
from weightsync.orchestrator.core.errors import Trouble
from weightsync.orchestrator.core.machine import start
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.state import Unclosed
from weightsync.orchestrator.protocol.edges import PeerTransfer
from weightsync.orchestrator.protocol.messages import Closed, EngineStatus, Hello
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
    engine.blame = Trouble("it never answers", "engine")
    assert engine.complaint == ("it never answers", "engine")


def test_engines_that_were_left_out_are_no_longer_counted(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.WRITING)
    assert going.remaining() == ["e0", "e1"]
    fleet.loses(rank("e0", 1))
    fleet.passes(fleet.policy.heartbeat)
    assert going.remaining() == ["e1"]
    assert (going.has("e0"), going.has("e1"), going.has("e9")) == (False, True, False)
    assert list(going.remaining_ranks()) == [rank("e1", 0), rank("e1", 1)]
    assert going.engines["e0"].left_out == "e0/1 was lost: reset"


def test_a_writer_is_done_when_nothing_is_open_towards_who_is_left(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.WRITING)
    peers = tuple(PeerTransfer(member, BYTES_PER_EDGE, 1, 0.1, (11, 13)) for member in fleet.ranks_of("e1"))
    fleet.says(trainer(), Closed(round=going.name, peers=peers, final=False))
    assert not going.is_done(trainer())
    going.engines["e0"].left_out = "gone"
    assert going.is_done(trainer())


@pytest.mark.parametrize(
    ("host", "boot", "incarnation", "dead"),
    [("h", "b", 2, True), ("h", "b", 1, False), ("h", "c", 2, False), ("i", "b", 2, False), ("", "", 2, False)],
)
def test_what_proves_a_writer_dead(host: str, boot: str, incarnation: int, dead: bool) -> None:
    hello = Hello(schema=2, run_id="r", member=trainer(), world=1, incarnation=incarnation, host=host, boot=boot)
    assert Unclosed(1, "h" if host else "", "b" if boot else "", {}).is_proved_dead_by(hello) is dead


def test_how_many_trainer_ranks_there_are(drive: Any) -> None:
    fleet = drive(options={"trainer_world": 3})
    assert fleet.fleet.trainer_world() == 3
    fleet.connect(trainer(1), world=3)
    assert not fleet.fleet.trainers_whole()
    assert [agent.member for agent in fleet.fleet.trainers()] == [trainer(1)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_ranks_are_in_their_order_however_they_come(drive: Any, order: tuple[int, ...]) -> None:
    fleet = drive(ranks=3)
    for number in order:
        fleet.connect(rank("e0", number))
    fleet.connect(rank("e0", 1))
    assert [agent.member.rank for agent in fleet.fleet.ranks_of("e0")] == [0, 1, 2]
