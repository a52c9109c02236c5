"""Who fails waits longer each time; who goes through a round starts anew."""

from typing import Any

import pytest
from weightsync.orchestrator.core.errors import Trouble
from weightsync.orchestrator.core.round import blame
from weightsync.orchestrator.core.turn import Turn


@pytest.mark.parametrize(("failures", "seconds"), [(1, 2.0), (2, 4.0), (3, 8.0), (7, 128.0), (1000, 128.0)])
def test_the_pause_doubles_and_stops_growing(failures: int, seconds: float) -> None:
    assert blame.backoff(2.0, failures) == seconds


def test_blame_is_kept_until_the_engine_has_gone_through_a_round(drive: Any) -> None:
    fleet = drive(options={"backoff": 2.0})
    turn, engine = Turn(fleet.fleet, 50.0, 0), fleet.fleet.engines["e0"]
    for _ in range(2):
        blame.put(turn, "e0", Trouble("it never answers", "engine"))
    assert (engine.failures, engine.retry_at, engine.blamed_at) == (2, 54.0, 50.0)
    assert engine.complaint == ("it never answers", "engine")
    blame.clear(turn, "e0")
    assert (engine.failures, engine.retry_at, engine.complaint) == (0, 0.0, ("", ""))


def test_a_lender_is_passed_over_for_longer_than_the_next_attempt_takes(drive: Any) -> None:
    """So that whoever else can write has his turn."""
    fleet = drive(("e0", "e1"), options={"backoff": 2.0, "patience": 30.0})
    blame.pass_over(Turn(fleet.fleet, 50.0, 0), "e1", "e0", "its edge is dead")
    assert fleet.fleet.passed_over == {("e1", "e0"): (84.0, "its edge is dead")}
