"""Which engine can lend what it serves, to whom, and which digest the journal then expects."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from fleets import rank, trainer
from weightsync.orchestrator.core.events import DrainAsked, HoldAsked
from weightsync.orchestrator.core.round import lending
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.state import Unclosed
from weightsync.orchestrator.protocol.layout import Layout, Tensor
from weightsync.orchestrator.protocol.messages import EngineStatus, Hello, TrainerStatus
from weightsync.orchestrator.protocol.names import NO_BYTES, RoundName, Version

VERSION = Version(7, 1)
ENGINES = ("e0", "e1")


def serving(drive: Any, **more: Any) -> Any:
    """A fleet that has committed VERSION."""
    fleet = drive(engines=ENGINES, options={"fan_out": "peers"}, **more)
    fleet.to(Phase.RECORDING)
    fleet.durable()
    fleet.settle()
    return fleet


def _changed(fleet: Any, **status: Any) -> None:
    agent = fleet.fleet.agents[rank("e0", 1)]
    agent.status = msgspec.structs.replace(agent.status, **status)


def _reached_by_a_writer(fleet: Any) -> None:
    fleet.fleet.unclosed[trainer(), RoundName(1, 1)] = Unclosed(1, "h", "b", {rank("e0", 0): 100})


@pytest.mark.parametrize(
    ("happens", "why"),
    [
        (lambda fleet: None, ""),
        (lambda fleet: fleet.loses(rank("e0", 1)), "e0 is not all there"),
        (lambda fleet: _changed(fleet, torn=True), "e0 does not serve"),
        (lambda fleet: _changed(fleet, applied=Version(7, 2)), "e0 does not serve"),
        (lambda fleet: _changed(fleet, window=RoundName(1, 2)), "e0 does not serve"),
        (lambda fleet: fleet.fleet.memory.held.pop("e0/1"), "e0 does not serve"),
        (lambda fleet: fleet.happens(HoldAsked(fleet.id(), "ann", "", "e0", True)), "the operator has e0"),
        (lambda fleet: fleet.happens(DrainAsked(fleet.id(), "ann", "", "e0")), "the operator has e0"),
        (_reached_by_a_writer, "a writer may still reach e0"),
    ],
)
def test_who_serves_the_committed_version_whole_can_lend_it(
    drive: Any, happens: Callable[[Any], None], why: str
) -> None:
    fleet = serving(drive)
    happens(fleet)
    found = lending.why_not(fleet.fleet, "e0")
    assert found.startswith(why)
    assert bool(found) is bool(why)


def test_an_engine_whose_memory_no_transport_reads_does_not_lend(drive: Any) -> None:
    assert lending.why_not(serving(drive, reads_only=("e0",)).fleet, "e0") == "e0 cannot write"


def test_the_journal_knows_what_a_rank_of_the_lender_holds(drive: Any) -> None:
    fleet = serving(drive)
    assert lending.decided(fleet.fleet, "e0", 1) == fleet.digest
    assert lending.decided(fleet.fleet, "e0", 7) == NO_BYTES


def test_one_that_holds_other_boxes_is_lent_nothing(drive: Any) -> None:
    fleet = serving(drive)
    assert lending.lender_of(fleet.fleet, "e1", 0.0) == "e0"
    agent = fleet.fleet.agents[rank("e1", 1)]
    agent.announces(msgspec.structs.replace(agent.announce, layout=Layout((Tensor("w", "int8", (1,)),), (), b"")))
    assert lending.lender_of(fleet.fleet, "e1", 0.0) is None
    agent.announces(msgspec.structs.replace(agent.announce, layout=Layout((), (), b"no rows")))
    assert lending.lender_of(fleet.fleet, "e1", 0.0) is None, "nobody knows what it holds"


def test_who_was_passed_over_is_asked_again_later(drive: Any) -> None:
    fleet = serving(drive)
    fleet.fleet.passed_over["e1", "e0"] = (40.0, "its edge is dead")
    assert [lending.lender_of(fleet.fleet, "e1", now) for now in (39.0, 40.0)] == [None, "e0"]
    assert lending.lender_of(fleet.fleet, "e0", 0.0) == "e1", "the other way round it was not tried"


def test_both_kinds_of_writers_say_in_hello_what_they_have_not_closed() -> None:
    open_rounds = (RoundName(1, 2),)
    fields = {"schema": 1, "run_id": "r", "member": trainer(), "world": 1, "incarnation": 1}
    assert lending.open_rounds(Hello(**fields, trainer=TrainerStatus(open_rounds=open_rounds))) == open_rounds
    assert lending.open_rounds(Hello(**fields, engine=EngineStatus(lending=open_rounds))) == open_rounds
    assert lending.open_rounds(Hello(**fields)) == ()
