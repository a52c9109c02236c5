"""One word for an engine and for a trainer rank, and since when it holds."""

from typing import Any

import pytest
from fleets import ANNOUNCE, policy_for, rank
from weightsync.orchestrator.core import since
from weightsync.orchestrator.core.machine import start
from weightsync.orchestrator.core.round.progress import Progress, Round
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.state import ConnectedAgent, Fleet, Unclosed
from weightsync.orchestrator.protocol.limits import SCHEMA_VERSION
from weightsync.orchestrator.protocol.messages import EngineStatus, Hello
from weightsync.orchestrator.protocol.names import Member, RoundName, Version

MEMBER, VERSION, TRAINER = rank("e0"), Version(7, 1), Member("trainer", "", 0)
HELLO = Hello(schema=SCHEMA_VERSION, run_id="unit", member=MEMBER, world=1, incarnation=1)
SERVING = EngineStatus(applied=VERSION)


def fleet_with(status: EngineStatus | None, **engine: Any) -> Fleet:
    """One engine; ``status`` is its only rank's, None without one."""
    fleet, _ = start(policy_for(["e0"]), "j", [], 0.0)
    if status is not None:
        fleet.enter(ConnectedAgent(MEMBER, 1, HELLO, ANNOUNCE, status=status))
    fleet.memory.committed = VERSION
    for name, value in {"reachable": True, **engine}.items():
        setattr(fleet.engines["e0"], name, value)
    return fleet


@pytest.mark.parametrize(
    ("status", "engine", "word"),
    [
        (SERVING, {"paused": False}, "serving"),
        (SERVING, {"paused": True}, "paused"),
        (SERVING, {"paused": None}, "paused"),
        (SERVING, {"reachable": False, "error": "refused"}, "unreachable"),
        (EngineStatus(), {"paused": True}, "held"),
        (EngineStatus(applied=VERSION, torn=True), {"paused": True}, "torn"),
        (EngineStatus(applied=VERSION, torn=True), {"reachable": False, "error": "refused"}, "torn"),
        (None, {}, "joining"),
        (None, {"reachable": False}, "joining"),
        (None, {"reachable": False, "error": "refused"}, "unreachable"),
    ],
)
def test_one_word_for_an_engine(status: EngineStatus | None, engine: dict[str, Any], word: str) -> None:
    assert since.engine_word(fleet_with(status, **engine), "e0") == word


def test_in_a_round_it_is_updating_until_it_is_left_out() -> None:
    fleet = fleet_with(SERVING, paused=True)
    fleet.round = Round(RoundName(1, 1), VERSION, 1, False, {"e0": Progress()}, {MEMBER: 1}, {}, phase=Phase.WRITING)
    assert since.engine_word(fleet, "e0") == "updating"
    fleet.round.engines["e0"].left_out = "its /resume failed"
    assert since.engine_word(fleet, "e0") == "paused"


def test_a_trainer_rank_writes_as_long_as_it_has_a_grant() -> None:
    fleet = fleet_with(SERVING)
    agent = ConnectedAgent(TRAINER, 2, HELLO)
    assert since.trainer_word(fleet, agent) == "connected"
    fleet.unclosed[TRAINER, RoundName(1, 1)] = Unclosed(2, "", "", {MEMBER: 1})
    assert since.trainer_word(fleet, agent) == "writing"


def test_a_word_keeps_its_time_for_as_long_as_it_holds(drive: Any) -> None:
    """The core's ticks note it, so it does not depend on who asks and when."""
    fleet = drive.joined()
    fleet.passes(1.0)
    began = fleet.now
    assert since.since(fleet.fleet, "e0", "held", fleet.now) <= began
    fleet.passes(5.0)
    assert since.since(fleet.fleet, "e0", "held", fleet.now) <= began
    fleet.fleet.engines["e0"].reachable, fleet.fleet.engines["e0"].error = False, "refused"
    assert since.since(fleet.fleet, "e0", "unreachable", fleet.now) == fleet.now, "before the next tick, it is news"
    fleet.passes(1.0)
    changed = fleet.now
    fleet.passes(9.0)
    assert since.since(fleet.fleet, "e0", "unreachable", fleet.now) == changed
    assert since.since(fleet.fleet, "trainer/0", "connected", fleet.now) <= began
