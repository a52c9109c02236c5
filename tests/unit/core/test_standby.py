"""What lies beside what is served: when it is believed, and when it is owed."""

from typing import Any

import msgspec
import pytest
from fleets import rank
from weightsync.orchestrator.core import conditions, standby
from weightsync.orchestrator.core.events import Call, HoldAsked
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.state import Unclosed
from weightsync.orchestrator.protocol.messages import Announce, EngineStatus
from weightsync.orchestrator.protocol.names import RoundName, Version

FIRST, SECOND = Version(7, 1), Version(7, 2)
PAIR = ("e0", "e1")


def serving(drive: Any, mode: str = "flip", **more: Any) -> Any:
    """A fleet that has committed FIRST on engines that land in ``mode``, and serves it."""
    engines = more.pop("engines", ("e0",))
    fleet = drive(engines=engines, lands=dict.fromkeys(engines, mode), **more)
    fleet.to(Phase.RECORDING)
    fleet.durable()
    fleet.settle()
    return fleet


def decided(drive: Any, mode: str = "flip", **more: Any) -> Any:
    """A daemon that starts where another one has decided SECOND and done nothing about it."""
    fleet = serving(drive, mode, **more)
    fleet.stage(2)
    fleet.to(Phase.SWITCHING)
    again = drive(**{**more, "engines": fleet.engines, "lands": fleet.lands, "records": fleet.written()})
    assert again.fleet.memory.committed == SECOND
    return again


def returns(fleet: Any, engine: str = "e0", paused: bool = False, **status: Any) -> None:
    """The engine's agents come back, and say that they serve FIRST and have SECOND in their standby."""
    fleet.passes(0.25)
    fleet.answers(engine, Call.PROBE, paused)
    said = {"applied": FIRST, "standby": SECOND, "standby_digest": (11, 13), **status}
    fleet.bring(engine, EngineStatus(**said))
    fleet.settle()


def test_a_standby_is_believed_by_the_digest_that_was_decided(drive: Any) -> None:
    fleet = decided(drive)
    returns(fleet)
    agent = fleet.fleet.agents[rank("e0")]
    assert standby.believed(fleet.fleet, agent) == SECOND
    agent.status = msgspec.structs.replace(agent.status, standby_digest=(11, 14))
    assert standby.believed(fleet.fleet, agent) is None, "of another staging, or never decided"
    agent.status = EngineStatus(applied=FIRST)
    assert standby.believed(fleet.fleet, agent) is None


@pytest.mark.parametrize("mode", ["copy", "flip"])
def test_an_engine_switches_to_what_was_decided_without_a_trainer(drive: Any, mode: str) -> None:
    fleet = decided(drive, mode)
    returns(fleet)
    assert fleet.called("e0", Call.SWITCH) == 1
    assert fleet.called("e0", Call.PAUSE) == 0, "it serves until it switches"
    call = next(c for c in fleet.commands if getattr(c, "call", None) is Call.SWITCH)
    assert (call.version, call.ranks) == (SECOND, ((0, 100), (1, 101)))
    assert call.round == RoundName(fleet.fleet.epoch, fleet.fleet.memory.round_number)


@pytest.mark.parametrize("announces", [True, False])
def test_who_has_yet_to_say_how_it_lands_is_not_paused_meanwhile(drive: Any, announces: bool) -> None:
    """A worker's Hello comes before its layout; between the two nobody knows that a switch is all that it needs."""
    fleet = decided(drive)
    fleet.passes(0.25)
    fleet.answers("e0", Call.PROBE, False)
    for member in fleet.ranks_of("e0"):
        fleet.connect(member, EngineStatus(applied=FIRST, standby=SECOND, standby_digest=(11, 13)))
    fleet.answers("e0", Call.ATTACH)
    fleet.settle()
    assert fleet.called("e0", Call.PAUSE) == 0
    if announces:
        for member in fleet.ranks_of("e0"):
            fleet.says(member, fleet.announcement("e0"))
        fleet.settle()
        assert (fleet.called("e0", Call.PAUSE), fleet.called("e0", Call.SWITCH)) == (0, 1)
    else:
        fleet.passes(fleet.fleet.policy.attach)
        fleet.settle()
        assert fleet.called("e0", Call.PAUSE) == 1, "it serves what is served no more"


def test_a_pair_switches_once_both_are_paused(drive: Any) -> None:
    fleet = decided(drive, engines=("e0", "e1"), pairs=(("e0", "e1"),))
    fleet.passes(0.25)
    for name in ("e0", "e1"):
        fleet.answers(name, Call.PROBE, False)
        fleet.bring(name, EngineStatus(applied=FIRST, standby=SECOND, standby_digest=(11, 13)))
    fleet.settle()
    assert [fleet.called(name, Call.SWITCH) for name in ("e0", "e1")] == [0, 0]
    fleet.answers("e0", Call.PAUSE, True)
    fleet.answers("e1", Call.PAUSE, True)
    assert [fleet.called(name, Call.SWITCH) for name in ("e0", "e1")] == [1, 1]


@pytest.mark.parametrize(
    "status",
    [
        {"standby": None},
        {"standby_digest": (11, 14)},
        {"standby": FIRST},
        {"torn": True},
        {"applied": SECOND, "standby": FIRST},
    ],
    ids=["nothing there", "other bytes", "another version", "torn", "switched already"],
)
def test_what_is_not_owed(drive: Any, status: dict[str, Any]) -> None:
    fleet = decided(drive)
    returns(fleet, **status)
    assert fleet.called("e0", Call.SWITCH) == 0
    assert not standby.owed(fleet.fleet, "e0")


