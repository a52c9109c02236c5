"""Rounds of engines that serve while their bytes arrive: what is commanded, what is waited for, who is left out."""

from typing import Any

import pytest
from fleets import rank, trainer
from weightsync.orchestrator.core.commands import CallEngine
from weightsync.orchestrator.core.errors import InvariantViolation
from weightsync.orchestrator.core.events import Call, CallDone, HoldAsked
from weightsync.orchestrator.core.invariants import commanded
from weightsync.orchestrator.core.records import Committed, RoundEnded
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Closed,
    Commit,
    EngineStatus,
    Exposed,
    Hold,
    Holding,
    Left,
    Quiesced,
)
from weightsync.orchestrator.protocol.names import Version

FIRST, SECOND = Version(7, 1), Version(7, 2)
PAIR = ("e0", "e1")


def serving(drive: Any, mode: str = "copy", **more: Any) -> Any:
    """A fleet that serves FIRST."""
    engines = more.pop("engines", ("e0",))
    lands = more.pop("lands", dict.fromkeys(engines, mode))
    fleet = drive(**{"engines": engines, "lands": lands, **more})
    fleet.to(Phase.RECORDING)
    fleet.durable()
    fleet.settle()
    fleet.commands.clear()
    return fleet


def publishes(fleet: Any) -> Any:
    """It is in the round for SECOND."""
    fleet.stage(2)
    fleet.settle()
    return fleet.round


def switching(drive: Any, mode: str = "copy", **more: Any) -> Any:
    fleet = serving(drive, mode, **more)
    publishes(fleet)
    fleet.to(Phase.SWITCHING)
    return fleet


def leaves(fleet: Any, engine: str, **status: Any) -> None:
    for member in fleet.ranks_of(engine):
        said = {"applied": SECOND, **status}
        fleet.says(member, Left(round=fleet.round.name, status=EngineStatus(**said)))


def calls(fleet: Any, engine: str) -> list[Call]:
    return [c.call for c in fleet.commands if isinstance(c, CallEngine) and c.engine == engine and c.call != Call.PROBE]


@pytest.mark.parametrize("mode", ["copy", "flip"])
def test_nothing_but_one_call_between_two_steps(drive: Any, mode: str) -> None:
    fleet = serving(drive, mode)
    going = publishes(fleet)
    assert going.phase is Phase.MARKING, "nobody has to stand still for it"
    fleet.to(Phase.DECIDING)
    assert calls(fleet, "e0") == []
    fleet.durable()
    assert calls(fleet, "e0") == [Call.SWITCH]
    (call,) = [c for c in fleet.commands if isinstance(c, CallEngine) and c.call is Call.SWITCH]
    assert (call.round, call.version, call.ranks) == (going.name, SECOND, ((0, 100), (1, 101)))
    fleet.answers("e0", Call.SWITCH, False, switch_seconds=0.002)
    assert going.phase is Phase.SWITCHING, "its workers look at what they hold now"
    leaves(fleet, "e0")
    fleet.durable()
    assert calls(fleet, "e0") == [Call.SWITCH]
    assert not fleet.sent(rank("e0"), Commit)
    assert fleet.fleet.memory.committed == SECOND
    ended = [record for record in fleet.written() if isinstance(record, RoundEnded)][-1]
    assert (ended.kind, ended.modes, ended.stall_seconds) == ("publish", {"e0": mode}, {"e0": 0.002})
    assert (ended.times["switch"], ended.times["stall"]) == (0.002, 0.002)
    assert ended.times["http"] == 0.01, "of the one call; nobody is inside of another one meanwhile"


def test_an_engine_that_serves_nothing_yet_is_paused_and_resumed(drive: Any) -> None:
    fleet = drive(lands={"e0": "copy"})
    fleet.to(Phase.RECORDING)
    assert calls(fleet, "e0") == [Call.ATTACH, Call.PAUSE, Call.SWITCH, Call.RESUME]


@pytest.mark.parametrize("order", ["words first", "answer first"])
def test_the_answer_and_the_words_of_all_workers_are_waited_for(drive: Any, order: str) -> None:
    fleet = switching(drive)
    steps = [lambda: leaves(fleet, "e0"), lambda: fleet.answers("e0", Call.SWITCH, False)]
    first, second = steps if order == "words first" else reversed(steps)
    first()
    assert fleet.round.phase is Phase.SWITCHING
    second()
    assert fleet.round.phase is Phase.RECORDING


