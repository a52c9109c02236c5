"""No report at any time ends the daemon: out of turn it costs the round, said twice it counts once."""

from typing import Any

import pytest
from fleets import rank, trainer
from weightsync.orchestrator.core.errors import ImpossibleTransition, Trouble
from weightsync.orchestrator.core.events import Appended, Call, CallFailed
from weightsync.orchestrator.core.records import RoundEnded
from weightsync.orchestrator.core.round.reports import handle
from weightsync.orchestrator.core.round.transitions import Phase, Report
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.messages import Abort, Closed, EngineStatus, Grant, Left, Quiesced

TRAINER, ENGINE = trainer(), rank("e0")
IN_ORDER = [phase for phase in Phase if phase not in (Phase.CANCELLING, Phase.TEARING)]


def test_a_pair_without_an_entry_tells_its_story(drive: Any) -> None:
    fleet = drive()
    going = fleet.to(Phase.PAUSING)
    with pytest.raises(ImpossibleTransition, match=r"round 1\.1 .* resumed in phase pausing \(why\).*e0"):
        handle(Turn(fleet.fleet, 0.0, 1), going, Report.RESUMED, Trouble("why"))


@pytest.mark.parametrize("phase", IN_ORDER)
@pytest.mark.parametrize("word", ["quiesced", "closed", "verified", "left"])
def test_no_word_at_any_time_ends_the_daemon(drive: Any, phase: Phase, word: str) -> None:
    """Said twice, because a repetition is out of turn everywhere."""
    fleet = drive()
    going = fleet.to(phase)
    words = {
        "quiesced": (ENGINE, Quiesced(round=going.name)),
        "closed": (TRAINER, fleet.closed()),
        "verified": (ENGINE, fleet.verified()),
        "left": (ENGINE, Left(round=going.name, status=EngineStatus())),
    }
    for _ in range(2):
        fleet.says(*words[word])
    fleet.passes(1.0)


@pytest.mark.parametrize(
    ("phase", "word"),
    [(Phase.PAUSING, "quiesced"), (Phase.QUIESCING, "closed"), (Phase.MARKING, "verified"), (Phase.QUIESCING, "left")],
)
def test_a_word_out_of_turn_before_the_grant_costs_the_round(drive: Any, phase: Phase, word: str) -> None:
    fleet = drive()
    going = fleet.to(phase)
    words: dict[str, Any] = {
        "quiesced": (ENGINE, Quiesced(round=going.name)),
        "closed": (TRAINER, fleet.closed()),
        "verified": (ENGINE, fleet.verified()),
        "left": (ENGINE, Left(round=going.name, status=EngineStatus())),
    }
    fleet.says(*words[word])
    assert going.phase is Phase.CANCELLING
    assert str(words[word][0]) in going.reason
    assert [abort.torn for abort in fleet.sent(ENGINE, Abort)] == [False]
    assert fleet.sent(TRAINER, Grant) == []


def test_a_digest_that_comes_before_it_is_asked_for_is_not_believed(drive: Any) -> None:
    """It may be of bytes that were written to afterwards."""
    fleet = drive()
    going = fleet.to(Phase.WRITING)
    fleet.says(ENGINE, fleet.verified())
    assert going.phase is Phase.TEARING
    assert "VERIFIED before it was asked" in going.reason


def test_the_first_report_is_the_one_that_counts(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.VERIFYING)
    fleet.says(ENGINE, fleet.verified())
    fleet.says(ENGINE, fleet.verified(digest=(0, 0)))
    assert going.phase is Phase.VERIFYING
    assert going.verified[ENGINE].digest != (0, 0)


def test_closed_without_a_grant_of_this_round_changes_nothing(drive: Any) -> None:
    fleet = drive()
    going = fleet.to(Phase.WRITING)
    other = type(going.name)(going.name.epoch, going.name.number + 9)
    fleet.says(TRAINER, Closed(round=other))
    assert going.phase is Phase.WRITING
    assert going.closed == {}