def test_ranks_that_have_switched_wait_for_the_others(drive: Any) -> None:
    """Each holds a whole version, and together they hold none."""
    fleet = decided(drive)
    fleet.passes(0.25)
    fleet.answers("e0", Call.PROBE, False)
    stands = EngineStatus(applied=FIRST, standby=SECOND, standby_digest=(11, 13))
    for member, status in zip(fleet.ranks_of("e0"), (EngineStatus(applied=SECOND), stands), strict=True):
        fleet.connect(member, status)
        fleet.says(member, fleet.announcement("e0"))
    fleet.settle()
    assert fleet.called("e0", Call.PAUSE) == 1, "its ranks hold different versions"
    fleet.answers("e0", Call.PAUSE, True)
    assert fleet.called("e0", Call.SWITCH) == 1


@pytest.mark.parametrize(("mode", "owed"), [("copy", False), ("flip", True)])
def test_where_a_writer_still_reaches_what_has_landed(drive: Any, mode: str, owed: bool) -> None:
    fleet = decided(drive, mode)
    reach = {rank("e0", number): 100 + number for number in range(2)}
    fleet.fleet.unclosed[rank("e0"), RoundName(1, 9)] = Unclosed(5, "host", "boot", reach)
    returns(fleet)
    assert standby.owed(fleet.fleet, "e0") is owed


def test_who_is_held_is_not_switched(drive: Any) -> None:
    fleet = decided(drive)
    fleet.happens(HoldAsked(fleet.id(), "ann", "", "e0", True))
    returns(fleet)
    assert not standby.owed(fleet.fleet, "e0")
    assert fleet.called("e0", Call.PAUSE) == 1


def test_a_switch_without_effect_is_not_asked_for_again_at_once(drive: Any) -> None:
    fleet = decided(drive)
    returns(fleet)
    fleet.answers("e0", Call.SWITCH, False)
    fleet.passes(fleet.policy.patience - 1)
    assert fleet.called("e0", Call.SWITCH) == 1
    fleet.settle()
    fleet.passes(6.0)
    assert fleet.called("e0", Call.SWITCH) == 2


def test_after_a_switch_without_effect_it_may_be_written_by_a_round(drive: Any) -> None:
    """Else one whose switch does nothing would never come back."""
    fleet = decided(drive)
    returns(fleet)
    assert conditions.targets(fleet.fleet, SECOND, fleet.now) == [], "the switch needs no trainer"
    fleet.answers("e0", Call.SWITCH, False)
    assert conditions.targets(fleet.fleet, SECOND, fleet.now + fleet.policy.patience) == ["e0"]


def test_an_engine_whose_ranks_land_differently_is_a_misfit(drive: Any) -> None:
    fleet = drive(lands={"e0": "copy"})
    fleet.passes(0.25)
    fleet.answers("e0", Call.PROBE, True)
    fleet.bring("e0")
    member = rank("e0", 1)
    layout = msgspec.structs.replace(fleet.announcement("e0").layout, lands="live")
    fleet.says(member, Announce(layout=layout))
    misfit = fleet.fleet.engines["e0"].misfit
    assert misfit.startswith("its ranks land in different modes (rank 0 in copy, rank 1 in live). Fix: ")
    fleet.says(member, fleet.announcement("e0"))
    assert not fleet.fleet.engines["e0"].misfit


def test_an_engine_serves_on_while_it_holds_what_is_committed(drive: Any) -> None:
    fleet = serving(drive)
    assert standby.serves_on(fleet.fleet, "e0")
    fleet.fleet.agents[rank("e0")].status = EngineStatus(applied=FIRST, torn=True)
    assert not standby.serves_on(fleet.fleet, "e0")
    assert not standby.serves_on(serving(drive, "live").fleet, "e0")


def test_a_pair_serves_on_as_one(drive: Any) -> None:
    fleet = drive(engines=("e0", "e1"), pairs=(("e0", "e1"),), lands={"e0": "copy"})
    fleet.to(Phase.RECORDING)
    fleet.durable()
    assert not standby.serves_on(fleet.fleet, "e0"), "the other one is paused while it is written"


def test_a_pair_of_which_one_switches_and_the_other_has_to_be_written(drive: Any) -> None:
    """First the one that needs nobody, then the other by a round."""
    fleet = serving(drive, engines=PAIR, pairs=(PAIR,))
    fleet.stage(2)
    fleet.to(Phase.RECORDING)
    fleet.durable()
    for member in fleet.ranks_of("e0"):
        fleet.fleet.agents[member].status = EngineStatus(applied=FIRST, standby=SECOND, standby_digest=(11, 13))
    for member in fleet.ranks_of("e1"):
        fleet.fleet.agents[member].status = EngineStatus(applied=FIRST)
    assert conditions.targets(fleet.fleet, SECOND, fleet.now) == []
    assert conditions.waits_for(fleet.fleet, SECOND, fleet.now).startswith(
        "engines that can take part: e0 (it switches"
    )
    for member in fleet.ranks_of("e0"):
        fleet.fleet.agents[member].status = EngineStatus(applied=SECOND)
    assert conditions.targets(fleet.fleet, SECOND, fleet.now) == ["e1"]


def test_a_digest_comes_back_from_the_journal_as_it_was() -> None:
    digest = (1, 2**64 - 1)
    assert standby.from_hex(standby.hex_digest(digest)) == digest
