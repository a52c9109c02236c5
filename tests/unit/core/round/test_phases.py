"""Every phase is one row: how long it may take, whom it waits for, what comes then."""

import copy
import itertools
from typing import Any

import pytest
from fleets import policy_for, trainer
from weightsync.orchestrator.core.commands import Append, CallEngine
from weightsync.orchestrator.core.errors import Trouble
from weightsync.orchestrator.core.events import Call
from weightsync.orchestrator.core.records import Decided, LiveDirty
from weightsync.orchestrator.core.round import endings, phases
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.messages import Exposed, Grant, Quiesced

IN_ORDER = list(Phase)

DISTINCT = {"pause": 1.0, "quiesce": 2.0, "transfer": 4.0, "verify": 8.0, "finish": 16.0}
"""Every sum of these names its terms."""


def test_every_phase_has_a_row() -> None:
    assert set(phases.ROWS) == set(Phase)


def test_forward_they_follow_each_other_to_the_commit() -> None:
    for phase, following in itertools.pairwise(IN_ORDER):
        assert phases.ROWS[phase].then is following
    assert phases.ROWS[Phase.RECORDING].then is endings.committed


@pytest.mark.parametrize(
    ("phase", "seconds"),
    [
        (Phase.PAUSING, 1.0),
        (Phase.QUIESCING, 2.0),
        (Phase.MARKING, 16.0),
        (Phase.EXPOSING, 16.0),
        (Phase.WRITING, 4.0),
        (Phase.VERIFYING, 8.0),
        (Phase.DECIDING, 16.0),
        (Phase.SWITCHING, 48.0),
        (Phase.RECORDING, 16.0),
    ],
)
def test_each_deadline_is_the_settings_own(phase: Phase, seconds: float) -> None:
    assert phases.ROWS[phase].deadline(policy_for(["e0"], **DISTINCT)) == seconds


@pytest.mark.parametrize(
    ("phase", "stays_in", "goes_on_to"),
    [
        (Phase.PAUSING, Phase.QUIESCING, Phase.MARKING),
        (Phase.QUIESCING, Phase.QUIESCING, Phase.MARKING),
        (Phase.MARKING, Phase.EXPOSING, Phase.WRITING),
        (Phase.EXPOSING, Phase.EXPOSING, Phase.WRITING),
    ],
)
@pytest.mark.parametrize("returns", [True, False])
def test_no_engine_is_given_to_writers_of_whom_one_has_no_connection(
    drive: Any, phase: Phase, stays_in: Phase, goes_on_to: Phase, returns: bool
) -> None:
    """Dead and granted it would tear them all; that it is dead is known within a heartbeat."""
    fleet, writer = drive(("e0", "e1")), trainer()
    going = fleet.to(phase)
    fleet.loses(writer)
    fleet.to(stays_in)
    word = Quiesced(round=going.name) if stays_in is Phase.QUIESCING else Exposed(round=going.name)
    for member in fleet.ranks_of():
        fleet.says(member, word)
    assert going.phase is stays_in
    if returns:
        fleet.connect(writer)
        assert fleet.round.phase is goes_on_to
    else:
        fleet.passes(fleet.policy.heartbeat)
        assert fleet.fleet.round is None
        assert [state.torn_by for state in fleet.fleet.engines.values()] == [None, None]
    assert len(fleet.sent(writer, Grant)) == (returns and goes_on_to is Phase.WRITING)


@pytest.mark.parametrize("phase", IN_ORDER)
def test_asking_who_is_missing_changes_nothing(drive: Any, phase: Phase) -> None:
    fleet = drive(("e0", "e1"))
    going = fleet.to(phase)
    before = copy.deepcopy(fleet.fleet)
    first = phases.missing(fleet.fleet, going)
    assert first, "a phase that waits for nobody would have been left"
    assert phases.missing(fleet.fleet, going) == first
    assert fleet.fleet == before


