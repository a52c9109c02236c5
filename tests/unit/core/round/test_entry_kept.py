"""An attempt that is given up: engines that have all of the version keep it, and are written to no more."""

from typing import Any

import pytest
from fleets import BYTES_PER_EDGE, rank, trainer
from weightsync.orchestrator.core.commands import SendPlan
from weightsync.orchestrator.core.errors import InvariantViolation
from weightsync.orchestrator.core.events import AbortAsked, Tick
from weightsync.orchestrator.core.records import Decided
from weightsync.orchestrator.core.round import begin
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.protocol.edges import PeerTransfer
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Closed,
    Converting,
    EngineStatus,
    Expose,
    Grant,
    Holding,
    Ready,
    Staged,
    Verified,
    Verify,
)
from weightsync.orchestrator.protocol.names import RoundName, Version

FIRST, SECOND = Version(7, 1), Version(7, 2)
PAIR = ("e0", "e1")


def serving(drive: Any, mode: str = "copy") -> Any:
    """A fleet that serves FIRST, and of which a commit needs both engines."""
    fleet = drive(engines=PAIR, lands=dict.fromkeys(PAIR, mode), options={"min_engines": 2})
    fleet.to(Phase.RECORDING)
    fleet.durable()
    fleet.settle()
    fleet.commands.clear()
    return fleet


def given_up(drive: Any, mode: str = "copy", phase: Phase = Phase.VERIFYING, verified: bool = True) -> Any:
    """The attempt at SECOND that e1 has cost, when all had arrived at e0, which has verified it or not."""
    fleet = serving(drive, mode)
    fleet.stage(2)
    fleet.settle()
    going = fleet.to(phase)
    if phase is Phase.WRITING:
        sent = tuple(PeerTransfer(m, BYTES_PER_EDGE, 1, 0.01, fleet.digest) for m in fleet.ranks_of("e0"))
        fleet.says(trainer(), Closed(round=going.name, peers=sent, final=False))
    if verified:
        verifies(fleet, going.name)
    if phase is Phase.WRITING:
        fleet.happens(AbortAsked(fleet.id(), "ann", ""))
        fleet.says(trainer(), Closed(round=going.name))
    else:
        fleet.says(rank("e1"), fleet.verified(digest=(1, 1)))
    assert fleet.fleet.round is None
    return fleet


def verifies(fleet: Any, name: RoundName, **other: Any) -> None:
    for member in fleet.ranks_of("e0"):
        said = {"round": name, "digest": fleet.digest, "bytes": BYTES_PER_EDGE, **other}
        fleet.says(member, Verified(**said, apply_seconds=0.0, digest_seconds=0.0))


def tried_again(fleet: Any) -> Any:
    fleet.settle()
    fleet.passes(fleet.policy.backoff)
    fleet.settle()
    fleet.happens(Tick(fleet.id()))
    assert fleet.round.attempt == 2
    return fleet.round


def writes_to(going: Any) -> set[str]:
    return {target.engine for targets in going.writers.values() for target in targets}


@pytest.mark.parametrize("mode", ["copy", "flip"])
def test_what_is_verified_is_switched_to_and_not_written_again(drive: Any, mode: str) -> None:
    fleet = given_up(drive, mode)
    assert [len(fleet.sent(rank(name), Abort)) for name in PAIR] == [0, 1]
    going = tried_again(fleet)
    assert writes_to(going) == {"e1"}
    assert "e0 has all of it since an earlier one" in fleet.told()
    fleet.to(Phase.DECIDING)
    assert len(fleet.sent(rank("e0"), Expose)) == 1, "another one would be the end of it"
    assert len(fleet.sent(rank("e0"), Verify)) == 1
    assert {target.engine for target in fleet.sent(trainer(), Grant)[-1].members} == {"e1"}
    decided = [record for record in fleet.written() if isinstance(record, Decided)][-1]
    assert sorted(decided.digests) == ["e0/0", "e0/1", "e1/0", "e1/1"]
    fleet.to(Phase.RECORDING)
    fleet.durable()
    assert fleet.fleet.memory.committed == SECOND


def test_what_has_arrived_in_mid_write_is_looked_at_when_it_is_given_up(drive: Any) -> None:
    fleet = given_up(drive, phase=Phase.WRITING, verified=False)
    [asked] = fleet.sent(rank("e0"), Verify)
    verifies(fleet, asked.round)
    assert writes_to(tried_again(fleet)) == {"e1"}