def test_each_lands_in_its_own_way(drive: Any) -> None:
    fleet = serving(drive, engines=PAIR, lands={"e1": "flip"})
    publishes(fleet)
    fleet.to(Phase.SWITCHING)
    assert calls(fleet, "e0") == [Call.PAUSE, Call.UPDATE]
    assert calls(fleet, "e1") == [Call.SWITCH]
    assert [len(fleet.sent(rank(name), Commit)) for name in PAIR] == [1, 0]
    began = fleet.round.began
    fleet.now += 0.5
    fleet.to(Phase.RECORDING)
    fleet.durable()
    assert fleet.fleet.memory.committed == SECOND
    ended = [record for record in fleet.written() if isinstance(record, RoundEnded)][-1]
    assert ended.stall_seconds == {"e0": fleet.now - began, "e1": 0.002}, "one has waited for its bytes, one switched"
    assert ended.times["stall"] == fleet.now - began


def test_a_slow_pause_of_others_is_not_waited_for_by_who_serves(drive: Any) -> None:
    """Patience is for engines that stand still."""
    fleet = serving(drive, engines=PAIR, lands={"e1": "flip"}, options={"pause": 90.0, "patience": 10.0})
    going = publishes(fleet)
    fleet.passes(20.0)
    assert (going.phase, going.remaining()) == (Phase.PAUSING, ["e0", "e1"])


def test_how_far_apart_the_engines_serve_is_told(drive: Any) -> None:
    fleet = switching(drive, engines=PAIR)
    fleet.now += 1.0
    for name, later in zip(PAIR, (0.0, 0.25), strict=True):
        fleet.now += later
        fleet.answers(name, Call.SWITCH, False, switch_seconds=0.001)
        for member in fleet.ranks_of(name):
            status, took = EngineStatus(applied=SECOND), 0.125 * (1 + member.rank)
            fleet.says(member, Left(round=fleet.round.name, status=status, switch_seconds=0.001, audit_seconds=took))
    fleet.durable()
    ended = [record for record in fleet.written() if isinstance(record, RoundEnded)][-1]
    assert (ended.times["skew"], ended.times["audit"]) == (0.25, 0.25)


# -------------------------------------------------------------------------------------------------- who changes at once
@pytest.mark.parametrize(
    "more",
    [{"pairs": (PAIR,)}, {"options": {"together": True}}],
    ids=["a pair", "commit.together"],
)
def test_those_that_change_at_once_stand_first_and_serve_last(drive: Any, more: dict[str, Any]) -> None:
    fleet = switching(drive, engines=PAIR, **more)
    assert [calls(fleet, name) for name in PAIR] == [[Call.PAUSE]] * 2
    fleet.answers("e0", Call.PAUSE, True)
    assert [calls(fleet, name) for name in PAIR] == [[Call.PAUSE]] * 2
    fleet.answers("e1", Call.PAUSE, True)
    assert [calls(fleet, name) for name in PAIR] == [[Call.PAUSE, Call.SWITCH]] * 2
    fleet.answers("e0", Call.SWITCH, True)
    leaves(fleet, "e0")
    assert Call.RESUME not in calls(fleet, "e0"), "the other one serves the version before, if it serves"
    fleet.answers("e1", Call.SWITCH, True)
    leaves(fleet, "e1")
    assert [calls(fleet, name)[-1] for name in PAIR] == [Call.RESUME] * 2


def test_ranks_that_meet_across_cores_are_paused_for_the_switch(drive: Any) -> None:
    fleet = switching(drive, boundary=False)
    assert calls(fleet, "e0") == [Call.PAUSE]
    fleet.answers("e0", Call.PAUSE, True)
    assert calls(fleet, "e0") == [Call.PAUSE, Call.SWITCH]


# -------------------------------------------------------------------------------------------------- before the decision
def test_given_up_after_a_grant_nobody_is_torn(drive: Any) -> None:
    fleet = serving(drive, engines=PAIR, lands={"e1": "copy"})
    going = publishes(fleet)
    fleet.to(Phase.WRITING)
    fleet.says(trainer(), Closed(round=going.name, error="out of memory", fault="trainer"))
    assert [fleet.sent(rank(name), Abort)[-1].torn for name in PAIR] == [True, False]
    assert "e0 stay paused until repaired" in fleet.told()


def test_a_version_that_tore_nobody_fails_at_once(drive: Any) -> None:
    fleet = serving(drive)
    going = publishes(fleet)
    fleet.to(Phase.WRITING)
    fleet.says(trainer(), Closed(round=going.name, error="no such tensor", fault="trainer", retry=False))
    assert fleet.failures() == ["trainer/0 could not write: no such tensor; another attempt would fail in the same way"]
    assert fleet.fleet.round is None
    assert calls(fleet, "e0") == [], "it serves on"


