"""The table has an answer to everything that can happen."""

import pytest
from weightsync.orchestrator.core.round.reports import _ACTIONS
from weightsync.orchestrator.core.round.transitions import TABLE, Action, Phase, Report

ANYTIME = frozenset(Report) - {Report.PAUSED, Report.DURABLE, Report.FINISHED, Report.RESUMED}
"""What others may say or do at any time, or time itself. The rest answers our own commands."""

ANSWERS = {
    Report.PAUSED: set(Phase),
    Report.DURABLE: {Phase.MARKING, Phase.DECIDING, Phase.RECORDING},
    Report.FINISHED: {Phase.SWITCHING},
    Report.RESUMED: {Phase.SWITCHING},
}

BEFORE = (Phase.PAUSING, Phase.QUIESCING, Phase.MARKING, Phase.EXPOSING, Phase.WRITING, Phase.VERIFYING)


def test_every_phase_and_every_action_is_there() -> None:
    assert set(TABLE) == set(Phase)
    assert set(_ACTIONS) == set(Action)


@pytest.mark.parametrize("phase", Phase)
def test_whatever_others_do_has_an_entry(phase: Phase) -> None:
    assert set(TABLE[phase]) >= ANYTIME


@pytest.mark.parametrize("report", ANSWERS)
def test_answers_have_an_entry_where_they_are_awaited(report: Report) -> None:
    for phase in ANSWERS[report]:
        assert report in TABLE[phase]


def test_nothing_is_given_up_after_the_decision() -> None:
    for phase, row in TABLE.items():
        assert (Action.give_up in row.values()) <= (phase in BEFORE)


@pytest.mark.parametrize("phase", BEFORE)
def test_before_it_a_lost_rank_costs_its_engine_only(phase: Phase) -> None:
    assert TABLE[phase][Report.RANK_GONE] is Action.leave_out
