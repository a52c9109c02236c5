"""Whether requests should go to an engine."""

from typing import Any

import pytest
from fleets import ANNOUNCE, policy_for, rank
from weightsync.orchestrator.core.machine import start
from weightsync.orchestrator.core.round.progress import Progress, Round
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.state import ConnectedAgent, Fleet
from weightsync.orchestrator.daemon.admin.readiness import readiness
from weightsync.orchestrator.protocol.limits import SCHEMA_VERSION
from weightsync.orchestrator.protocol.messages import EngineStatus, Hello
from weightsync.orchestrator.protocol.names import RoundName, Version

OLD, NEW, NAME = Version(7, 1), Version(7, 2), RoundName(1, 1)
HELLO = Hello(schema=SCHEMA_VERSION, run_id="unit", member=rank("e0"), world=1, incarnation=1)
SERVING = EngineStatus(applied=OLD)


def fleet_with(status: EngineStatus, paused: bool | None = False, **engine: Any) -> Fleet:
    fleet, _ = start(policy_for(["e0"]), "j", [], 0.0)
    fleet.enter(ConnectedAgent(rank("e0"), 1, HELLO, ANNOUNCE, status=status))
    fleet.memory.committed = OLD
    for name, value in {"reachable": True, "paused": paused, **engine}.items():
        setattr(fleet.engines["e0"], name, value)
    return fleet


@pytest.mark.parametrize(
    ("fleet", "ready", "word"),
    [
        (fleet_with(SERVING), True, "serving"),
        (fleet_with(SERVING, paused=True), False, "paused"),
        (fleet_with(SERVING, paused=None), False, "paused"),
        (fleet_with(EngineStatus(), paused=True), False, "held"),
        (fleet_with(EngineStatus(applied=NEW)), False, "serving"),
        (fleet_with(EngineStatus(applied=OLD, torn=True), paused=True), False, "torn"),
        (fleet_with(SERVING, reachable=False, error="refused"), False, "unreachable"),
        (fleet_with(SERVING, reachable=False), False, "joining"),
    ],
)
def test_outside_of_a_round(fleet: Fleet, ready: bool, word: str) -> None:
    answer = readiness(fleet, "e0")
    assert answer is not None
    assert answer[0] is ready
    assert answer[1].startswith(word)


def test_an_engine_that_the_operator_holds_is_not() -> None:
    fleet = fleet_with(SERVING, paused=True)
    fleet.memory.holds["e0"] = "ann"
    assert readiness(fleet, "e0") == (False, "held by the operator")


def test_who_does_not_exist() -> None:
    assert readiness(fleet_with(SERVING), "e1") is None


@pytest.mark.parametrize(
    ("status", "catch_up", "decided", "ready"),
    [
        (SERVING, False, False, True),
        (EngineStatus(applied=OLD, window=NAME), False, False, True),
        (EngineStatus(applied=NEW), False, True, True),
        (EngineStatus(applied=NEW), False, False, False),
        (EngineStatus(), False, False, False),
        (EngineStatus(applied=OLD, torn=True), False, False, False),
        (EngineStatus(), True, False, False),
        (SERVING, True, False, False),
    ],
)
def test_in_a_round_requests_wait_if_it_has_served_before(
    status: EngineStatus, catch_up: bool, decided: bool, ready: bool
) -> None:
    fleet = fleet_with(status, paused=True)
    fleet.round = Round(NAME, NEW, 1, catch_up, {"e0": Progress()}, {rank("e0"): 1}, {}, phase=Phase.WRITING)
    fleet.round.live = ("e0",) if decided else ()
    answer = readiness(fleet, "e0")
    assert answer is not None
    assert answer[0] is ready
    fleet.round.engines["e0"].left_out = "too late"
    assert readiness(fleet, "e0") != (True, "updating"), "left out, it is paused"
