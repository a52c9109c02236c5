"""Numbers come from the settings alone, and an agent gives up before the daemon does."""

from dataclasses import MISSING, fields

import pytest
from fleets import policy_for
from weightsync.orchestrator.core.policy import AGENT_SHARE, Policy


def test_no_number_has_a_second_home() -> None:
    assert [field.name for field in fields(Policy) if field.default is not MISSING] == []


def test_the_update_call_outlasts_every_phase_within_it() -> None:
    policy = policy_for(["e0"], quiesce=1.0, transfer=20.0, verify=300.0, finish=4000.0)
    assert policy.update == 4321.0


def test_an_agents_deadline_is_the_shorter() -> None:
    assert policy_for(["e0"]).agent_deadline(200.0) == pytest.approx(180.0)
    assert 0.5 < AGENT_SHARE < 1.0


def test_a_pair_has_one_name() -> None:
    engines = policy_for(["e0", "e1", "e2"], [("e0", "e2")]).engines
    assert [(engine.name, engine.pair) for engine in engines] == [("e0", "pair-0"), ("e1", ""), ("e2", "pair-0")]


@pytest.mark.parametrize(
    ("wanted", "engines", "quorum"),
    [(0.5, 1, 1), (0.5, 2, 1), (0.5, 3, 2), (0.99, 4, 4), (1.0, 4, 1), (3.0, 4, 3), (100.0, 4, 4), (0.01, 4, 1)],
)
def test_how_many_engines_a_commit_needs(wanted: float, engines: int, quorum: int) -> None:
    assert policy_for(["e0"], min_engines=wanted).quorum(engines) == quorum
