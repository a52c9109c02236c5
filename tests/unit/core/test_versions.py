"""Which versions begin a round, what the others wait for, and how they fail."""

from typing import Any

import pytest
from weightsync.orchestrator.core.events import AgentSaid, Call, MarkersSeen, StableSeen
from weightsync.orchestrator.core.records import VersionFailed
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.messages import Announce, EngineStatus, Outcome, Staged, TrainerStatus
from weightsync.orchestrator.protocol.names import Member, Version

TRAINER, ENGINE = Member("trainer", "", 0), Member("inference", "e0", 0)
VERSION = Version(7, 1)
STAGED = Staged(version=VERSION, bytes=1, convert_seconds=0.0, digest_seconds=0.0)


def joined(drive: Any, **options: Any) -> Any:
    fleet = drive(options=options)
    fleet.join()
    fleet.settle()
    return fleet


def failures(fleet: Any) -> list[str]:
    return [record.reason for record in fleet.written() if isinstance(record, VersionFailed)]


@pytest.mark.parametrize("generation", [None, 7])
def test_a_marked_and_staged_version_begins_a_round(drive: Any, generation: int | None) -> None:
    """STABLE from ``touch`` is enough."""
    fleet = joined(drive)
    fleet.says(TRAINER, STAGED)
    assert fleet.fleet.round is None
    fleet.happens(MarkersSeen(fleet.id(), (StableSeen(1, generation),)))
    assert fleet.round.version == VERSION


def test_a_missing_marker_fails_the_version_and_is_named(drive: Any) -> None:
    fleet = joined(drive, staged=50.0)
    fleet.says(TRAINER, STAGED)
    fleet.passes(49.0)
    assert failures(fleet) == []
    fleet.passes(1.0)
    assert failures(fleet) == ["after 50 s: broadcasts/step_1/STABLE is missing"]
    assert fleet.sent(TRAINER, Outcome)[-1].reason == failures(fleet)[0]
    assert fleet.marked() == [("FAILED", VERSION)]


def test_a_marker_without_a_staged_version_does_nothing(drive: Any) -> None:
    fleet = joined(drive, staged=50.0)
    fleet.happens(MarkersSeen(fleet.id(), (StableSeen(1, 7), StableSeen(2, None))))
    fleet.passes(1000.0)
    assert fleet.fleet.round is None
    assert failures(fleet) == []


def test_a_stale_marker_is_ignored_with_one_line(drive: Any) -> None:
    fleet = joined(drive)
    for _ in range(3):
        fleet.happens(MarkersSeen(fleet.id(), (StableSeen(1, 6), StableSeen(9, 6))))
    fleet.says(TRAINER, STAGED)
    assert fleet.fleet.round is None
    assert fleet.told().count("STABLE of step 1 is of an earlier trainer (6); ignored") == 1
    assert fleet.told().count("STABLE of step 9 is of an earlier trainer (6); ignored") == 1


def test_a_rank_that_stages_too_late_learns_that_the_version_has_failed(drive: Any) -> None:
    fleet = joined(drive, staged=50.0)
    fleet.says(TRAINER, STAGED)
    fleet.passes(50.0)
    before = len(fleet.sent(TRAINER, Outcome))
    fleet.says(TRAINER, STAGED)
    assert len(fleet.sent(TRAINER, Outcome)) == before + 1


def test_attempts_are_bounded_and_spread(drive: Any) -> None:
    fleet = joined(drive, attempts=3, backoff=1.0)
    fleet.says(TRAINER, STAGED)
    fleet.happens(MarkersSeen(fleet.id(), (StableSeen(1, 7),)))
    pauses = []
    for attempt in (1, 2, 3):
        assert fleet.round.attempt == attempt
        fleet.fails("e0", Call.PAUSE, "connection reset")
        assert fleet.fleet.round is None
        pauses.append(fleet.fleet.retry_at[VERSION] - fleet.now)
        fleet.passes(pauses[-1])
        fleet.settle()
    assert pauses == [1.0, 2.0, 4.0]
    assert failures(fleet) == ["3 attempts failed; the last one: e0: pause failed: connection reset"]
    fleet.passes(1000.0)
    assert fleet.fleet.round is None


def test_an_engine_that_comes_later_gets_a_round_of_its_own(drive: Any) -> None:
    """From the trainer's slots; the others serve on, and the commit sequence stays."""
    fleet = drive()
    fleet.to(Phase.RECORDING)
    fleet.durable()
    fleet.loses(ENGINE)
    fleet.connect(ENGINE, EngineStatus(), incarnation=555)
    fleet.says(ENGINE, Announce(layout=Layout((), (), b"")))
    fleet.happens(MarkersSeen(fleet.id(), ()))
    fleet.plan()
    fleet.settle()
    assert fleet.round.catch_up
    fleet.to(Phase.RECORDING)
    fleet.durable()
    assert fleet.fleet.memory.sequence == 1
    assert [kind for kind, _ in fleet.marked()] == ["TRANSFER_READY", "COMMITTED", "TRANSFER_READY"]


def test_words_of_an_earlier_connection_are_not_heard(drive: Any) -> None:
    fleet = joined(drive)
    old = fleet.connections[TRAINER]
    fleet.loses(TRAINER)
    fleet.connect(TRAINER, TrainerStatus())
    fleet.happens(AgentSaid(fleet.id(), TRAINER, old, STAGED))
    assert fleet.fleet.agents[TRAINER].staged is None


def test_the_next_trainer_ends_the_versions_of_the_one_before(drive: Any) -> None:
    fleet = joined(drive)
    fleet.says(TRAINER, STAGED)
    fleet.loses(TRAINER)
    fleet.connect(TRAINER, generation=8, incarnation=5)
    assert failures(fleet) == ["its trainer ended before the version was committed"]


def test_but_not_the_version_of_the_round_under_way(drive: Any) -> None:
    """All its bytes are there and verified: the round goes on and commits it."""
    fleet = drive()
    going = fleet.to(Phase.VERIFYING)
    fleet.loses(TRAINER)
    fleet.connect(TRAINER, generation=8, incarnation=5)
    assert failures(fleet) == []
    fleet.to(Phase.RECORDING)
    fleet.durable()
    assert fleet.fleet.memory.committed == going.version


def test_an_engine_that_is_gone_is_probed_before_its_agents_are_started(drive: Any) -> None:
    """Another server may stand there, with other routes and another number of ranks."""
    fleet = joined(drive)
    fleet.loses(ENGINE)
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


def test_a_version_that_waits_for_its_next_attempt_holds_up_no_other(drive: Any) -> None:
    """As a catch-up round would that fails again and again."""
    fleet = joined(drive, backoff=50.0)
    fleet.says(TRAINER, STAGED)
    fleet.happens(MarkersSeen(fleet.id(), (StableSeen(1, 7),)))
    fleet.fails("e0", Call.PAUSE, "connection reset")
    fleet.stage(2)
    fleet.settle()
    assert fleet.round.version == Version(7, 2)
