"""What a version waits for, in the order in which somebody can do something about it; nothing is: a round is due."""

from typing import Any

import pytest
from fleets import ANNOUNCE, rank, trainer
from weightsync.orchestrator.core import conditions
from weightsync.orchestrator.core.errors import Trouble
from weightsync.orchestrator.core.events import Call, MarkersSeen, StableSeen
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.state import Unclosed
from weightsync.orchestrator.protocol.messages import EngineStatus, Staged
from weightsync.orchestrator.protocol.names import RoundName, Version

TRAINER, VERSION = trainer(), Version(7, 1)
STAGED = Staged(version=VERSION, bytes=1, convert_seconds=0.0, digest_seconds=0.0)


def waits(fleet: Any, version: Version = VERSION) -> str:
    return conditions.waits_for(fleet.fleet, version, fleet.now)


def due(drive: Any, engines: tuple[str, ...] = ("e0",), pairs: Any = (), options: Any = None) -> Any:
    """A fleet in which nothing is missing for version 1, stopped just before its round."""
    fleet = drive(engines, pairs, options=options or {})
    fleet.join()
    fleet.settle()
    fleet.fleet.agents[TRAINER].staged = STAGED
    fleet.fleet.stable = (StableSeen(1, 7),)
    assert waits(fleet) == ""
    return fleet


def test_it_is_due_when_nothing_is_missing(drive: Any) -> None:
    fleet = due(drive)
    assert conditions.ready(fleet.fleet, VERSION, fleet.now) == ["e0"]
    assert not conditions.is_catch_up(fleet.fleet, VERSION)
    fleet.happens()
    assert fleet.round.version == VERSION


def test_each_missing_thing_is_named(drive: Any) -> None:
    """One after the other taken away, the latest in the list first: the earliest one is what it waits for."""
    fleet = due(drive)
    state = fleet.fleet
    state.retry_at[VERSION] = fleet.now + 1.0
    assert waits(fleet) == "the next attempt"
    state.agents[rank("e0", 1)].status = EngineStatus(window=RoundName(1, 1))
    assert waits(fleet) == "workers that are still inside an earlier round: e0/1"
    state.engines["e0"].calls[Call.PROBE] = 99
    assert waits(fleet) == "an answer of e0"
    state.agents[TRAINER].dead_edges[rank("e0", 1)] = "no route"
    assert waits(fleet) == "trainer/0 cannot reach e0/1: no route"
    state.agents[rank("e0", 1)].fingerprint = ""
    assert waits(fleet) == "agents that have not confirmed their edges: e0/1"
    state.agents[TRAINER].fingerprint = "of an older plan"
    assert waits(fleet) == "agents that have not confirmed their edges: trainer/0"
    state.engines["e0"].retry_at, state.engines["e0"].failures = fleet.now + 7.0, 3
    state.engines["e0"].blame = Trouble("bad HBM")
    assert waits(fleet) == "engines that can take part: e0 (tried again in 7 s: bad HBM)"
    state.unclosed[TRAINER, RoundName(1, 3)] = Unclosed(5, "", "", {rank("e0", 1): 101})
    taint = "trainer/0 of round 1.3 may still write to it and is not proved dead"
    assert waits(fleet) == f"engines that can take part: e0 ({taint})"
    state.engines["e0"].reachable = False
    assert waits(fleet) == "engines that can take part: e0 (it has not answered yet)"
    state.memory.holds["e0"] = "ann: new driver"
    assert waits(fleet) == "engines that can take part: e0 (held: ann: new driver)"
    state.planning = True
    assert waits(fleet) == "the plan"
    state.plan = None
    assert waits(fleet) == "engines that have not joined: e0"
    state.engines["e0"].misfit = "tensor 'w' has two shapes"
    assert waits(fleet) == "an engine that fits: tensor 'w' has two shapes"
    state.memory.maintenance = "ann: new switch"
    assert waits(fleet) == "the end of maintenance (ann: new switch)"
    state.stable = ()
    assert waits(fleet) == "broadcasts/step_1/STABLE is missing"
    state.agents[TRAINER].announce = None
    assert waits(fleet) == "trainer ranks that have not announced their layout: trainer/0"
    state.agents[TRAINER].staged = None
    assert waits(fleet) == "not STAGED by trainer/0"


