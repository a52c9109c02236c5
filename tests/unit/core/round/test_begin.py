"""A round freezes its members, and pauses whoever would go on with the version before."""

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
    """Both engines serve version 1; one of ``lost``'s ranks is gone when version 2 comes."""
    fleet = drive(("e0", "e1", "e2"), pairs)
    fleet.to(Phase.RECORDING)
    fleet.durable()
    fleet.settle()
    fleet.loses(fleet.ranks_of(lost)[1])
    fleet.settle()
    fleet.plan()
    fleet.stage(2)
    fleet.settle()
    return fleet


def test_an_engine_that_cannot_take_part_is_paused(drive: Any) -> None:
    fleet = serving_without(drive, "e1", ())
    before = fleet.called("e1", Call.PAUSE)
    assert list(fleet.round.engines) == ["e0", "e2"]
    assert before == 2, "once for each round: with it, and because of it"
    assert "e1 does not take part and is paused until it catches up" in fleet.told()


def test_nor_does_its_pair_take_part(drive: Any) -> None:
    """The two are one unit: a new prefill engine beside an old decode engine would mix two models."""
    fleet = serving_without(drive, "e1", (("e0", "e1"),))
    assert list(fleet.round.engines) == ["e2"]
    assert [fleet.called(name, Call.PAUSE) for name in fleet.engines] == [2, 2, 2]
    assert "e0 does not take part and is paused until it catches up" in fleet.told()
