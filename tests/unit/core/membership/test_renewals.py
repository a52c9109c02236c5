"""A worker that a hung write may still reach is asked for another endpoint, once, and comes back by it."""

from typing import Any

import msgspec
import pytest
from fleets import BYTES_PER_EDGE, rank, trainer
from weightsync.orchestrator.core.commands import MakePlan
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.protocol.edges import EdgeFailure, PeerTransfer
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.messages import Abort, Announce, Closed, Ready, Renew
from weightsync.orchestrator.protocol.names import NO_BYTES

TRAINER, FIRST = trainer(), rank("e0", 0)
WHY = "edge to e0/0 has not ended: an earlier write may still reach its memory"


@pytest.fixture
def hanging(drive: Any) -> Any:
    """A fleet and its round, in which nothing that is written to the first rank of e0 ends."""
    fleet = drive(("e0", "e1"), lands={"e0": "copy", "e1": "copy"}, options={"min_engines": 1})
    fleet.going = fleet.to(Phase.WRITING)
    said = Ready(fingerprint=fleet.fleet.agents[TRAINER].fingerprint, failed=(EdgeFailure(FIRST, WHY),))
    fleet.says(TRAINER, said)
    return fleet


def the_others_end(fleet: Any) -> None:
    """The rest of the round, without e0."""
    ended = [rank("e0", 1), *fleet.ranks_of("e1")]
    peers = tuple(PeerTransfer(member, BYTES_PER_EDGE, 1, 0.1, fleet.digest) for member in ended)
    fleet.says(TRAINER, Closed(round=fleet.going.name, peers=peers, final=False))


def test_an_edge_that_hangs_costs_its_engine_the_round_at_once(hanging: Any) -> None:
    assert hanging.going.remaining() == ["e1"]
    assert hanging.going.engines["e0"].left_out == f"trainer/0 cannot write to e0/0: {WHY}"
    [abort] = hanging.sent(TRAINER, Abort)
    assert set(abort.members) == set(hanging.ranks_of("e0"))
    the_others_end(hanging)
    assert hanging.going.phase is Phase.VERIFYING


def test_its_worker_is_asked_for_another_endpoint(hanging: Any) -> None:
    the_others_end(hanging)
    assert hanging.sent(FIRST, Renew) == [], "what was told to stop mostly ends by itself"
    hanging.passes(hanging.policy.probe_interval)
    assert hanging.sent(FIRST, Renew) == [Renew(reason="what trainer/0 wrote to e0/0 hangs")]
    assert hanging.sent(rank("e0", 1), Renew) == [], "of whom the write has ended"
    assert hanging.sent(rank("e1", 0), Renew) == []


def test_again_after_the_patience_and_then_half_as_often(hanging: Any) -> None:
    hanging.passes(hanging.policy.probe_interval)
    patience = hanging.policy.patience
    for seconds, asked in ((patience - 1, 1), (1, 2), (2 * patience - 1, 2), (1, 3), (4 * patience - 1, 3), (1, 4)):
        hanging.passes(seconds)
        assert len(hanging.sent(FIRST, Renew)) == asked