def test_another_round_comes_first(drive: Any) -> None:
    fleet = drive()
    going = fleet.to(Phase.SWITCHING)
    assert waits(fleet) == f"the end of round {going.name}"


def test_long_lists_are_cut(drive: Any) -> None:
    fleet = drive()
    fleet.connect(trainer(0), world=12)
    assert waits(fleet) == f"not STAGED by {', '.join(f'trainer/{number}' for number in range(8))} …"


def test_an_empty_marker_counts_for_the_present_trainer_only(drive: Any) -> None:
    fleet = drive()
    for seen, expected in [(StableSeen(1), True), (StableSeen(1, 7), True), (StableSeen(1, 6), False)]:
        fleet.fleet.stable = (StableSeen(2, 7), seen)
        assert conditions.is_stable(fleet.fleet, VERSION) is expected
    fleet.fleet.stable = (StableSeen(1), StableSeen(2))
    assert not conditions.is_stable(fleet.fleet, Version(7, 3))


def test_a_round_does_not_wait_for_ever_for_an_engine_beside_others(drive: Any) -> None:
    fleet = due(drive, ("e0", "e1"))
    fleet.fleet.agents[rank("e1", 0)].fingerprint = ""
    assert waits(fleet) == "agents that have not confirmed their edges: e1/0"
    fleet.now += fleet.policy.patience
    assert waits(fleet) == ""
    assert conditions.ready(fleet.fleet, VERSION, fleet.now) == ["e0"]


def test_but_for_every_writer(drive: Any) -> None:
    fleet = due(drive)
    fleet.fleet.agents[TRAINER].fingerprint = ""
    fleet.now += 100 * fleet.policy.patience
    assert waits(fleet) == "agents that have not confirmed their edges: trainer/0"


def test_and_for_some_engine(drive: Any) -> None:
    fleet = due(drive)
    fleet.fleet.agents[rank("e0", 0)].fingerprint = ""
    fleet.now += 100 * fleet.policy.patience
    assert waits(fleet) == "agents that have not confirmed their edges: e0/0"


def test_a_pair_takes_part_as_one(drive: Any) -> None:
    fleet = due(drive, ("e0", "e1", "e2"), (("e0", "e1"),), {"min_engines": 1})
    assert conditions.targets(fleet.fleet, VERSION, fleet.now) == ["e0", "e1", "e2"]
    fleet.fleet.agents[rank("e1", 0)].fingerprint = ""
    assert conditions.ready(fleet.fleet, VERSION, fleet.now) == ["e2"]
    fleet.fleet.engines["e1"].reachable = False
    assert conditions.targets(fleet.fleet, VERSION, fleet.now) == ["e2"]
    fleet.fleet.engines["e2"].reachable = False
    why = "it has not answered yet"
    assert waits(fleet) == f"engines that can take part: e0 (ready), e1 ({why}), e2 ({why})"


def test_one_of_a_pair_catches_up_with_the_other(drive: Any) -> None:
    """Which holds the version already, so that both do afterwards."""
    fleet = drive(("e0", "e1"), (("e0", "e1"),))
    fleet.to(Phase.RECORDING)
    fleet.durable()
    fleet.settle()
    assert waits(fleet) == "nothing: every engine holds it"
    fleet.loses_engine("e1")
    fleet.settle()
    fleet.bring("e1", EngineStatus(), incarnation=555)
    fleet.plan()
    assert conditions.is_catch_up(fleet.fleet, VERSION)
    assert conditions.targets(fleet.fleet, VERSION, fleet.now) == ["e1"]


def failed(fleet: Any, *engines: str) -> None:
    for name in engines:
        fleet.fleet.engines[name].failures = 1


