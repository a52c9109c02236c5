"""Who is waited for, and who is not."""

from typing import Any

from fleets import BYTES_PER_EDGE, trainer
from weightsync.orchestrator.core.round import waits
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.protocol.edges import PeerTransfer
from weightsync.orchestrator.protocol.messages import EngineStatus

TRAINER = trainer()


def test_nobody_waits_for_writes_to_an_engine_that_is_gone(drive: Any) -> None:
    """NIXL may never end them. Its next process is out of their reach, and must not wait to be started."""
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.WRITING)
    fleet.loses_engine("e0")
    fleet.passes(fleet.policy.heartbeat)
    assert going.remaining() == ["e1"]
    peers = tuple(PeerTransfer(member, BYTES_PER_EDGE, 1, 0.1, (11, 13)) for member in fleet.ranks_of("e1"))
    fleet.says(TRAINER, fleet.closed(peers=peers, final=False))
    assert going.phase is Phase.VERIFYING
    assert set(fleet.fleet.unclosed) == {(TRAINER, going.name)}
    fleet.bring("e0", EngineStatus(), incarnation=555)
    assert fleet.fleet.unclosed == {}


def test_a_writer_without_a_connection_is_waited_for_while_it_owes_something(drive: Any) -> None:
    fleet = drive()
    going = fleet.to(Phase.WRITING)
    assert list(waits.writers_away(going)) == []
    fleet.loses(TRAINER)
    assert list(waits.writers_away(going)) == [TRAINER]
    going.final.add(TRAINER)
    assert list(waits.writers_away(going)) == []


def test_the_engine_of_a_worker_is_in_its_name() -> None:
    assert waits.engines_of(["e0/3", "rack/7", "e1"]) == {"e0", "rack", "e1"}
