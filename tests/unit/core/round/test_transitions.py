"""The table has an answer to everything that can happen, and no peer can end the daemon."""

from typing import Any

import pytest
from weightsync.orchestrator.core.commands import CallEngine
from weightsync.orchestrator.core.errors import ImpossibleTransition
from weightsync.orchestrator.core.events import Appended, Call
from weightsync.orchestrator.core.round.reports import _ACTIONS, happened
from weightsync.orchestrator.core.round.transitions import TABLE, Action, Happening, Phase
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.messages import Abort, Closed, EngineStatus, Grant, Left, PeerTransfer, Quiesced
from weightsync.orchestrator.protocol.names import Member

TRAINER, ENGINE = Member("trainer", "", 0), Member("inference", "e0", 0)

ANYTIME = frozenset(Happening) - {Happening.PAUSED, Happening.DURABLE, Happening.FINISHED, Happening.RESUMED}
"""What others may say or do at any time, or time itself. The rest answers our own commands."""

ANSWERS = {
    Happening.PAUSED: {Phase.PAUSING, Phase.CANCELLING, Phase.TEARING},
    Happening.DURABLE: {Phase.MARKING, Phase.DECIDING, Phase.RECORDING, Phase.CANCELLING, Phase.TEARING},
    Happening.FINISHED: {Phase.FINISHING},
    Happening.RESUMED: {Phase.RESUMING, Phase.CANCELLING},
}

FORWARD_ONLY = (Phase.DECIDING, Phase.APPLYING, Phase.FINISHING, Phase.RESUMING, Phase.RECORDING)
GRANTED = (Phase.WRITING, Phase.VERIFYING)
IN_ORDER = [phase for phase in Phase if phase not in (Phase.CANCELLING, Phase.TEARING)]


def test_every_phase_and_every_action_is_there() -> None:
    assert set(TABLE) == set(Phase)
    assert set(_ACTIONS) == set(Action)


@pytest.mark.parametrize("phase", Phase)
def test_whatever_others_do_has_an_entry(phase: Phase) -> None:
    assert set(TABLE[phase]) >= ANYTIME


@pytest.mark.parametrize("happening", ANSWERS)
def test_answers_have_an_entry_where_they_are_awaited(happening: Happening) -> None:
    for phase in ANSWERS[happening]:
        assert happening in TABLE[phase]


def test_nothing_is_cancelled_after_a_grant_and_nothing_torn_before_or_after() -> None:
    for phase, row in TABLE.items():
        found = set(row.values())
        assert (Action.cancel in found) == (phase in (Phase.PAUSING, Phase.QUIESCING, Phase.MARKING))
        assert (Action.tear in found) == (phase in GRANTED)
        assert (Action.evict in found) <= (phase in FORWARD_ONLY)


def test_a_pair_without_an_entry_tells_its_story(drive: Any) -> None:
    fleet = drive()
    going = fleet.to(Phase.PAUSING)
    with pytest.raises(ImpossibleTransition, match=r"round 1\.1 .* resumed in phase pausing \(why\).*e0"):
        happened(Turn(fleet.fleet, 0.0, 1), going, Happening.RESUMED, "why", None)


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


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        ({"error": "no route to host", "fault": "network"}, "trainer/0 could not write: no route to host"),
        ({"peers": (PeerTransfer(Member("inference", "e9", 3), 1, 1, 0.1, (0, 0)),)}, "which it was not granted"),
        ({"peers": (PeerTransfer(ENGINE, 10**12, 1, 0.001, (0, 0)),)}, "above the link's"),
    ],
    ids=["failed", "to a stranger", "faster than the link"],
)
def test_a_bad_close_tears(drive: Any, report: dict[str, Any], reason: str) -> None:
    fleet = drive(options={"max_bytes_per_second": 1e11})
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
    assert [abort.torn for abort in fleet.sent(ENGINE, Abort)] == [True]
    fleet.says(ENGINE, Left(round=going.name, status=EngineStatus(torn=True)))
    fleet.fails("e0", Call.SWITCH, "aborted")
    assert fleet.fleet.round is None
    assert fleet.called("e0", Call.RESUME) == 0
    assert "e0 torn and paused" in fleet.fleet.sentence


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
    assert going.going() == ["e1"]
    fleet.says(Member("inference", "e1", 0), Left(round=going.name, status=EngineStatus(applied=going.version)))
    fleet.answers("e1", Call.SWITCH)
    fleet.answers("e1", Call.FINISH)
    fleet.answers("e1", Call.RESUME, False)
    fleet.durable()
    assert fleet.fleet.memory.committed == going.version
    assert fleet.called("e0", Call.RESUME) == 0


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
    fleet.loses(ENGINE)
    fleet.connect(ENGINE, older)
    fleet.settle()
    asked = [c for c in fleet.passes(20.0) if isinstance(c, CallEngine) and c.engine == "e0"]
    assert [command.call for command in asked] == [Call.PAUSE]


def test_closed_without_a_grant_of_this_round_changes_nothing(drive: Any) -> None:
    fleet = drive()
    going = fleet.to(Phase.WRITING)
    other = type(going.name)(going.name.epoch, going.name.number + 9)
    fleet.says(TRAINER, Closed(round=other))
    assert going.phase is Phase.WRITING
    assert going.closed == {}


def test_nobody_waits_for_writes_to_an_engine_that_is_gone(drive: Any) -> None:
    """NIXL may never end them. Its next process is out of their reach, and must not wait to be started."""
    fleet = drive()
    going = fleet.to(Phase.WRITING)
    fleet.loses(ENGINE)
    assert going.phase is Phase.TEARING
    fleet.fails("e0", Call.SWITCH, "the connection broke")
    assert fleet.fleet.round is None
    assert set(fleet.fleet.unclosed) == {TRAINER}, "no round begins before"
    fleet.connect(ENGINE, EngineStatus(), incarnation=555)
    assert fleet.fleet.unclosed == {}
