"""Who is waited for, and who is not."""

from typing import Any

from fleets import rank, trainer
from weightsync.orchestrator.core.events import Call
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.protocol.messages import EngineStatus

TRAINER, ENGINE = trainer(), rank("e0")


def test_nobody_waits_for_writes_to_an_engine_that_is_gone(drive: Any) -> None:
    """NIXL may never end them. Its next process is out of their reach, and must not wait to be started."""
    fleet = drive()
    going = fleet.to(Phase.WRITING)
    fleet.loses_engine("e0")
    assert going.phase is Phase.TEARING
    fleet.fails("e0", Call.SWITCH, "the connection broke")
    assert fleet.fleet.round is None
    assert set(fleet.fleet.unclosed) == {TRAINER}, "no round begins before"
    fleet.bring("e0", EngineStatus(), incarnation=555)
    assert fleet.fleet.unclosed == {}