def test_one_that_is_left_out_serves_on_until_another_version_is_decided(drive: Any) -> None:
    fleet = serving(drive, engines=PAIR)
    going = publishes(fleet)
    fleet.to(Phase.VERIFYING)
    fleet.says(rank("e1"), fleet.verified(digest=(1, 1)))
    assert going.engines["e1"].left_out.startswith("e1/0: digest of what has landed")
    assert Call.PAUSE not in calls(fleet, "e1")
    for member in fleet.ranks_of("e0"):
        fleet.says(member, fleet.verified())
    fleet.durable()
    assert calls(fleet, "e1") == [Call.PAUSE], f"{SECOND} is decided"


def test_what_was_exposed_is_no_standby_and_what_is_verified_is_one(drive: Any) -> None:
    fleet = serving(drive, "flip")
    agent = fleet.fleet.agents[rank("e0")]
    agent.status = EngineStatus(applied=FIRST, standby=Version(7, 0), standby_digest=(3, 4))
    going = publishes(fleet)
    fleet.to(Phase.EXPOSING)
    fleet.says(rank("e0"), Exposed(round=going.name))
    assert agent.status == EngineStatus(applied=FIRST)
    fleet.to(Phase.VERIFYING)
    fleet.says(rank("e0"), fleet.verified())
    assert (agent.status.standby, agent.status.standby_digest) == (SECOND, (11, 13))


def test_an_engine_that_is_held_while_it_serves_on_is_paused_and_not_resumed(drive: Any) -> None:
    fleet = serving(drive)
    publishes(fleet)
    fleet.to(Phase.WRITING)
    fleet.happens(HoldAsked(fleet.id(), "ann", "", "e0", True))
    assert calls(fleet, "e0") == [Call.PAUSE]
    assert fleet.sent(rank("e0"), Hold)[-1].held
    fleet.answers("e0", Call.PAUSE, True)
    fleet.to(Phase.SWITCHING)
    fleet.answers("e0", Call.SWITCH, True)
    leaves(fleet, "e0")
    assert fleet.round.phase is Phase.RECORDING
    assert Call.RESUME not in calls(fleet, "e0")


def test_an_engine_that_stands_still_while_it_may_serve_is_resumed(drive: Any) -> None:
    fleet = serving(drive)
    publishes(fleet)
    fleet.to(Phase.WRITING)
    fleet.passes(6.0)
    fleet.answers("e0", Call.PROBE, True)
    assert calls(fleet, "e0") == [Call.RESUME]
    fleet.answers("e0", Call.RESUME, False)
    assert not fleet.round.engines["e0"].resumed, "of the round nobody has asked it"


# --------------------------------------------------------------------------------------------------- after the decision
def test_a_switch_that_fails_leaves_the_engine_out_and_paused(drive: Any) -> None:
    fleet = switching(drive, engines=PAIR)
    fleet.fails("e1", Call.SWITCH)
    assert "e1: switch failed: 500" in fleet.round.engines["e1"].left_out
    assert calls(fleet, "e1") == [Call.SWITCH, Call.PAUSE]
    fleet.answers("e0", Call.SWITCH, False)
    leaves(fleet, "e0")
    fleet.durable()
    assert fleet.fleet.memory.committed == SECOND
    fleet.answers("e1", Call.PAUSE, True)
    fleet.loses(trainer())
    fleet.passes(6.0)
    assert calls(fleet, "e1")[-1] == Call.SWITCH, "it has the version in its standby, and nobody has to write it"


def test_a_lost_answer_is_none_to_workers_that_hold_the_version(drive: Any) -> None:
    fleet = switching(drive)
    leaves(fleet, "e0")
    fleet.fails("e0", Call.SWITCH, "timed out")
    assert not fleet.round.engines["e0"].left_out
    assert calls(fleet, "e0") == [Call.SWITCH, Call.RESUME], "whether it runs is not known, and resuming does no harm"


@pytest.mark.parametrize(
    "status",
    [{"torn": True}, {"applied": FIRST}, {"applied": None}],
    ids=["what it holds is not what was verified", "another version", "none"],
)
def test_a_worker_that_does_not_hold_the_version_costs_its_engine_the_place(drive: Any, status: dict[str, Any]) -> None:
    fleet = switching(drive, engines=PAIR)
    fleet.answers("e1", Call.SWITCH, False)
    fleet.says(rank("e1"), Left(round=fleet.round.name, status=EngineStatus(**{"applied": SECOND, **status})))
    assert "left the round holding" in fleet.round.engines["e1"].left_out
    assert fleet.round.remaining() == ["e0"]


