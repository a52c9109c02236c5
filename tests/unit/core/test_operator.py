"""The operator's wishes: journaled where they outlive a moment, and nothing is done behind the core's back."""

from dataclasses import replace
from typing import Any

import pytest
from fleets import rank, trainer
from weightsync.orchestrator.core.errors import Trouble
from weightsync.orchestrator.core.events import (
    AbortAsked,
    Asked,
    Call,
    DeadDeclared,
    HoldAsked,
    MaintenanceAsked,
    PolicyChanged,
    RetryAsked,
    StopAsked,
)
from weightsync.orchestrator.core.records import EngineHeld, GrantOver, LiveDirty, Maintenance, RoundBegan, Taint
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.protocol.messages import Abort
from weightsync.orchestrator.protocol.names import RoundName, Version

NAME, VERSION = RoundName(1, 1), Version(7, 1)


def test_a_hold_is_written_once(drive: Any) -> None:
    fleet = drive()
    for held in (True, True, False, False):
        fleet.happens(HoldAsked(fleet.id(), "ann", "new driver", "e0", held))
    holds = [record for record in fleet.written() if isinstance(record, EngineHeld)]
    assert [(record.engine, record.held, record.reason) for record in holds] == [
        ("e0", True, "ann: new driver"), ("e0", False, "ann: new driver"),
    ]  # fmt: skip


def test_no_round_begins_during_maintenance(drive: Any) -> None:
    fleet = drive.joined()
    fleet.happens(MaintenanceAsked(fleet.id(), "ann", "new switch", True))
    fleet.stage(1)
    fleet.settle()
    assert fleet.fleet.round is None
    assert "waiting for the end of maintenance (ann: new switch)" in fleet.fleet.sentence
    again = drive(records=fleet.written())
    assert again.fleet.memory.maintenance == "ann: new switch"
    fleet.happens(MaintenanceAsked(fleet.id(), "ann", "", False))
    fleet.settle()
    assert fleet.round.version == VERSION
    assert Maintenance(on=False, reason="ann") in fleet.written()


@pytest.mark.parametrize(("phase", "torn"), [(Phase.QUIESCING, False), (Phase.WRITING, True)])
def test_an_abort_gives_the_round_up(drive: Any, phase: Phase, torn: bool) -> None:
    fleet = drive()
    going = fleet.to(phase)
    fleet.happens(AbortAsked(fleet.id(), "ann", "wrong data"))
    assert going.trouble == Trouble("aborted: ann: wrong data", "config")
    assert [word.torn for word in fleet.sent(rank("e0"), Abort)] == [torn]
    assert fleet.failures() == [], "the version is tried again, as after any other failure"


def test_but_not_one_that_is_decided(drive: Any) -> None:
    fleet = drive()
    going = fleet.to(Phase.SWITCHING)
    fleet.happens(AbortAsked(fleet.id(), "ann", ""))
    assert fleet.fleet.round is going


def test_a_retry_waits_for_nothing(drive: Any) -> None:
    fleet = drive(options={"backoff": 100.0})
    fleet.to(Phase.PAUSING)
    fleet.fails("e0", Call.PAUSE)
    fleet.passes(20.0)
    fleet.settle()
    assert fleet.fleet.round is None
    fleet.happens(RetryAsked(fleet.id(), "ann", ""))
    fleet.settle()
    assert fleet.round.attempt == 2


def test_a_writer_that_is_declared_dead_taints_nothing_any_more(drive: Any) -> None:
    began = RoundBegan(round=NAME, version=VERSION, attempt=1, engines=("e0",))
    taints = {f"trainer/{number}": Taint(100, "h", "b", {"e0/0": 100}) for number in range(2)}
    fleet = drive(records=[began, LiveDirty(round=NAME, writers=taints)])
    fleet.happens(DeadDeclared(fleet.id(), "ann", "the node is off", trainer(1)))
    assert set(fleet.fleet.unclosed) == {(trainer(0), NAME)}
    why = "declared dead: ann: the node is off"
    assert GrantOver(round=NAME, writer="trainer/1", reason=why) in fleet.written()


def test_but_a_process_that_is_connected_is_not_dead(drive: Any) -> None:
    fleet = drive()
    fleet.to(Phase.WRITING)
    open_grants = dict(fleet.fleet.unclosed)
    fleet.happens(DeadDeclared(fleet.id(), "ann", "the old one", trainer(0)))
    assert fleet.fleet.unclosed == open_grants
    assert "trainer/0 is connected and holds the grant of round 1.1; it is not dead" in fleet.told()


def test_what_nobody_knows_is_an_error(drive: Any) -> None:
    fleet = drive()
    with pytest.raises(TypeError, match="nobody knows what Asked asks for"):
        fleet.happens(Asked(fleet.id(), "ann", ""))


def test_a_daemon_that_stops_begins_no_round(drive: Any) -> None:
    fleet = drive.joined()
    fleet.happens(StopAsked(fleet.id()))
    fleet.stage(1)
    fleet.settle()
    assert fleet.fleet.round is None
    assert "waiting for the next start of the daemon, which is stopping" in fleet.fleet.sentence


def test_a_policy_that_was_read_again_counts_from_the_next_decision_on(drive: Any) -> None:
    fleet = drive.joined()
    fleet.happens(PolicyChanged(fleet.id(), replace(fleet.policy, patience=7.0)))
    assert fleet.fleet.policy.patience == 7.0
    assert fleet.fleet.plan is not None, "nothing else is disturbed"