def test_an_edge_that_is_dead_without_a_write_has_the_patience(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    fleet.join()
    fingerprint = fleet.fleet.agents[TRAINER].fingerprint
    fleet.says(TRAINER, Ready(fingerprint=fingerprint, failed=(EdgeFailure(FIRST, "no answer"),)))
    fleet.passes(fleet.policy.patience - 1)
    assert fleet.sent(FIRST, Renew) == []
    fleet.passes(1)
    assert fleet.sent(FIRST, Renew) == [Renew(reason="trainer/0 does not reach e0/0")]
    fleet.says(TRAINER, Ready(fingerprint=fingerprint))
    fleet.passes(1)
    fleet.says(TRAINER, Ready(fingerprint=fingerprint, failed=(EdgeFailure(FIRST, "no answer"),)))
    fleet.passes(fleet.policy.patience - 1)
    assert len(fleet.sent(FIRST, Renew)) == 1, "from the beginning"


def test_one_that_connects_again_is_asked_again(hanging: Any) -> None:
    hanging.passes(hanging.policy.probe_interval)
    hanging.loses(FIRST)
    hanging.connect(FIRST)
    for _ in range(2):
        hanging.passes(hanging.policy.probe_interval)
    assert len(hanging.sent(FIRST, Renew)) == 2


def test_a_writer_that_is_not_there_would_not_hear_of_it(hanging: Any) -> None:
    hanging.loses(TRAINER)
    for _ in range(2):
        hanging.passes(hanging.policy.probe_interval)
    assert hanging.sent(FIRST, Renew) == []


def test_a_write_that_ends_by_itself_costs_nobody_its_endpoint(hanging: Any) -> None:
    hanging.passes(hanging.policy.probe_interval / 2)
    peers = tuple(PeerTransfer(m, 0, 0, 0.0, NO_BYTES, "stopped") for m in hanging.ranks_of("e0"))
    hanging.says(TRAINER, Closed(round=hanging.going.name, peers=peers, final=False))
    hanging.says(TRAINER, Ready(fingerprint=hanging.fleet.agents[TRAINER].fingerprint))
    hanging.passes(hanging.policy.probe_interval)
    assert hanging.sent(FIRST, Renew) == []


def test_the_new_endpoint_is_planned_and_the_grant_over_when_its_writer_says_so(hanging: Any) -> None:
    ended = [rank("e0", 1), *hanging.ranks_of("e1")]
    peers = tuple(PeerTransfer(member, 0, 1, 0.1, NO_BYTES, "reset") for member in ended)
    hanging.says(TRAINER, Closed(round=hanging.going.name, peers=peers, final=False))
    assert hanging.fleet.round is None, "no engine is left"
    assert hanging.fleet.tainted("e0") == [(TRAINER, hanging.going.name)]
    before = sum(isinstance(command, MakePlan) for command in hanging.commands)
    hanging.says(FIRST, Announce(layout=Layout((), (), b"", lands="copy"), endpoint_name="e0/0-another"))
    assert sum(isinstance(command, MakePlan) for command in hanging.commands) == before + 1
    hanging.says(TRAINER, Closed(round=hanging.going.name))
    assert hanging.fleet.tainted("e0") == []


def test_whom_a_lender_does_not_reach_is_asked_likewise(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    fleet.join()
    fleet.fleet.agents[rank("e1")].unlent = {FIRST: "no answer"}
    fleet.passes(0.1)
    fleet.passes(fleet.policy.patience - 1)
    assert fleet.sent(FIRST, Renew) == []
    fleet.passes(1)
    assert fleet.sent(FIRST, Renew) == [Renew(reason="e1/0 does not reach e0/0")]


def test_a_worker_that_cannot_tell_its_writers_is_no_writer(drive: Any) -> None:
    fleet = drive(("e0", "e1"))
    fleet.join()
    fleet.fleet.agents[FIRST].dead_edges = {TRAINER: "no route"}
    for _ in range(2):
        fleet.passes(fleet.policy.patience)
    assert fleet.sent(TRAINER, Renew) == []


@pytest.fixture
def gone(drive: Any) -> Any:
    """A fleet whose trainer has gone while it wrote, of a round that was given up; e0's workers have spares."""
    fleet = drive(("e0", "e1"), lands={"e0": "copy", "e1": "copy"}, options={"min_engines": 1})
    fleet.going = fleet.to(Phase.WRITING)
    for member in fleet.ranks_of("e0"):
        agent = fleet.fleet.agents[member]
        agent.announce = msgspec.structs.replace(agent.announce, spares=2)
    fleet.loses(TRAINER)
    fleet.passes(fleet.policy.heartbeat)
    assert fleet.fleet.round is None
    assert fleet.fleet.tainted("e0") == fleet.fleet.tainted("e1") == [(TRAINER, fleet.going.name)]
    fleet.passes(0.1)
    return fleet


def another(fleet: Any, member: Any, spares: int) -> Announce:
    return msgspec.structs.replace(
        fleet.fleet.agents[member].announce, endpoint_name=f"{member}-{spares}", spares=spares
    )


def test_a_writer_that_has_gone_and_may_wake_up_costs_a_spare_after_the_patience(gone: Any) -> None:
    gone.passes(gone.policy.patience - 1)
    assert gone.sent(FIRST, Renew) == [], "a process that takes its place would prove that it has ended"
    gone.passes(1)
    assert gone.sent(FIRST, Renew) == [Renew(reason="trainer/0 has gone and may still write to e0/0", spare=True)]
    assert gone.sent(rank("e1"), Renew) == [], "which has none"


def test_what_has_taken_a_spare_is_out_of_reach_and_what_has_not_is_not(gone: Any) -> None:
    gone.passes(gone.policy.patience)
    grant = (TRAINER, gone.going.name)
    gone.says(FIRST, another(gone, FIRST, 2))
    assert gone.fleet.unclosed[grant].targets.keys() >= {FIRST}, "another endpoint alone keeps nobody out"
    for member in gone.ranks_of("e0"):
        gone.says(member, another(gone, member, 1))
    assert gone.fleet.tainted("e0") == []
    assert gone.fleet.tainted("e1") == [grant]


def test_one_that_lands_live_keeps_what_it_has_for_ever(gone: Any) -> None:
    for _ in range(5):
        gone.passes(gone.policy.patience)
    assert gone.sent(rank("e1"), Renew) == []
    assert gone.fleet.tainted("e1") == [(TRAINER, gone.going.name)]


def test_one_without_spares_left_is_asked_no_more(gone: Any) -> None:
    agent = gone.fleet.agents[FIRST]
    agent.announce = msgspec.structs.replace(agent.announce, spares=0)
    for _ in range(5):
        gone.passes(gone.policy.patience)
    assert gone.sent(FIRST, Renew) == []


def test_a_writer_that_comes_back_closes_for_itself(gone: Any) -> None:
    gone.passes(gone.policy.patience - 1)
    gone.connect(TRAINER)
    gone.passes(2)
    assert gone.sent(FIRST, Renew) == []