@pytest.mark.parametrize("paused", [True, False])
@pytest.mark.parametrize("how", ["says so", "says it when it is back", "is inside of a round"])
def test_a_worker_that_holds_the_version_no_more_costs_its_engine_the_place(drive: Any, how: str, paused: bool) -> None:
    """After it has left with it, and before the others are there; an engine that was paused is not resumed then."""
    fleet = switching(drive, engines=PAIR)
    fleet.answers("e1", Call.SWITCH, paused, switch_seconds=0.001)
    first, second = fleet.ranks_of("e1")
    whole = EngineStatus(applied=SECOND)
    fleet.says(first, Left(round=fleet.round.name, status=whole))
    match how:
        case "says so":
            fleet.says(first, Holding(status=EngineStatus(applied=SECOND, torn=True)))
        case "says it when it is back":
            fleet.loses(first)
            fleet.connect(first, EngineStatus(applied=SECOND, torn=True))
        case _:
            fleet.says(first, Quiesced(round=fleet.round.name))
    fleet.says(second, Left(round=fleet.round.name, status=whole))
    assert "left the round holding" in fleet.round.engines["e1"].left_out
    assert Call.RESUME not in calls(fleet, "e1")
    fleet.answers("e0", Call.SWITCH, False)
    leaves(fleet, "e0")
    fleet.durable()
    assert fleet.fleet.memory.committed == SECOND


def test_torn_by_its_switch_it_is_written_anew(drive: Any) -> None:
    """What is in its standby tore it, and may again."""
    fleet = switching(drive, engines=PAIR)
    fleet.fails("e1", Call.SWITCH)
    leaves(fleet, "e1", applied=FIRST, torn=True)
    fleet.answers("e0", Call.SWITCH, False)
    leaves(fleet, "e0")
    fleet.durable()
    fleet.answers("e1", Call.PAUSE, True)
    fleet.passes(40.0)
    assert fleet.round.catch_up
    assert list(fleet.round.engines) == ["e1"]
    assert calls(fleet, "e1").count(Call.SWITCH) == 1


def test_another_process_in_the_place_of_a_worker_is_waited_for_no_more(drive: Any) -> None:
    fleet = switching(drive, engines=PAIR)
    fleet.loses(rank("e1"))
    fleet.connect(rank("e1"), EngineStatus(), incarnation=777)
    assert fleet.round.engines["e1"].left_out == "e1/0 was started anew"


def test_a_catch_up_that_hangs_keeps_a_new_version_from_nobody(drive: Any) -> None:
    fleet = switching(drive, engines=PAIR, options={"patience": 10.0})
    fleet.fails("e1", Call.SWITCH)
    leaves(fleet, "e1", applied=FIRST, torn=True)
    fleet.answers("e0", Call.SWITCH, False)
    leaves(fleet, "e0")
    fleet.durable()
    fleet.answers("e1", Call.PAUSE, True)
    fleet.passes(12.0)
    going = fleet.round
    assert going.catch_up
    while going.phase is not Phase.SWITCHING:
        fleet._forward(going)
    fleet.stage(3)
    fleet.passes(11.0)
    assert going.engines["e1"].left_out.startswith("e1: ")
    assert [record.version for record in fleet.written() if isinstance(record, Committed)][-1] == SECOND


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": FIRST}, "which has not decided it"),
        ({"ranks": ((0, 100),)}, "known are"),
        ({"ranks": ((0, 100), (1, 7))}, "known are"),
    ],
    ids=["another version", "not all", "another process"],
)
def test_an_unsafe_switch_is_performed_by_nobody(drive: Any, change: dict[str, Any], says: str) -> None:
    fleet = switching(drive)
    call = {"round": fleet.round.name, "version": SECOND, "ranks": ((0, 100), (1, 101)), **change}
    with pytest.raises(InvariantViolation, match=says):
        commanded(fleet.fleet, CallEngine("e0", Call.SWITCH, 1, 1.0, **call))


def test_no_switch_before_the_decision_is_durable(drive: Any) -> None:
    fleet = serving(drive)
    publishes(fleet)
    going = fleet.to(Phase.DECIDING)
    call = CallEngine("e0", Call.SWITCH, 1, 1.0, going.name, SECOND, ((0, 100), (1, 101)))
    with pytest.raises(InvariantViolation, match="which has not decided it"):
        commanded(fleet.fleet, call)
    outside = CallEngine("e0", Call.SWITCH, 1, 1.0, None, SECOND, ((0, 100), (1, 101)))
    with pytest.raises(InvariantViolation, match="is committed"):
        commanded(fleet.fleet, outside)


def test_an_answer_to_a_call_that_the_round_did_not_make_says_nothing_to_it(drive: Any) -> None:
    fleet = serving(drive)
    publishes(fleet)
    fleet.to(Phase.WRITING)
    fleet.fleet.engines["e0"].calls[Call.PAUSE] = 99
    fleet.happens(CallDone(fleet.id(), "e0", Call.PAUSE, 99, 0.1, True))
    assert not fleet.round.engines["e0"].paused