def test_a_connection_that_is_lost_meanwhile_loses_nothing(drive: Any) -> None:
    fleet = given_up(drive)
    status = fleet.fleet.agents[rank("e0")].status
    fleet.loses(rank("e0"))
    fleet.connect(rank("e0"), status)
    fleet.says(rank("e0"), fleet.announcement("e0"))
    told = [command.connect for command in fleet.commands if isinstance(command, SendPlan)][-1]
    fleet.says(rank("e0"), Ready(fingerprint=told.fingerprint))
    assert writes_to(tried_again(fleet)) == {"e1"}


def other_staging(fleet: Any) -> None:
    fleet.says(
        trainer(), Staged(version=SECOND, bytes=BYTES_PER_EDGE, convert_seconds=0.1, digest_seconds=0.1, restaged=1)
    )


def started_anew(fleet: Any) -> None:
    """And says, in error, that its memory holds the same."""
    status = fleet.fleet.agents[rank("e0")].status
    fleet.loses_engine("e0")
    fleet.bring("e0", status, incarnation=777)
    fleet.plan()


def announces_anew(fleet: Any) -> None:
    fleet.boundary = False
    for member in fleet.ranks_of("e0"):
        fleet.says(member, fleet.announcement("e0"))
        fleet.plan()


@pytest.mark.parametrize(
    "happens",
    [
        other_staging,
        started_anew,
        announces_anew,
        lambda fleet: fleet.says(rank("e0", 1), Holding(status=EngineStatus(applied=FIRST))),
    ],
    ids=["staged again", "another process", "another layout", "forgotten"],
)
def test_what_may_not_be_there_is_written_again(drive: Any, happens: Any) -> None:
    fleet = given_up(drive)
    happens(fleet)
    fleet.settle()
    fleet.passes(fleet.policy.backoff)
    fleet.settle()
    fleet.happens(Tick(fleet.id()))
    assert writes_to(fleet.round) == {"e0", "e1"}


@pytest.mark.parametrize("told", [None, {"digest": (1, 1)}, {"error": "a kernel failed"}])
def test_what_is_not_known_to_be_the_version_is_written_again(drive: Any, told: Any) -> None:
    """It has not answered, holds other bytes, or cannot tell."""
    fleet = given_up(drive, phase=Phase.WRITING, verified=False)
    if told is not None:
        verifies(fleet, fleet.sent(rank("e0"), Verify)[0].round, **told)
    assert writes_to(tried_again(fleet)) == {"e0", "e1"}


def test_what_is_partly_there_is_dropped(drive: Any) -> None:
    fleet = serving(drive)
    fleet.stage(2)
    fleet.settle()
    going = fleet.to(Phase.WRITING)
    sent = PeerTransfer(rank("e0"), BYTES_PER_EDGE, 1, 0.01, fleet.digest)
    fleet.says(trainer(), Closed(round=going.name, peers=(sent,), final=False))
    fleet.happens(AbortAsked(fleet.id(), "ann", ""))
    assert [len(fleet.sent(member, Abort)) for member in fleet.ranks_of("e0")] == [1, 1]
    assert fleet.fleet.engines["e0"].kept is None


def test_what_was_written_ahead_is_dropped(drive: Any) -> None:
    """The trainer may come to other bytes when it converts the same step again."""
    fleet = serving(drive)
    fleet.says(trainer(), Converting(version=SECOND))
    fleet.happens(Tick(fleet.id()))
    going = fleet.to(Phase.VERIFYING)
    verifies(fleet, going.name)
    fleet.says(trainer(), Converting(version=None))
    assert fleet.fleet.engines["e0"].kept is None
    assert len(fleet.sent(rank("e0"), Abort)) == 1


def test_what_another_attempt_fails_with_is_kept_for_the_next(drive: Any) -> None:
    fleet = given_up(drive)
    tried_again(fleet)
    fleet.happens(AbortAsked(fleet.id(), "ann", ""))
    fleet.passes(2 * fleet.policy.backoff)
    fleet.settle()
    fleet.happens(Tick(fleet.id()))
    assert (fleet.round.attempt, writes_to(fleet.round)) == (3, {"e1"})


def test_no_round_takes_for_written_what_is_not(drive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = given_up(drive)
    known = fleet.fleet.engines["e0"].kept
    fleet.says(rank("e0"), Holding(status=EngineStatus(applied=FIRST)))
    monkeypatch.setattr(begin, "_kept", lambda *_: {"e0": known})
    fleet.settle()
    with pytest.raises(InvariantViolation, match="takes e0 for written"):
        fleet.passes(fleet.policy.backoff)
