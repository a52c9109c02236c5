"""The line of history: every figure worked out by hand."""

from typing import Any

from fleets import BYTES_PER_EDGE, rank, trainer
from weightsync.orchestrator.core.errors import Trouble
from weightsync.orchestrator.core.events import Call, CallDone
from weightsync.orchestrator.core.records import RoundEnded, Taint
from weightsync.orchestrator.core.round.summary import summary
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.edges import PeerTransfer
from weightsync.orchestrator.protocol.messages import EngineStatus, Left


def done(fleet: Any, engine: str, call: Call, seconds: float) -> None:
    number = fleet.fleet.engines[engine].calls[call]
    fleet.happens(CallDone(fleet.id(), engine, call, number, seconds, call is not Call.RESUME))


def test_times_of_a_round(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    fleet.now = 100.0
    going = fleet.to(Phase.PAUSING)
    fleet.now = 101.0
    done(fleet, "e0", Call.PAUSE, 0.5)
    done(fleet, "e1", Call.PAUSE, 1.0)
    fleet.to(Phase.WRITING)
    fleet.now = 104.0
    moved = [PeerTransfer(member, BYTES_PER_EDGE, 2, 0.1 * (1 + member.rank), (11, 13)) for member in going.ranks]
    fleet.says(trainer(), fleet.closed(peers=tuple(moved)))
    fleet.now = 104.5
    for member in fleet.ranks_of():
        fleet.says(member, fleet.verified(apply_seconds=0.25, digest_seconds=0.125 * (1 + member.rank)))
    fleet.to(Phase.SWITCHING)
    fleet.now = 104.75
    fleet.leave(going.version)
    done(fleet, "e0", Call.FINISH, 0.01)
    done(fleet, "e1", Call.FINISH, 0.01)
    fleet.now = 105.0
    done(fleet, "e0", Call.RESUME, 0.5)
    fleet.now = 106.0
    done(fleet, "e1", Call.RESUME, 1.5)
    ended = next(record for record in fleet.written() if isinstance(record, RoundEnded))
    assert (ended.outcome, ended.reason, ended.fault, ended.left_out) == ("committed", "", "", ())
    assert (ended.bytes, ended.descriptors) == (4 * BYTES_PER_EDGE, 8)
    assert ended.times == {
        "pausing": 1.0, "quiescing": 0.0, "marking": 0.0, "exposing": 0.0, "writing": 3.0, "verifying": 0.5,
        "deciding": 0.0, "switching": 1.5, "applying": 0.25, "recording": 0.0, "stall": 6.0, "http": 2.76, "total": 6.0,
        "wire": 0.2, "apply": 0.25, "digest": 0.25, "convert": 0.1, "slot_digest": 0.1, "switch": 0.0, "audit": 0.0,
        "skew": 1.0,
    }  # fmt: skip


def test_a_round_that_failed_says_why_and_whose_fault_and_who_may_still_write(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.WRITING)
    fleet.says(rank("e0", 1), Left(round=going.name, status=EngineStatus(torn=True)))
    going.trouble = Trouble("the decode engine is gone", "engine", retry=False)
    ended = summary(Turn(fleet.fleet, fleet.now, 1), going, "failed")
    assert (ended.outcome, ended.reason, ended.fault) == ("failed", "the decode engine is gone", "engine")
    assert ended.left_out == ("e0",)
    assert "stall" not in ended.times, "nobody was resumed"
    reach = {"e0/0": 100, "e0/1": 101, "e1/0": 100, "e1/1": 101}
    assert ended.unclosed == {"trainer/0": Taint(100, "", "", reach)}


def test_a_round_that_went_on_without_engines_says_why(drive: Any) -> None:
    fleet = drive(("e0", "e1", "e2", "e3"))
    going = fleet.to(Phase.WRITING)
    going.engines["e1"].left_out = "e1: the connection broke"
    for name in ("e2", "e3"):
        going.engines[name].left_out = "digest differs"
    ended = summary(Turn(fleet.fleet, fleet.now, 1), going, "committed")
    assert (ended.left_out, ended.fault) == (("e1", "e2", "e3"), "")
    assert ended.reason == "e1: the connection broke; e2, e3: digest differs"