def test_who_was_left_out_takes_part_with_others_only_where_a_commit_needs_it(drive: Any) -> None:
    fleet = due(drive, ("e0", "e1", "e2"))
    failed(fleet, "e0")
    assert conditions.targets(fleet.fleet, VERSION, fleet.now) == ["e1", "e2"]
    failed(fleet, "e1")
    assert conditions.targets(fleet.fleet, VERSION, fleet.now) == ["e0", "e1", "e2"]
    fleet.fleet.engines["e0"].retry_at = fleet.now + 5.0
    assert conditions.targets(fleet.fleet, VERSION, fleet.now) == ["e1", "e2"]


def test_and_where_it_has_had_no_chance_to_catch_up_alone(drive: Any) -> None:
    """A trainer that publishes without a rest has the next version in the making before an engine has the last one."""
    fleet = due(drive, ("e0", "e1"))
    failed(fleet, "e1")
    fleet.fleet.engines["e1"].retry_at = fleet.now + 3.0
    may = fleet.fleet.engines["e1"].retry_at + fleet.fleet.policy.patience
    assert conditions.targets(fleet.fleet, VERSION, may - 0.1) == ["e0"]
    assert conditions.targets(fleet.fleet, VERSION, may) == ["e0", "e1"]


def test_and_it_catches_up_alone(drive: Any) -> None:
    """So that of several that came back, the bad one costs none of the others anything."""
    fleet = due(drive, ("e0", "e1", "e2", "e3"), (("e1", "e2"),))
    fleet.fleet.memory.done[VERSION] = None
    fleet.fleet.memory.committed = VERSION
    assert conditions.targets(fleet.fleet, VERSION, fleet.now) == ["e0", "e1", "e2", "e3"]
    failed(fleet, "e0", "e2")
    assert conditions.targets(fleet.fleet, VERSION, fleet.now) == ["e3"]
    failed(fleet, "e3")
    assert conditions.targets(fleet.fleet, VERSION, fleet.now) == ["e0"]
    fleet.fleet.engines["e0"].retry_at = fleet.now + 5.0
    assert conditions.targets(fleet.fleet, VERSION, fleet.now) == ["e1", "e2"]


def test_who_is_within_reach_of_a_writer_takes_no_part_and_the_others_do(drive: Any) -> None:
    fleet = due(drive, ("e0", "e1"))
    fleet.fleet.unclosed[TRAINER, RoundName(1, 3)] = Unclosed(5, "", "", {rank("e0", 1): 101})
    assert waits(fleet) == ""
    assert conditions.ready(fleet.fleet, VERSION, fleet.now) == ["e1"]


def test_a_version_that_was_overtaken_needs_no_round(drive: Any) -> None:
    fleet = due(drive)
    fleet.fleet.memory.done |= {VERSION: None, Version(7, 2): None}
    fleet.fleet.memory.committed = Version(7, 2)
    assert waits(fleet) == "nothing: step 2 (generation 7) was committed after it"


def test_staged_is_what_every_rank_says(drive: Any) -> None:
    fleet = drive()
    for number in (0, 1):
        fleet.connect(trainer(number), world=2)
        fleet.says(trainer(number), ANNOUNCE)
    fleet.says(trainer(0), STAGED)
    fleet.happens(MarkersSeen(fleet.id(), (StableSeen(1, 7),)))
    assert conditions.staged(fleet.fleet) is None
    assert waits(fleet) == "not STAGED by trainer/1"
    assert not conditions.is_published(fleet.fleet, VERSION)
    fleet.says(trainer(1), STAGED)
    assert conditions.staged(fleet.fleet) == VERSION
    assert conditions.is_published(fleet.fleet, VERSION)


@pytest.mark.parametrize("lacking", conditions.CONDITIONS)
def test_conditions_only_look(drive: Any, lacking: Any) -> None:
    fleet = due(drive)
    before = repr(fleet.fleet)
    assert lacking(fleet.fleet, VERSION, fleet.now) == ""
    assert repr(fleet.fleet) == before
