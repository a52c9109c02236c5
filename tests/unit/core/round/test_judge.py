"""What is wrong with a report tears the round that waited for it."""

from typing import Any

import pytest
from fleets import rank, trainer
from weightsync.orchestrator.core.events import Call
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.protocol.messages import Abort, EngineStatus, Left, PeerTransfer
from weightsync.orchestrator.protocol.names import Member

TRAINER, ENGINE = trainer(), rank("e0")


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        ({"error": "no route to host", "fault": "network"}, "trainer/0 could not write: no route to host"),
        ({"peers": (PeerTransfer(Member("inference", "e9", 3), 1, 1, 0.1, (0, 0)),)}, "which it was not granted"),
    ],
    ids=["failed", "to a stranger"],
)
def test_a_bad_close_tears(drive: Any, report: dict[str, Any], reason: str) -> None:
    fleet = drive()
    going = fleet.to(Phase.WRITING)
    fleet.says(TRAINER, fleet.closed(**report))
    assert going.phase is Phase.TEARING
    assert reason in going.reason


@pytest.mark.parametrize("wrong", [{"digest": (1, 1)}, {"bytes": 99}, {"error": "out of memory"}])
def test_a_bad_verification_tears_and_the_engine_stays_paused(drive: Any, wrong: dict[str, Any]) -> None:
    fleet = drive()
    going = fleet.to(Phase.VERIFYING)
    fleet.says(ENGINE, fleet.verified(**wrong))
    assert going.phase is Phase.TEARING
    for member in fleet.ranks_of("e0"):
        assert [abort.torn for abort in fleet.sent(member, Abort)] == [True]
        fleet.says(member, Left(round=going.name, status=EngineStatus(torn=True)))
    fleet.fails("e0", Call.SWITCH, "aborted")
    assert fleet.fleet.round is None
    assert fleet.called("e0", Call.RESUME) == 0
    assert "e0 torn and paused" in fleet.fleet.sentence
