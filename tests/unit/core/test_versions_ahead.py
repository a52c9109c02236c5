"""Rounds that run ahead of the version's publish: what begins them, what they wait for, and how they end."""

from typing import Any

import pytest
from fleets import rank, trainer
from weightsync.orchestrator.core import conditions, invariants
from weightsync.orchestrator.core.commands import Append
from weightsync.orchestrator.core.errors import InvariantViolation
from weightsync.orchestrator.core.events import MarkersSeen, StableSeen
from weightsync.orchestrator.core.records import Decided, RoundEnded
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.protocol.edges import PeerTransfer
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Closed,
    Converting,
    EngineStatus,
    Grant,
    Left,
    Staged,
    TrainerStatus,
)
from weightsync.orchestrator.protocol.names import NO_BYTES, Version

TRAINER, ENGINE = trainer(), rank("e0")
SECOND, THIRD = Version(7, 2), Version(7, 3)


def serving(drive: Any, lands: str = "copy", engines: tuple[str, ...] = ("e0", "e1"), **options: Any) -> Any:
    """A fleet that serves the first version."""
    fleet = drive(engines=engines, lands=dict.fromkeys(engines, lands), options=options)
    fleet.to(Phase.RECORDING)
    fleet.durable()
    fleet.settle()
    return fleet


def writing(drive: Any, **more: Any) -> Any:
    """… and that writes the second while the trainer converts it."""
    fleet = serving(drive, **more)
    fleet.says(TRAINER, Converting(version=SECOND))
    fleet.to(Phase.WRITING)
    return fleet


def staged(fleet: Any, version: Version = SECOND) -> None:
    fleet.says(TRAINER, Staged(version=version, bytes=1, convert_seconds=0.0, digest_seconds=0.0))


def stable(fleet: Any, version: Version = SECOND) -> None:
    fleet.happens(MarkersSeen(fleet.id(), (StableSeen(version.step, version.generation),)))


@pytest.mark.parametrize("lands", ["copy", "flip"])
def test_what_is_being_converted_is_granted_and_nothing_is_decided_before_it_is_published(
    drive: Any, lands: str
) -> None:
    fleet = writing(drive, lands=lands)
    assert fleet.sent(TRAINER, Grant)[-1].version == SECOND
    assert ("TRANSFER_READY", SECOND) not in fleet.marked(), "there is no STABLE that it could stand beside"
    fleet.to(Phase.VERIFYING)
    for member in fleet.ranks_of():
        fleet.says(member, fleet.verified())
    assert fleet.round.phase is Phase.VERIFYING
    stable(fleet)
    assert fleet.round.phase is Phase.VERIFYING, "a marker is no rank's word"
    staged(fleet)
    assert fleet.round.phase is Phase.DECIDING
    assert ("TRANSFER_READY", SECOND) in fleet.marked()
    fleet.to(Phase.RECORDING)
    fleet.durable()
    assert fleet.fleet.memory.committed == SECOND


def test_a_rank_that_has_staged_and_no_marker_is_not_enough(drive: Any) -> None:
    fleet = writing(drive)
    fleet.says(TRAINER, fleet.closed())
    for member in fleet.ranks_of():
        fleet.says(member, fleet.verified())
    staged(fleet)
    assert fleet.round.phase is Phase.VERIFYING
    stable(fleet)
    assert fleet.round.phase is Phase.DECIDING


@pytest.mark.parametrize("word", ["given up", "another"])
def test_what_is_given_up_ends_its_round_and_is_no_engines_fault(drive: Any, word: str) -> None:
    fleet = writing(drive)
    grant = fleet.sent(TRAINER, Grant)[-1]
    fleet.says(TRAINER, Converting(version=None if word == "given up" else THIRD))
    fleet.says(
        TRAINER,
        Closed(round=grant.round, peers=tuple(PeerTransfer(m, 0, 0, 0.0, NO_BYTES, "stopped") for m in grant.members)),
    )
    ended = [record for record in fleet.written() if isinstance(record, RoundEnded)][-1]
    assert (ended.outcome, ended.fault, ended.left_out) == ("failed", "trainer", ())
    assert "trainer/0 has given it up" in ended.reason
    assert all(engine.failures == 0 for engine in fleet.fleet.engines.values())
    assert fleet.failures() == [], "its trainer knows better than FAILED"
    assert [order.round for order in fleet.sent(ENGINE, Abort)] == [grant.round]
    for member in fleet.ranks_of():
        fleet.says(member, Left(round=grant.round, status=EngineStatus(applied=Version(7, 1))))
    staged(fleet, THIRD)
    stable(fleet, THIRD)
    fleet.passes(5.0)
    assert fleet.round.version == THIRD


