"""A round freezes its members; whoever is not among them goes on with the version before until another is decided."""

from typing import Any

from fleets import trainer
from weightsync.orchestrator.core.events import Call
from weightsync.orchestrator.core.records import RoundBegan
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.protocol.names import RoundName, Version


def test_the_members_are_those_of_the_moment(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.PAUSING)
    assert (going.name, going.version, going.attempt, going.catch_up) == (RoundName(1, 1), Version(7, 1), 1, False)
    assert {member: incarnation - 100 for member, incarnation in going.ranks.items()} == {
        member: member.rank for member in fleet.ranks_of("e0", "e1")
    }
    assert going.writers == {trainer(): tuple(fleet.ranks_of("e0", "e1"))}
    assert RoundBegan(round=going.name, version=going.version, attempt=1, engines=("e0", "e1")) in fleet.written()


def test_numbers_go_on_over_rounds(drive: Any) -> None:
    fleet = drive()
    fleet.to(Phase.RECORDING)
    fleet.durable()
    fleet.settle()
    fleet.stage(2)
    fleet.settle()
    assert fleet.round.name == RoundName(1, 2)


def serving_without(drive: Any, lost: str, pairs: Any) -> Any:
    """All engines serve version 1; one of ``lost``'s ranks is gone when version 2 comes."""
    fleet = drive(("e0", "e1", "e2"), pairs, options={"min_engines": 1})
    fleet.to(Phase.RECORDING)
    fleet.durable()
    fleet.settle()
    fleet.loses(fleet.ranks_of(lost)[1])
    fleet.settle()
    fleet.plan()
    fleet.stage(2)
    fleet.settle()
    fleet.engines = tuple(fleet.round.engines)
    return fleet


def test_an_engine_that_is_not_whole_does_not_take_part(drive: Any) -> None:
    fleet = serving_without(drive, "e1", ())
    assert list(fleet.round.engines) == ["e0", "e2"]
    assert fleet.round.quorum == 1


def test_nor_does_its_pair_which_is_paused_when_another_version_is_decided(drive: Any) -> None:
    """The two are one unit: a new prefill engine beside an old decode engine would mix two models."""
    fleet = serving_without(drive, "e1", (("e0", "e1"),))
    assert list(fleet.round.engines) == ["e2"]
    before = fleet.called("e0", Call.PAUSE)
    fleet.to(Phase.DECIDING)
    assert fleet.called("e0", Call.PAUSE) == before, "until then it may serve what is committed"
    fleet.durable()
    assert fleet.called("e0", Call.PAUSE) == before + 1
    assert "e0 is paused: step 2 (generation 7) is decided" in fleet.told()