def test_the_record_of_a_round_that_is_over_completes_no_other(drive: Any) -> None:
    """Decided was on its way to the disk when the only engine was lost; the next round must not take it for its own."""
    fleet = drive()
    going = fleet.to(Phase.DECIDING)
    fleet.loses(ENGINE)
    assert fleet.fleet.round is None
    fleet.connect(ENGINE, EngineStatus(window=going.name))
    fleet.fails("e0", Call.SWITCH, "gone")
    second = fleet.fleet
    assert second.awaited == ("Decided", going.name)
    fleet.happens(Appended(fleet.id(), "Decided", going.name))
    assert second.awaited is None


def test_an_engine_that_fails_after_the_decision_is_left_out_and_the_others_go_on(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.APPLYING)
    fleet.loses(ENGINE)
    assert going.remaining() == ["e1"]
    for member in fleet.ranks_of("e1"):
        fleet.says(member, Left(round=going.name, status=EngineStatus(applied=going.version)))
    fleet.answers("e1", Call.SWITCH)
    fleet.answers("e1", Call.FINISH)
    fleet.answers("e1", Call.RESUME, False)
    fleet.durable()
    assert fleet.fleet.memory.committed == going.version
    assert fleet.called("e0", Call.RESUME) == 0


@pytest.mark.parametrize("phase", [Phase.APPLYING, Phase.FINISHING, Phase.RESUMING])
def test_an_engine_takes_its_pair_with_it(drive: Any, phase: Phase) -> None:
    fleet = drive(("e0", "e1", "e2"), (("e0", "e1"),))
    going = fleet.to(phase)
    fleet.loses(rank("e0", 1))
    assert going.remaining() == ["e2"]
    assert going.engines["e1"].left_out == "e0/1 was lost: reset"
    assert "e1 is left out of step 1 (generation 7): e0/1 was lost: reset; it stays paused" in fleet.told()


def test_when_both_of_a_pair_are_late_the_round_ends_once(drive: Any) -> None:
    fleet = drive(("e0", "e1"), (("e0", "e1"),))
    fleet.to(Phase.FINISHING)
    fleet.passes(fleet.policy.finish)
    assert fleet.fleet.round is None
    (ended,) = [record for record in fleet.written() if isinstance(record, RoundEnded)]
    assert (ended.outcome, ended.left_out, ended.fault) == ("failed", ("e0", "e1"), "engine")


def test_the_late_are_left_out_and_the_others_go_on(drive: Any) -> None:
    fleet = drive(("e0", "e1", "e2"))
    going = fleet.to(Phase.FINISHING)
    fleet.answers("e1", Call.FINISH)
    fleet.passes(fleet.policy.finish)
    assert going.phase is Phase.RESUMING
    assert going.remaining() == ["e1"]
    why = f"finishing took longer than {fleet.policy.finish:.0f} s; missing: e0, e2"
    assert [going.engines[name].left_out for name in ("e0", "e2")] == [why, why]


def test_a_call_that_fails_names_its_engine(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.FINISHING)
    fleet.fails("e1", Call.FINISH, "503")
    assert going.remaining() == ["e0"]
    assert going.engines["e1"].left_out == "e1: finish failed: 503"


def test_an_update_call_that_ends_too_early_costs_the_round(drive: Any) -> None:
    fleet = drive()
    going = fleet.to(Phase.QUIESCING)
    fleet.answers("e0", Call.SWITCH)
    assert going.trouble == Trouble("e0 ended its update call before the round did", "engine")


def test_probes_are_no_affair_of_the_round(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(Phase.WRITING)
    for call in (Call.PROBE, Call.ATTACH):
        fleet.fleet.engines["e0"].calls[call] = 99
        fleet.happens(CallFailed(fleet.id(), "e0", call, 99, "500"))
    assert going.phase is Phase.WRITING
    assert going.engines["e0"].http_seconds == pytest.approx(0.01), "of its pause alone"