@pytest.mark.parametrize(
    ("phase", "missing"),
    [
        (Phase.PAUSING, ["e0", "e1"]),
        (Phase.QUIESCING, ["e0/0", "e0/1", "e1/0", "e1/1"]),
        (Phase.MARKING, [f"{LiveDirty.__name__} in the journal"]),
        (Phase.EXPOSING, ["e0/0", "e0/1", "e1/0", "e1/1"]),
        (Phase.WRITING, ["trainer/0"]),
        (Phase.VERIFYING, ["e0/0", "e0/1", "e1/0", "e1/1"]),
        (Phase.DECIDING, [f"{Decided.__name__} in the journal"]),
        (Phase.SWITCHING, ["e0", "e1"]),
        (Phase.RECORDING, ["Committed in the journal"]),
    ],
)
def test_who_is_missing_is_named(drive: Any, phase: Phase, missing: list[str]) -> None:
    fleet = drive(("e0", "e1"))
    assert phases.missing(fleet.fleet, fleet.to(phase)) == missing


@pytest.mark.parametrize(
    ("phase", "late"),
    [
        (Phase.PAUSING, {"e0", "e1"}),
        (Phase.QUIESCING, {"e0", "e1"}),
        (Phase.MARKING, set()),
        (Phase.WRITING, {"e0", "e1"}),
        (Phase.VERIFYING, {"e0", "e1"}),
        (Phase.DECIDING, set()),
        (Phase.SWITCHING, {"e0", "e1"}),
        (Phase.RECORDING, set()),
    ],
)
def test_which_engines_are_behind(drive: Any, phase: Phase, late: set[str]) -> None:
    """Of the disk's slowness, none."""
    fleet = drive(("e0", "e1"))
    assert phases.behind(fleet.fleet, fleet.to(phase)) == late


def test_patience_is_one_sum_over_all_phases(drive: Any) -> None:
    """Of the engines that wait, and only while some are done and others are not."""
    fleet = drive(("e0", "e1"), options={"patience": 10.0, "pause": 100.0, "quiesce": 100.0})
    going = fleet.to(Phase.PAUSING)
    fleet.passes(50.0)
    assert going.remaining() == ["e0", "e1"], "nobody is done: nobody waits"
    fleet.answers("e0", Call.PAUSE, True)
    fleet.passes(0.0)
    fleet.passes(6.0)
    fleet.answers("e1", Call.PAUSE, True)
    assert (going.phase, going.waited) == (Phase.QUIESCING, 6.0)
    for member in fleet.ranks_of("e0"):
        fleet.says(member, Quiesced(round=going.name))
    fleet.passes(0.0)
    fleet.passes(3.9)
    assert going.remaining() == ["e0", "e1"]
    fleet.passes(0.1)
    assert (going.phase, going.remaining()) == (Phase.MARKING, ["e0"])


@pytest.mark.parametrize(
    ("phase", "trouble"),
    [
        (Phase.PAUSING, Trouble("pausing took longer than 7 s; missing: e0", "engine")),
        (Phase.WRITING, Trouble("writing took longer than 7 s; missing: trainer/0", "trainer")),
        (Phase.DECIDING, Trouble("deciding took longer than 7 s; missing: Decided in the journal", "daemon")),
    ],
)
def test_a_missed_deadline_says_who_and_whose_fault(drive: Any, phase: Phase, trouble: Trouble) -> None:
    fleet = drive()
    going = fleet.to(phase)
    assert phases.overdue(Turn(fleet.fleet, going.phase_began + 7.0, 1), going) == trouble


def test_a_late_disk_costs_no_engine(drive: Any) -> None:
    fleet = drive()
    going = fleet.to(Phase.DECIDING)
    fleet.passes(fleet.policy.finish + 1.0)
    assert (fleet.fleet.round, going.phase, going.remaining()) == (going, Phase.DECIDING, ["e0"])


def test_a_round_without_trouble_commands_each_step_once(drive: Any) -> None:
    fleet = drive()
    fleet.to(Phase.RECORDING)
    fleet.durable()
    calls = [c.call for c in fleet.commands if isinstance(c, CallEngine) and c.round is not None]
    assert calls == [Call.PAUSE, Call.UPDATE, Call.FINISH, Call.RESUME]
    records = [type(c.record).__name__ for c in fleet.commands if isinstance(c, Append)]
    assert records == ["EpochBegan", "TrainerBegan", "RoundBegan", "LiveDirty", "Decided", "Committed", "RoundEnded"]
