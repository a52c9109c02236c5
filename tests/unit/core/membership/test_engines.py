"""Engines outside of a round: what they should be follows from the fleet, what they are is seen; calls bridge it."""

from typing import Any

import pytest
from fleets import rank, trainer
from weightsync.orchestrator.core.commands import CallEngine
from weightsync.orchestrator.core.events import AbortAsked, Call, CallFailed, HoldAsked
from weightsync.orchestrator.core.membership.engines import Wish, wish
from weightsync.orchestrator.core.records import Committed
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.protocol.messages import EngineStatus, Hold, Holding
from weightsync.orchestrator.protocol.names import RoundName, Version

TRAINER, ENGINE = trainer(), rank("e0")
VERSION = Version(7, 1)


def test_an_engine_that_is_gone_is_probed_before_its_agents_are_started(drive: Any) -> None:
    """Another server may stand there, with other routes and another number of ranks."""
    fleet = drive.joined()
    fleet.loses_engine("e0")
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
    fleet.loses_engine("e0")
    fleet.settle()
    before = len(fleet.commands)
    fleet.bring("e0", older)
    asked = [c for c in fleet.commands[before:] if isinstance(c, CallEngine) and c.engine == "e0"]
    assert [command.call for command in asked] == [Call.PAUSE]


@pytest.mark.parametrize(("call", "deadline"), [(Call.PROBE, 7.0), (Call.ATTACH, 11.0)])
def test_a_call_has_the_deadline_of_the_settings(drive: Any, call: Call, deadline: float) -> None:
    fleet = drive(options={"probe": 7.0, "attach": 11.0})
    fleet.passes(0.0)
    fleet.answers("e0", Call.PROBE, True)
    asked = [c.deadline for c in fleet.commands if isinstance(c, CallEngine) and c.call is call]
    assert asked == [deadline]


def test_an_idle_engine_is_looked_at_once_an_interval(drive: Any) -> None:
    fleet = drive.joined(probe_interval=3.0)
    before = fleet.called("e0", Call.PROBE)
    for _ in range(6):
        fleet.passes(1.0)
        fleet.settle()
    assert fleet.called("e0", Call.PROBE) - before == 2


def restarted(drive: Any, pairs: tuple[tuple[str, ...], ...] = (), **more: Any) -> Any:
    """A daemon that starts while e0 and e1, which somebody has paused, hold what was committed."""
    committed = Committed(round=RoundName(1, 1), version=VERSION, sequence=1)
    fleet = drive(("e0", "e1"), pairs, records=[committed], **more)
    fleet.passes(0.0)
    for name in ("e0", "e1"):
        fleet.answers(name, Call.PROBE, True)
    return fleet


def test_whoever_may_serve_and_is_paused_is_resumed(drive: Any) -> None:
    """Whoever has paused it and for whatever reason: what it should be is all that counts."""
    fleet = restarted(drive)
    fleet.bring("e0", EngineStatus(applied=VERSION))
    fleet.settle()
    assert [fleet.called(name, Call.RESUME) for name in ("e0", "e1")] == [1, 0]
    assert "e0 is resumed: it holds step 1 (generation 7)" in fleet.told()
    (call,) = [c for c in fleet.commands if isinstance(c, CallEngine) and c.call is Call.RESUME]
    assert call.ranks == ((0, 100), (1, 101)), "these processes, and no others that stand there by then"


def test_a_pause_that_came_late_is_found(drive: Any) -> None:
    fleet = drive()
    fleet.to(Phase.RECORDING)
    fleet.durable()
    fleet.settle()
    before = fleet.called("e0", Call.RESUME)
    fleet.passes(fleet.policy.probe_interval)
    fleet.answers("e0", Call.PROBE, True)
    assert fleet.called("e0", Call.RESUME) == before + 1


@pytest.mark.parametrize("call", [Call.PAUSE, Call.RESUME])
def test_after_a_call_that_failed_an_engine_is_looked_at_before_the_next(drive: Any, call: Call) -> None:
    """And not at once: another pause of it would fail in the same way."""
    fleet = restarted(drive)
    version = VERSION if call is Call.RESUME else Version(7, 9)
    fleet.bring("e0", EngineStatus(applied=version))
    fleet.settle()
    if call is Call.PAUSE:
        fleet.passes(fleet.policy.probe_interval)
        fleet.answers("e0", Call.PROBE, False)
    for _ in range(3):
        fleet.fails("e0", call)
        assert fleet.fleet.engines["e0"].calls == {}
        fleet.passes(fleet.policy.probe_interval)
        assert set(fleet.fleet.engines["e0"].calls) == {Call.PROBE}
        fleet.answers("e0", Call.PROBE, call is Call.RESUME)
    assert fleet.called("e0", call) == 4


def test_an_engine_whose_routes_die_is_out_of_the_rounds_until_they_answer(drive: Any) -> None:
    """Its agents are connected all the time."""
    fleet = drive(("e0", "e1"))
    fleet.to(Phase.RECORDING)
    fleet.durable()
    fleet.settle()
    for _ in range(3):
        fleet.passes(fleet.policy.probe_interval)
        if Call.PROBE in fleet.fleet.engines["e1"].calls:
            fleet.fails("e1", Call.PROBE, "no route to host")
        fleet.settle()
        fleet.fleet.engines["e1"].reachable = False
    fleet.stage(2)
    fleet.settle()
    assert list(fleet.round.engines) == ["e0"]


