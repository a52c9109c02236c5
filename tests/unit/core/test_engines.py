"""Engines outside of a round: probed, told where the daemon is, paused again, resumed."""

from typing import Any

import pytest
from fleets import rank, trainer
from weightsync.orchestrator.core.commands import CallEngine
from weightsync.orchestrator.core.events import Call, CallFailed
from weightsync.orchestrator.core.records import Committed, RoundBegan
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.protocol.messages import EngineStatus
from weightsync.orchestrator.protocol.names import RoundName, Version

TRAINER, ENGINE = trainer(), rank("e0")
VERSION = Version(7, 1)


def test_an_engine_that_is_gone_is_probed_before_its_agents_are_started(drive: Any) -> None:
    """Another server may stand there, with other routes and another number of ranks."""
    fleet = drive.joined()
    fleet.loses_engine("e0")
    fleet.fails("e0", Call.ATTACH, "cannot be reached")
    engine = fleet.fleet.engines["e0"]
    assert (engine.reachable, engine.paused, engine.error) == (False, None, "cannot be reached")
    fleet.passes(20.0)
    fleet.answers("e0", Call.PROBE, True)
    assert (engine.reachable, engine.paused) == (True, True)
    assert Call.ATTACH in engine.calls


def test_why_agents_do_not_start_stays_visible(drive: Any) -> None:
    """And is said once."""
    fleet = drive()
    for _ in range(3):
        fleet.passes(20.0)
        fleet.answers("e0", Call.PROBE, True)
        fleet.fails("e0", Call.ATTACH, "no weight transfer is configured in it")
        assert fleet.fleet.engines["e0"].error == "no weight transfer is configured in it"
    assert fleet.told().count("no weight transfer is configured in it") == 1


def test_an_engine_that_serves_an_older_version_is_paused_again(drive: Any) -> None:
    """Its pause got lost while the others moved on."""
    fleet = drive(("e0", "e1"))
    fleet.to(Phase.RECORDING)
    fleet.durable()
    older = EngineStatus(applied=fleet.fleet.memory.committed)
    newer = fleet.stage(2)
    fleet.settle()
    assert fleet.fleet.round is not None
    fleet.to(Phase.RECORDING)
    fleet.durable()
    assert fleet.fleet.memory.committed == newer
    fleet.loses_engine("e0")
    fleet.bring("e0", older)
    fleet.settle()
    asked = [c for c in fleet.passes(20.0) if isinstance(c, CallEngine) and c.engine == "e0"]
    assert [command.call for command in asked] == [Call.PAUSE]


@pytest.mark.parametrize(("call", "deadline"), [(Call.PROBE, 7.0), (Call.ATTACH, 11.0)])
def test_a_call_has_the_deadline_of_the_settings(drive: Any, call: Call, deadline: float) -> None:
    fleet = drive(options={"probe": 7.0, "attach": 11.0})
    fleet.passes(0.0)
    fleet.answers("e0", Call.PROBE, True)
    asked = [c.deadline for c in fleet.commands if isinstance(c, CallEngine) and c.call is call]
    assert asked == [deadline]


def test_an_idle_engine_is_looked_at_once_an_interval(drive: Any) -> None:
    fleet = drive.joined(probe_interval=3.0)
    before = fleet.called("e0", Call.PROBE)
    for _ in range(6):
        fleet.passes(1.0)
        fleet.settle()
    assert fleet.called("e0", Call.PROBE) - before == 2


def restarted(drive: Any, pairs: tuple[tuple[str, ...], ...]) -> Any:
    """A daemon that starts while e0 and e1, left paused by a round of the last one, hold what was committed."""
    committed = Committed(round=RoundName(1, 1), version=VERSION, sequence=1)
    open_round = RoundBegan(round=RoundName(1, 2), version=Version(7, 2), attempt=1, engines=("e0", "e1"))
    fleet = drive(("e0", "e1"), pairs, records=[committed, open_round])
    fleet.passes(0.0)
    for name in ("e0", "e1"):
        fleet.answers(name, Call.PROBE, True)
    return fleet


def test_an_engine_that_was_left_paused_is_released(drive: Any) -> None:
    fleet = restarted(drive, ())
    fleet.bring("e0", EngineStatus(applied=VERSION))
    fleet.settle()
    fleet.passes(20.0)
    assert [fleet.called(name, Call.RESUME) for name in ("e0", "e1")] == [1, 0]
    fleet.answers("e0", Call.RESUME, False)
    assert not fleet.fleet.engines["e0"].ours_paused
    assert "e0 holds step 1 (generation 7) and was left paused: it is resumed" in fleet.told()


def test_one_of_a_pair_is_released_with_the_other(drive: Any) -> None:
    fleet = restarted(drive, (("e0", "e1"),))
    fleet.bring("e0", EngineStatus(applied=VERSION))
    for _ in range(3):
        fleet.passes(20.0)
        fleet.settle()
    assert fleet.called("e0", Call.RESUME) == 0
    fleet.bring("e1", EngineStatus(applied=VERSION))
    fleet.passes(20.0)
    fleet.settle()
    fleet.passes(20.0)
    assert [fleet.called(name, Call.RESUME) for name in ("e0", "e1")] == [1, 1]


def test_whose_fault_a_failed_call_is_stays_visible(drive: Any) -> None:
    fleet = drive()
    fleet.passes(0.0)
    number = fleet.fleet.engines["e0"].calls[Call.PROBE]
    fleet.happens(CallFailed(fleet.id(), "e0", Call.PROBE, number, "the server has no /pause", "config", False))
    assert fleet.fleet.engines["e0"].complaint == ("the server has no /pause", "config")
    fleet.passes(20.0)
    fleet.answers("e0", Call.PROBE, True)
    fleet.answers("e0", Call.ATTACH)
    assert fleet.fleet.engines["e0"].complaint == ("", "")
