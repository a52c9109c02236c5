"""The state of an engine in one word, and since when."""

from typing import Any, cast

import pytest
from fleets import policy_for
from weightsync.orchestrator.core.machine import start
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.state import ConnectedAgent, Fleet, Progress, Round
from weightsync.orchestrator.daemon.view import View, engine_state
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.messages import Announce, EngineStatus, Hello
from weightsync.orchestrator.protocol.names import Member, RoundName, Version
from weightsync.orchestrator.settings.sections import EngineSection
from weightsync.orchestrator.settings.settings import Settings

MEMBER, VERSION = Member("inference", "e0", 0), Version(7, 1)
HELLO = Hello(schema=1, run_id="run", member=MEMBER, world=1, incarnation=1)


def fleet_with(status: EngineStatus | None, **engine: Any) -> Fleet:
    """One engine; ``status`` is its only rank's, None without one."""
    fleet, _ = start(policy_for(["e0"]), "j", [], 0.0)
    if status is not None:
        fleet.enter(ConnectedAgent(MEMBER, 1, HELLO, Announce(layout=Layout((), (), b"")), status=status))
    fleet.memory.committed = VERSION
    for name, value in {"reachable": True, **engine}.items():
        setattr(fleet.engines["e0"], name, value)
    return fleet


SERVING = EngineStatus(applied=VERSION)


@pytest.mark.parametrize(
    ("status", "engine", "word"),
    [
        (SERVING, {"paused": False}, "serving"),
        (SERVING, {"paused": True}, "paused"),
        (SERVING, {"ours_paused": True}, "paused"),
        (SERVING, {"reachable": False}, "unreachable"),
        (EngineStatus(), {"paused": True}, "held"),
        (EngineStatus(applied=VERSION, torn=True), {"paused": True}, "torn"),
        (EngineStatus(applied=VERSION, torn=True), {"reachable": False}, "torn"),
        (None, {}, "joining"),
        (None, {"reachable": False}, "unreachable"),
    ],
)
def test_one_word_for_an_engine(status: EngineStatus | None, engine: dict[str, Any], word: str) -> None:
    assert engine_state(fleet_with(status, **engine), "e0") == word


def test_in_a_round_it_is_updating_until_it_is_left_out() -> None:
    fleet = fleet_with(SERVING, paused=True)
    fleet.round = Round(RoundName(1, 1), VERSION, 1, False, {"e0": Progress()}, {MEMBER: 1}, {}, Phase.WRITING)
    assert engine_state(fleet, "e0") == "updating"
    fleet.round.engines["e0"].evicted = "its /resume failed"
    assert engine_state(fleet, "e0") == "paused"


def test_an_error_is_shown_with_whose_fault_it_is() -> None:
    fleet = fleet_with(SERVING, error="connection refused", fault="network")
    view = View(cast("Settings", None), 0.0)._engine(fleet, EngineSection(name="e0", url="http://a"))
    assert (view.error, view.fault) == ("connection refused", "network")
