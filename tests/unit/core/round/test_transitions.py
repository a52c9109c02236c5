"""The table has an answer to everything that can happen."""

import pytest
from weightsync.orchestrator.core.round.reports import _ACTIONS
from weightsync.orchestrator.core.round.transitions import TABLE, Action, Phase, Report

ANYTIME = frozenset(Report) - {Report.PAUSED, Report.DURABLE, Report.FINISHED, Report.RESUMED}
"""What others may say or do at any time, or time itself. The rest answers our own commands."""

ANSWERS = {
    Report.PAUSED: {Phase.PAUSING, Phase.CANCELLING, Phase.TEARING},
    Report.DURABLE: {Phase.MARKING, Phase.DECIDING, Phase.RECORDING, Phase.CANCELLING, Phase.TEARING},
    Report.FINISHED: {Phase.FINISHING},
    Report.RESUMED: {Phase.RESUMING, Phase.CANCELLING},
}

FORWARD_ONLY = (Phase.DECIDING, Phase.APPLYING, Phase.FINISHING, Phase.RESUMING, Phase.RECORDING)
GRANTED = (Phase.WRITING, Phase.VERIFYING)


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


def test_nothing_is_cancelled_after_a_grant_and_nothing_torn_before_or_after() -> None:
    for phase, row in TABLE.items():
        found = set(row.values())
        assert (Action.cancel in found) == (phase in (Phase.PAUSING, Phase.QUIESCING, Phase.MARKING))
        assert (Action.tear in found) == (phase in GRANTED)
        assert (Action.evict in found) <= (phase in FORWARD_ONLY)
