"""What is wrong with a report, and whom it costs: the engine that it is about, or everybody."""

from typing import Any

import pytest
from fleets import BYTES_PER_EDGE, rank, trainer
from weightsync.orchestrator.core.events import Call
from weightsync.orchestrator.core.round import judge
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.protocol.edges import PeerTransfer
from weightsync.orchestrator.protocol.messages import Abort, EngineStatus, Left
from weightsync.orchestrator.protocol.names import Member

TRAINER, ENGINE = trainer(), rank("e0")


def sent(fleet: Any, *engines: str, **more: Any) -> tuple[PeerTransfer, ...]:
    """Honest transfers to all ranks of these engines; ``more`` is said of each."""
    known = {"bytes": BYTES_PER_EDGE, "descriptors": 1, "seconds": 0.1, "digest": (11, 13), **more}
    return tuple(PeerTransfer(member, **known) for member in fleet.ranks_of(*engines))


@pytest.mark.parametrize(
    ("report", "reason", "fault"),
    [
        ({"error": "no memory", "fault": "config"}, "trainer/0 could not write: no memory", "config"),
        (
            {"peers": (PeerTransfer(Member("inference", "e9", 3), 1, 1, 0.1, (0, 0)),)},
            "which it was not granted",
            "trainer",
        ),
    ],
    ids=["failed", "to a stranger"],
)
def test_what_is_wrong_with_a_writer_costs_everybody(drive: Any, report: Any, reason: str, fault: str) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.WRITING)
    fleet.says(TRAINER, fleet.closed(**report))
    assert fleet.fleet.round is None
    assert reason in going.reason
    assert (going.trouble.fault, going.granted) == (fault, True)
    assert [state.failures for state in fleet.fleet.engines.values()] == [0, 0]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"error": "remote access"}, "trainer/0 could not write to e0/0: remote access"),
        ({"bytes": 99}, f"trainer/0 wrote 99 bytes to e0/0, the plan has {BYTES_PER_EDGE}"),
        (None, "trainer/0 says CLOSED and has not written to e0/0"),
    ],
)
def test_what_is_wrong_with_an_edge_costs_its_engine(drive: Any, wrong: Any, reason: str) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.WRITING)
    bad = sent(fleet, "e0", **wrong) if wrong is not None else ()
    fleet.says(TRAINER, fleet.closed(peers=bad + sent(fleet, "e1")))
    assert (going.phase, going.remaining()) == (Phase.VERIFYING, ["e1"])
    assert going.engines["e0"].left_out == reason
    assert set(going.expected) == set(fleet.ranks_of("e1"))


def test_edges_that_are_not_over_are_waited_for(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.WRITING)
    fleet.says(TRAINER, fleet.closed(peers=sent(fleet, "e1"), final=False))
    assert (going.phase, going.remaining()) == (Phase.WRITING, ["e0", "e1"])
    fleet.says(TRAINER, fleet.closed(peers=sent(fleet, "e1", digest=(0, 0)) + sent(fleet, "e0"), final=False))
    assert going.phase is Phase.VERIFYING
    assert going.expected == dict.fromkeys(fleet.ranks_of("e0", "e1"), ((11, 13), BYTES_PER_EDGE)), (
        "the first word counts"
    )
    assert fleet.fleet.unclosed == {}, "it is done with all of them"


def test_a_writer_that_reaches_nobody_is_the_one_to_blame(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.WRITING)
    fleet.says(TRAINER, fleet.closed(peers=sent(fleet, "e0", "e1", error="link down")))
    assert fleet.fleet.round is None
    assert going.reason == "trainer/0 reaches none of 2 engines: trainer/0 could not write to e0/0: link down"
    assert [state.failures for state in fleet.fleet.engines.values()] == [0, 0]


@pytest.mark.parametrize("wrong", [{"digest": (1, 1)}, {"bytes": 99}, {"error": "out of memory"}])
def test_a_bad_verification_tears_and_the_engine_stays_paused(drive: Any, wrong: dict[str, Any]) -> None:
    fleet = drive()
    going = fleet.to(Phase.VERIFYING)
    fleet.says(ENGINE, fleet.verified(**wrong))
    assert fleet.fleet.round is None
    for member in fleet.ranks_of("e0"):
        assert [abort.torn for abort in fleet.sent(member, Abort)] == [True]
        fleet.says(member, Left(round=going.name, status=EngineStatus(torn=True)))
    fleet.passes(100.0)
    fleet.settle()
    assert fleet.called("e0", Call.RESUME) == 0
    assert "e0 torn and paused" in fleet.fleet.sentence


def test_in_other_phases_nothing_is_judged(drive: Any) -> None:
    fleet = drive()
    assert judge.nothing(fleet.fleet, fleet.to(Phase.PAUSING), ENGINE) == judge.FINE
