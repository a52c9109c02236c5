"""Engines outside of a round: probed, told where the daemon is, paused again, resumed."""

from typing import Any

from fleets import rank, trainer
from weightsync.orchestrator.core.commands import (
    CallEngine,
)
from weightsync.orchestrator.core.events import Call
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.protocol.messages import (
    EngineStatus,
)

TRAINER, ENGINE = trainer(), rank("e0")


def test_an_engine_that_is_gone_is_probed_before_its_agents_are_started(drive: Any) -> None:
    """Another server may stand there, with other routes and another number of ranks."""
    fleet = drive.joined()
    fleet.loses_engine("e0")
    fleet.fails("e0", Call.INIT, "cannot be reached")
    engine = fleet.fleet.engines["e0"]
    assert (engine.reachable, engine.paused, engine.error) == (False, None, "cannot be reached")
    fleet.passes(20.0)
    fleet.answers("e0", Call.PROBE, True)
    assert (engine.reachable, engine.paused) == (True, True)
    assert Call.INIT in engine.calls


def test_why_agents_do_not_start_stays_visible(drive: Any) -> None:
    """And is said once."""
    fleet = drive()
    for _ in range(3):
        fleet.passes(20.0)
        fleet.answers("e0", Call.PROBE, True)
        fleet.fails("e0", Call.INIT, "no weight transfer is configured in it")
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