def test_a_version_is_tried_ahead_once(drive: Any) -> None:
    fleet = writing(drive)
    fleet.says(TRAINER, fleet.closed(peers=(), error="no port is up", fault="network"))
    assert fleet.fleet.round is None
    fleet.passes(60.0)
    assert fleet.fleet.round is None, "still being converted"
    fleet.settle()
    staged(fleet)
    stable(fleet)
    fleet.passes(1.0)
    assert (fleet.round.version, fleet.round.attempt, fleet.round.ahead) == (SECOND, 2, False)


def test_nobody_is_late_while_the_trainer_converts_and_the_trainer_is_at_last(drive: Any) -> None:
    fleet = writing(drive, staged=200.0, transfer=20.0, patience=3.0)
    fleet.passes(150.0)
    assert fleet.round.phase is Phase.WRITING
    assert fleet.round.remaining() == ["e0", "e1"]
    fleet.passes(50.0)
    ended = [record for record in fleet.written() if isinstance(record, RoundEnded)][-1]
    assert (ended.fault, ended.left_out) == ("trainer", ())
    assert "was not published within 200 s" in ended.reason


def test_from_its_publish_on_the_phase_has_its_own_time(drive: Any) -> None:
    fleet = writing(drive, staged=200.0, transfer=20.0)
    fleet.passes(150.0)
    staged(fleet)
    stable(fleet)
    fleet.passes(19.0)
    assert fleet.round.phase is Phase.WRITING
    fleet.passes(1.5)
    assert fleet.fleet.round is None


@pytest.mark.parametrize(
    "why", ["live", "nothing is committed", "an engine has failed", "a rank is silent", "it had failed", "busy"]
)
def test_no_round_runs_ahead_where_somebody_would_stand_still_or_be_left_out(drive: Any, why: str) -> None:
    if why == "nothing is committed":
        fleet = drive(lands={"e0": "copy"})
        fleet.join()
        fleet.settle()
    else:
        fleet = serving(drive, lands="live" if why == "live" else "copy")
    if why == "an engine has failed":
        fleet.fleet.engines["e1"].failures, fleet.fleet.engines["e1"].retry_at = 1, 1000.0
    if why == "busy":
        fleet.passes(30.0)  # it is probed, and has not answered
        assert conditions.unready(fleet.fleet, "e0")
    if why == "it had failed":
        fleet.fleet.memory.failed[SECOND] = "no engine"
    fleet.says(TRAINER, Converting(version=None if why == "a rank is silent" else SECOND))
    assert fleet.fleet.round is None


def test_while_slots_are_filled_no_engine_catches_up_from_them(drive: Any) -> None:
    fleet = serving(drive)
    assert conditions.staged(fleet.fleet) == Version(7, 1)
    fleet.fleet.stopping = True
    fleet.says(TRAINER, Converting(version=SECOND))
    assert (conditions.staged(fleet.fleet), conditions.converted(fleet.fleet)) == (None, SECOND)


def test_a_hello_says_again_what_is_being_converted(drive: Any) -> None:
    fleet = writing(drive)
    name = fleet.round.name
    fleet.loses(TRAINER)
    fleet.connect(TRAINER, TrainerStatus(converting=SECOND, open_rounds=(name,)))
    assert (fleet.round.name, fleet.round.ahead) == (name, True)
    fleet.loses(TRAINER)
    fleet.connect(TRAINER, TrainerStatus(open_rounds=(name,)))
    assert fleet.fleet.round is None, "it was given up while nobody heard it"


def test_a_trainer_that_begins_anew_ends_the_round(drive: Any) -> None:
    fleet = writing(drive)
    fleet.says(TRAINER, fleet.closed())
    for member in fleet.ranks_of():
        fleet.says(member, fleet.verified())
    fleet.loses(TRAINER)
    fleet.connect(TRAINER, incarnation=999, generation=8)
    ended = [record for record in fleet.written() if isinstance(record, RoundEnded)][-1]
    assert "its trainer ended before it was published" in ended.reason


def test_a_decision_before_the_publish_ends_the_daemon(drive: Any) -> None:
    fleet = writing(drive)
    record = Decided(round=fleet.round.name, version=SECOND, digests={})
    with pytest.raises(InvariantViolation, match=r"S4: round 1\.\d+ decides a version that is not published"):
        invariants.check(fleet.fleet, invariants.snapshot(fleet.fleet), [Append(record)])
