"""The one sentence, in each of the states that people ask about."""

from itertools import pairwise
from typing import Any

import pytest
from fleets import ANNOUNCE, trainer
from weightsync.orchestrator.core.events import Call, PlanRejected
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.story import sentence
from weightsync.orchestrator.protocol.messages import EngineStatus, Left, Staged, Standing
from weightsync.orchestrator.protocol.names import Version


def told(fleet: Any) -> str:
    return sentence(fleet.fleet, fleet.now)


def test_from_the_start_to_the_commit(drive: Any) -> None:
    fleet = drive()
    assert told(fleet) == "nothing is committed yet; waiting for trainer ranks (0 of ? announced)"
    fleet.connect(trainer())
    assert told(fleet) == "nothing is committed yet; waiting for trainer ranks (0 of 1 announced)"
    fleet = drive.joined()
    assert told(fleet) == "nothing is committed yet; waiting for the next version"
    fleet = drive()
    fleet.to(Phase.WRITING)
    assert told(fleet) == "round 1.1: writing for step 1 (generation 7)"
    fleet.to(Phase.RECORDING)
    fleet.durable()
    assert told(fleet) == "step 1 (generation 7) is committed; waiting for the next version"


def test_who_was_left_out_of_the_round_is_said(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    fleet.to(Phase.QUIESCING)
    fleet.fails("e0", Call.UPDATE)
    assert told(fleet) == "round 1.1: quiescing for step 1 (generation 7) without e0 (e0: update failed: 500)"


def test_engines_that_have_not_come_are_named(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    fleet.connect(trainer())
    fleet.says(trainer(), ANNOUNCE)
    assert told(fleet) == "nothing is committed yet; waiting for engines e0, e1"


def test_layouts_that_do_not_fit_are_told(drive: Any) -> None:
    fleet = drive()
    fleet.join()
    fleet.happens(PlanRejected(fleet.id(), fleet.fleet.plan_number, "tensor 'w' has two shapes"))
    assert told(fleet) == "nothing is committed yet; no plan fits: tensor 'w' has two shapes"


def test_torn_engines_come_first(drive: Any) -> None:
    fleet = drive()
    going = fleet.to(Phase.VERIFYING)
    fleet.says(fleet.ranks_of()[0], fleet.verified(error="out of memory"))
    for member in fleet.ranks_of():
        fleet.says(member, Left(round=going.name, status=EngineStatus(torn=True)))
    fleet.fails("e0", Call.UPDATE, "aborted")
    why = "e0 (tried again in 1 s: e0/0 could not verify: out of memory)"
    assert told(fleet) == f"e0 torn and paused: waiting for engines that can take part: {why}"


@pytest.mark.parametrize("dead", [1, 2**60])
def test_a_version_that_a_dead_trainer_left_hides_none_of_the_present_one(drive: Any, dead: int) -> None:
    fleet = drive()
    fleet.join()
    fleet.fleet.waiting_since = {Version(dead, 9): 0.0, Version(fleet.fleet.generation, 10): 1.0}
    assert told(fleet) == "nothing is committed yet; waiting for not STAGED by trainer/0"
    fleet.fleet.trainer_ranks[0].staged = Staged(
        version=Version(fleet.fleet.generation, 10), bytes=0, convert_seconds=0.0, digest_seconds=0.0
    )
    assert told(fleet) == "nothing is committed yet; waiting for broadcasts/step_10/STABLE is missing"


def test_it_is_said_once_and_again_when_it_changes(drive: Any) -> None:
    fleet = drive.joined()
    said = fleet.told().count("waiting for the next version")
    fleet.passes(1.0)
    fleet.passes(1.0)
    assert fleet.told().count("waiting for the next version") == said == 1


def test_the_first_trainer_rank_is_told_when_it_changes_with_what_is_wrong_with_engines(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    fleet.connect(trainer())
    fleet.says(trainer(), ANNOUNCE)
    fleet.fails("e0", Call.PROBE, "404: set VLLM_SERVER_DEV_MODE=1")
    told = [message.sentence for message in fleet.sent(trainer(), Standing)]
    assert told[-1].startswith("nothing is committed yet; waiting for engines e0, e1; e0: ")
    assert told[-1].endswith("404: set VLLM_SERVER_DEV_MODE=1")
    fleet.passes(0.1)
    assert len(fleet.sent(trainer(), Standing)) == len(told), "no change, no message"
    assert all(one != other for one, other in pairwise(told))


def test_other_ranks_are_told_nothing(drive: Any) -> None:
    fleet = drive()
    fleet.connect(trainer(1))
    assert fleet.sent(trainer(1), Standing) == []