# ------------------------------------------------------------------------------------------------------------- wishes
def test_what_the_operator_holds_is_paused_and_stays_so(drive: Any) -> None:
    fleet = restarted(drive)
    fleet.bring("e0", EngineStatus(applied=VERSION))
    fleet.settle()
    fleet.answers("e0", Call.RESUME, False)
    fleet.happens(HoldAsked(fleet.id(), "ann", "new driver", "e0", True))
    assert fleet.called("e0", Call.PAUSE) == 1
    hold = Hold(held=True, reason="the operator holds it: ann: new driver")
    assert [fleet.sent(member, Hold) for member in fleet.ranks_of("e0")] == [[hold], [hold]]
    fleet.answers("e0", Call.PAUSE, True)
    records = [Committed(round=RoundName(1, 1), version=VERSION, sequence=1), *fleet.written()]
    again = drive(("e0", "e1"), records=records)
    again.passes(0.0)
    again.answers("e0", Call.PROBE, True)
    again.bring("e0", EngineStatus(applied=VERSION, held=True))
    again.passes(100.0)
    again.settle()
    again.settle()
    assert again.called("e0", Call.RESUME) == 0, "also by the next daemon"
    again.happens(HoldAsked(again.id(), "ann", "", "e0", False))
    assert again.called("e0", Call.RESUME) == 0, "its workers refuse until they hear of it"
    for member in again.ranks_of("e0"):
        assert again.sent(member, Hold) == [Hold(held=False)]
        again.says(member, Holding(status=EngineStatus(applied=VERSION)))
    assert again.called("e0", Call.RESUME) == 1


def test_an_engine_whose_server_does_not_answer_is_held_by_its_workers(drive: Any) -> None:
    fleet = restarted(drive)
    fleet.bring("e0", EngineStatus(applied=Version(7, 9)))
    why = "it holds step 9 (generation 7), not step 1 (generation 7)"
    assert [fleet.sent(member, Hold) for member in fleet.ranks_of("e0")][1] == [Hold(held=True, reason=why)]


@pytest.mark.parametrize(
    ("first", "second", "want"),
    [
        (EngineStatus(applied=VERSION), EngineStatus(applied=VERSION), Wish.SERVE),
        (EngineStatus(applied=VERSION), EngineStatus(applied=Version(7, 9)), Wish.PAUSE),
        (EngineStatus(applied=VERSION), EngineStatus(applied=VERSION, torn=True), Wish.PAUSE),
        (EngineStatus(applied=VERSION), EngineStatus(), Wish.AS_IT_IS),
        (EngineStatus(applied=VERSION), None, Wish.AS_IT_IS),
    ],
)
def test_the_engines_of_a_pair_want_the_same(drive: Any, first: Any, second: Any, want: Wish) -> None:
    """A blip of one pauses none; what the other cannot work with does."""
    fleet = restarted(drive, (("e0", "e1"),))
    fleet.bring("e0", first)
    if second is not None:
        fleet.bring("e1", second)
    assert wish(fleet.fleet, "e0")[0] is want


@pytest.mark.parametrize(
    ("phase", "want"), [(Phase.WRITING, Wish.SERVE), (Phase.DECIDING, Wish.PAUSE), (Phase.SWITCHING, Wish.PAUSE)]
)
def test_who_takes_no_part_serves_until_another_version_is_decided(drive: Any, phase: Phase, want: Wish) -> None:
    fleet = drive(("e0", "e1"))
    fleet.to(Phase.RECORDING)
    fleet.durable()
    fleet.settle()
    fleet.fleet.engines["e1"].failures = 1
    fleet.stage(2)
    fleet.settle()
    fleet.engines = ("e0",)
    fleet.to(phase)
    assert wish(fleet.fleet, "e1")[0] is want


def test_who_was_left_out_waits_for_the_end_of_the_round(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    fleet.to(Phase.RECORDING)
    fleet.durable()
    fleet.settle()
    going = (fleet.stage(2), fleet.settle(), fleet.to(Phase.QUIESCING))[2]
    fleet.fails("e1", Call.UPDATE)
    assert wish(fleet.fleet, "e1")[0] is Wish.AS_IT_IS
    fleet.happens(AbortAsked(fleet.id(), "ann", ""))
    assert fleet.fleet.round is not going
    assert wish(fleet.fleet, "e1")[0] is Wish.SERVE


def test_one_of_a_pair_is_released_with_the_other(drive: Any) -> None:
    fleet = restarted(drive, (("e0", "e1"),))
    fleet.bring("e0", EngineStatus(applied=VERSION))
    for _ in range(3):
        fleet.passes(20.0)
        fleet.settle()
    fleet.settle()
    assert fleet.called("e0", Call.RESUME) == 0
    fleet.bring("e1", EngineStatus(applied=VERSION))
    assert [fleet.called(name, Call.RESUME) for name in ("e0", "e1")] == [1, 1]


def test_whose_fault_a_failed_call_is_stays_visible(drive: Any) -> None:
    fleet = drive()
    fleet.passes(0.0)
    number = fleet.fleet.engines["e0"].calls[Call.PROBE]
    fleet.happens(CallFailed(fleet.id(), "e0", Call.PROBE, number, "the server has no /pause", "config", False))
    assert fleet.fleet.engines["e0"].complaint == ("the server has no /pause", "config")
    fleet.passes(20.0)
    fleet.answers("e0", Call.PROBE, True)
    fleet.answers("e0", Call.ATTACH)
    assert fleet.fleet.engines["e0"].complaint == ("", "")
