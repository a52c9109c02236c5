"""Rounds in which engines take the version from another one that has verified it: who writes to whom, and ways out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from fleets import BYTES_PER_EDGE, rank, trainer
from weightsync.orchestrator.core import conditions
from weightsync.orchestrator.core.commands import MakePlan
from weightsync.orchestrator.core.errors import InvariantViolation
from weightsync.orchestrator.core.events import AbortAsked, HoldAsked, PlanReady, PlanRejected
from weightsync.orchestrator.core.invariants import commanded
from weightsync.orchestrator.core.records import GrantOver, LiveDirty, RoundEnded
from weightsync.orchestrator.core.round import relays
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.state import Unclosed
from weightsync.orchestrator.protocol.edges import EdgeFailure, PeerTransfer
from weightsync.orchestrator.protocol.layout import Tensor
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Announce,
    Closed,
    Connect,
    EngineStatus,
    Expose,
    Exposed,
    Grant,
    Ready,
    Renew,
    Verify,
)
from weightsync.orchestrator.protocol.names import RoundName, Version

VERSION = Version(7, 1)
ENGINES = ("e0", "e1", "e2")
E0, E1, E2 = (rank(name) for name in ENGINES)
TAKING = {"e1": "e0", "e2": "e0"}


def fleet_of(drive: Any, *, fan_out: str = "peers", lands: dict[str, str] | None = None, **more: Any) -> Any:
    """Three engines of one rank, whose edges are all confirmed, with nothing staged."""
    fleet = drive(
        engines=ENGINES, ranks=1, options={"fan_out": fan_out}, lands=lands or dict.fromkeys(ENGINES, "copy"), **more
    )
    fleet.join()
    fleet.settle()
    return fleet


def wave(drive: Any, number: int, phase: Phase = Phase.WRITING, **more: Any) -> Any:
    """A round in this phase of this wave."""
    fleet = fleet_of(drive, **more)
    fleet.stage()
    fleet.settle()
    going = fleet.round
    while (going.phase, going.wave) != (phase, number):
        assert fleet.fleet.round is going
        fleet._forward(going)
    return fleet


def rows(fleet: Any) -> list[RoundEnded]:
    return [record for record in fleet.written() if isinstance(record, RoundEnded)]


# ---------------------------------------------------------------------------------------------------- how it goes well
def test_one_of_those_that_hold_the_same_is_written_to_and_writes_to_the_others(drive: Any) -> None:
    fleet = wave(drive, 0)
    going = fleet.round
    assert (going.lenders, going.writing) == (TAKING, {trainer(): (E0,)})
    assert [grant.members for grant in fleet.sent(trainer(), Grant)] == [(E0,)]
    assert {member: fleet.sent(member, Expose)[0].relays for member in (E0, E1, E2)} == {E0: False, E1: True, E2: True}
    (dirty,) = [record for record in fleet.written() if isinstance(record, LiveDirty)]
    assert {writer: set(taint.targets) for writer, taint in dirty.writers.items()} == {
        "trainer/0": {"e0/0"}, "e0/0": {"e1/0", "e2/0"},
    }, "whoever may write in the round is durable before anybody does"  # fmt: skip
    fleet.says(trainer(), fleet.closed())
    assert [fleet.sent(member, Verify) != [] for member in (E0, E1, E2)] == [True, False, False]
    assert fleet.sent(E0, Grant) == [], "it has not verified what it holds"
    fleet.says(E0, fleet.verified())
    assert (going.phase, going.wave, going.lent) == (Phase.WRITING, 1, dict.fromkeys((E1, E2), fleet.digest))
    (grant,) = fleet.sent(E0, Grant)
    feed = fleet.fleet.feed
    assert (grant.members, grant.version) == ((E1, E2), VERSION)
    assert grant.fingerprint == feed.plan.connects[E0].fingerprint == fleet.fleet.agents[E0].lends
    fleet.says(E0, fleet.closed(E0))
    assert going.phase is Phase.VERIFYING
    for member in (E1, E2):
        fleet.says(member, fleet.verified())
    assert going.phase is Phase.DECIDING
    while fleet.fleet.round is going:
        fleet._forward(going)
    (row,) = rows(fleet)
    assert (row.outcome, row.kind, row.lenders, row.left_out) == ("committed", "publish", TAKING, ())
    assert row.bytes == 3 * BYTES_PER_EDGE
    assert fleet.fleet.feed is feed, "the next round goes the same way"
    fleet.stage(2)
    assert fleet.round.lenders == TAKING


def test_the_edges_between_them_are_kept_beside_the_trainers(drive: Any) -> None:
    fleet = fleet_of(drive)
    plan = [command for command in fleet.commands if isinstance(command, MakePlan)][-1]
    assert [party.member for party in plan.sources] == [E0]
    assert plan.standby == {E0: fleet.fleet.plan.connects[E0]}
    for member in (E0, E1, E2):
        agent = fleet.fleet.agents[member]
        assert fleet.fleet.is_confirmed(member)
        assert (agent.lends != "", agent.relayed != "") == (member == E0, member != E0)


@pytest.mark.parametrize(
    ("more", "lenders"),
    [
        ({"fan_out": "auto"}, {}),
        ({"fan_out": "trainer"}, {}),
        ({"lands": {"e0": "flip", "e1": "copy", "e2": "copy"}}, TAKING),
        ({"lands": {"e0": "live", "e1": "copy", "e2": "copy"}}, {}),
        ({"reads_only": ("e0",)}, {"e0": "e1", "e2": "e1"}),
        ({"reads_only": ENGINES}, {}),
        ({"pairs": (("e1", "e2"),)}, TAKING),
    ],
)
def test_who_takes_from_whom(drive: Any, more: dict[str, Any], lenders: dict[str, str]) -> None:
    """With an engine that stands still while it is written to, nobody makes it wait for a second wave."""
    fleet = fleet_of(drive, **more)
    fleet.stage()
    assert fleet.round.lenders == lenders


def test_who_holds_other_boxes_takes_from_the_trainer(drive: Any) -> None:
    fleet = fleet_of(drive)
    other = msgspec.structs.replace(fleet.announcement("e1").layout, tensors=(Tensor("w", "int8", (1,)),))
    fleet.says(E1, Announce(layout=other, lends_name="lends"))
    fleet.plan()
    fleet.plan()
    fleet.stage()
    assert fleet.round.lenders == {"e2": "e0"}
    assert fleet.round.writers[trainer()] == (E0, E1)


# ------------------------------------------------------------------------------------------ before a round: its edges
def ready_beside(fleet: Any) -> str:
    """Of e1, as it was sent: what it has not confirmed any more."""
    agent = fleet.fleet.agents[E1]
    sent, agent.relayed = agent.relayed, ""
    return str(sent)


def test_a_round_waits_for_edges_between_engines_and_no_longer_than_for_engines(drive: Any) -> None:
    fleet = fleet_of(drive)
    sent = ready_beside(fleet)
    fleet.stage()
    assert fleet.fleet.round is None
    waits = "edges by which e1 takes from another engine"
    assert conditions.waits_for(fleet.fleet, VERSION, fleet.now) == waits
    fleet.says(E1, Ready(fingerprint=sent))
    assert fleet.round.lenders == TAKING


def test_who_is_late_takes_from_the_trainer(drive: Any) -> None:
    fleet = fleet_of(drive)
    ready_beside(fleet)
    fleet.stage()
    fleet.passes(fleet.policy.patience)
    assert fleet.round.lenders == {"e2": "e0"}
    assert fleet.round.writers[trainer()] == (E0, E1)


@pytest.mark.parametrize("side", ["seed", "taker"])
def test_a_dead_edge_is_not_waited_for(drive: Any, side: str) -> None:
    fleet = fleet_of(drive)
    member, peer = (E0, E1) if side == "seed" else (E1, E0)
    agent = fleet.fleet.agents[member]
    why = (EdgeFailure(peer, "no answer"),)
    fleet.says(member, Ready(fingerprint=agent.lends if side == "seed" else agent.relayed, failed=why))
    fleet.stage()
    assert fleet.round.lenders == {"e2": "e0"}


def test_a_plan_that_there_is_not_is_not_waited_for(drive: Any) -> None:
    fleet = fleet_of(drive)
    fleet.fleet.feed = None
    fleet.passes(0.1)
    plan = [command for command in fleet.commands if isinstance(command, MakePlan)][-1]
    fleet.stage()
    assert fleet.fleet.round is None
    fleet.happens(PlanRejected(fleet.id(), plan.number, "no room", lends=True))
    fleet.passes(0.1)
    assert fleet.round.lenders == {}


def test_other_edges_of_the_trainer_make_other_edges_between_engines(drive: Any) -> None:
    """What lies where in a landing is the trainer's plan."""
    fleet = fleet_of(drive)
    feed = fleet.fleet.feed
    facts = fleet.fleet.plan
    connects = {m: msgspec.structs.replace(c, fingerprint=f"{c.fingerprint}?") for m, c in facts.connects.items()}
    fleet.fleet.planning = True
    fleet.passes(0.1)
    assert fleet.fleet.feed is feed, "as long as nobody knows which"
    number = fleet.fleet.plan_number
    fleet.happens(PlanReady(fleet.id(), number, dataclasses.replace(facts, connects=connects)))
    fleet.passes(0.1)
    for member, connect in connects.items():
        fleet.says(member, Ready(fingerprint=connect.fingerprint))
    assert fleet.fleet.feed is not feed
    assert fleet.fleet.feed.standby == {E0: connects[E0]}


def test_while_a_plan_is_made_those_count_that_the_last_one_knows(drive: Any) -> None:
    fleet = fleet_of(drive)
    fleet.fleet.planning = True
    assert relays.wanted(fleet.fleet, fleet.now) == TAKING
    del fleet.fleet.plan.connects[E2]
    assert relays.wanted(fleet.fleet, fleet.now) == {"e1": "e0"}
    del fleet.fleet.engines["e1"]
    assert relays.wanted(fleet.fleet, fleet.now) == {}


def test_one_that_is_away_changes_nothing_for_the_others(drive: Any) -> None:
    fleet = fleet_of(drive)
    feed = fleet.fleet.feed
    fleet.loses_engine("e2")
    fleet.settle()
    fleet.passes(0.1)
    assert fleet.fleet.feed is feed
    assert relays.wanted(fleet.fleet, fleet.now) == {"e1": "e0"}


def test_a_seed_stays_one_though_another_could_be_it(drive: Any) -> None:
    fleet = fleet_of(drive)
    fleet.fleet.feed.lenders = {"e0": "e1", "e2": "e1"}
    assert relays.wanted(fleet.fleet, fleet.now) == {"e0": "e1", "e2": "e1"}


def _held(fleet: Any) -> None:
    fleet.happens(HoldAsked(fleet.id(), "ann", "", "e0", True))


def _failed(fleet: Any) -> None:
    fleet.fleet.engines["e0"].failures = 1


def _within_reach(fleet: Any) -> None:
    fleet.fleet.unclosed[trainer(), RoundName(1, 1)] = Unclosed(1, "h", "b", {E0: 100})


@pytest.mark.parametrize("happens", [_held, _failed, _within_reach])
def test_who_may_not_be_believed_is_no_seed(drive: Any, happens: Callable[[Any], None]) -> None:
    fleet = fleet_of(drive)
    happens(fleet)
    assert relays.wanted(fleet.fleet, fleet.now) == {"e2": "e1"}


def test_a_rank_that_has_not_closed_is_first_told_how_its_peers_are_reached(drive: Any) -> None:
    """Else what hangs on its way to one of them would hang for as long as there are rounds."""
    fleet = fleet_of(drive)
    fleet.fleet.unclosed[E0, RoundName(1, 1)] = Unclosed(100, "h", "b", {E2: 100})
    fleet.passes(0.1)
    assert fleet.fleet.feed is None
    assert [peer.member for peer in fleet.sent(E0, Connect)[-1].peers] == [E2]
    fleet.says(E0, Closed(round=RoundName(1, 1)))
    fleet.passes(0.1)
    assert fleet.fleet.feed.lenders == TAKING


def test_one_that_was_a_seed_gives_its_edges_back(drive: Any) -> None:
    fleet = fleet_of(drive)
    _failed(fleet)
    fleet.passes(0.1)
    assert fleet.fleet.feed.lenders == {"e2": "e1"}
    fleet.plan()
    fleet.passes(0.1)
    assert (fleet.fleet.agents[E0].lends, fleet.sent(E0, Connect)[-1].peers) == ("", ())


# ----------------------------------------------------------------------------------------------- what may go wrong
def goes_on_with_the_trainer(fleet: Any, going: Any) -> None:
    """The attempt is over, nobody has lost anything by it, and in the next one the trainer writes to who took."""
    assert fleet.fleet.round is None
    assert rows(fleet)[-1].outcome == "failed"
    assert fleet.failures() == []
    assert all(not progress.pausing or progress.lands == "copy" for progress in going.engines.values())


@pytest.mark.parametrize("phase", [Phase.MARKING, Phase.WRITING, Phase.VERIFYING])
def test_a_seed_that_is_lost_before_it_has_verified_ends_the_attempt(drive: Any, phase: Phase) -> None:
    fleet = wave(drive, 0, phase)
    going = fleet.round
    fleet.loses_engine("e0")
    fleet.passes(fleet.policy.heartbeat)
    goes_on_with_the_trainer(fleet, going)
    assert going.reason.startswith("e1, e2 cannot take it from e0: e0/0 was lost")
    assert [fleet.fleet.engines[name].failures for name in ENGINES] == [1, 0, 0]
    fleet.passes(fleet.policy.backoff)
    assert fleet.fleet.feed.lenders == {"e2": "e1"}, "another one takes its place"


def test_a_seed_that_is_lost_while_it_writes_keeps_those_within_its_reach_out(drive: Any) -> None:
    fleet = wave(drive, 1)
    going = fleet.round
    fleet.loses_engine("e0")
    fleet.passes(fleet.policy.heartbeat)
    goes_on_with_the_trainer(fleet, going)
    assert fleet.fleet.tainted("e1") == fleet.fleet.tainted("e2") == [(E0, going.name)]
    assert rows(fleet)[-1].unclosed["e0/0"].engine == "e0"
    fleet.bring("e0", incarnation=300, host="", boot="")
    assert fleet.fleet.tainted("e1") != [], "nobody knows that it has ended"


@pytest.mark.parametrize(("boot", "asked"), [("another machine", 2), ("one machine", 0), ("", 0)])
def test_a_seed_that_is_lost_with_its_machine_costs_the_others_an_endpoint(drive: Any, boot: str, asked: int) -> None:
    """By memory that the two ends share something may still arrive; where they share none, by nothing any more."""
    fleet = wave(drive, 1)
    going = fleet.round
    fleet.fleet.unclosed[E0, going.name].boot = "one machine"
    for member in (E1, E2):
        agent = fleet.fleet.agents[member]
        agent.hello = msgspec.structs.replace(agent.hello, boot=boot)
    fleet.loses_engine("e0")
    fleet.passes(fleet.policy.heartbeat)
    assert fleet.fleet.round is None
    for _ in range(2):
        fleet.passes(fleet.policy.probe_interval)
    renewed = [member for member in (E1, E2) if fleet.sent(member, Renew)]
    assert len(renewed) == asked
    for member in renewed:
        assert fleet.fleet.tainted(member.engine) == [(E0, going.name)]
        another = Announce(layout=fleet.announcement(member.engine).layout, endpoint_name="another", lends_name="lends")
        fleet.says(member, another)
        assert fleet.fleet.tainted(member.engine) == []
    assert (GrantOver in map(type, fleet.written())) == bool(asked)


def test_a_seed_that_has_closed_is_missed_by_nobody(drive: Any) -> None:
    fleet = wave(drive, 1, Phase.VERIFYING)
    going = fleet.round
    fleet.loses_engine("e0")
    fleet.passes(fleet.policy.heartbeat)
    assert (fleet.fleet.round, going.remaining()) == (going, ["e1", "e2"])
    for member in (E1, E2):
        fleet.says(member, fleet.verified())
    assert going.phase is Phase.DECIDING


def test_a_seed_of_other_bytes_than_it_has_verified_ends_the_attempt(drive: Any) -> None:
    fleet = wave(drive, 1)
    going = fleet.round
    sent = PeerTransfer(E1, BYTES_PER_EDGE, 1, 0.01, (1, 2))
    fleet.says(E0, Closed(round=going.name, peers=(sent,), final=False))
    goes_on_with_the_trainer(fleet, going)
    assert going.reason.startswith("e0 has lent e1/0 bytes of digest 0000000000000001")
    assert "it has verified: end e0" in going.reason
    fleet.passes(fleet.policy.backoff)
    assert fleet.round.lenders == {}, "nothing is taken from it for a while"
    assert fleet.round.writers == {trainer(): (E0, E1)}, "and it may not switch to that either"


@pytest.mark.parametrize("other", [False, True])
def test_a_seed_writes_on_what_it_keeps_if_it_has_landed_by_the_present_plan(drive: Any, other: bool) -> None:
    fleet = wave(drive, 0, Phase.VERIFYING)
    fleet.happens(AbortAsked(fleet.id(), "ann", ""))
    fleet.says(E0, fleet.verified(round=fleet.sent(E0, Verify)[0].round))
    seed = fleet.fleet.engines["e0"]
    if other:
        seed.kept = dataclasses.replace(seed.kept, landed={E0: "by edges of before"})
    fleet.settle()
    fleet.passes(fleet.policy.backoff)
    fleet.settle()
    fleet.passes(0.0)
    going = fleet.round
    assert going.lenders == TAKING
    assert going.writers == ({trainer(): (E0,)} if other else {}) | {E0: (E1, E2)}
    assert going.engines["e0"].kept is not other
    fleet.to(Phase.DECIDING)
    assert [grant.members for grant in fleet.sent(E0, Grant)] == [(E1, E2)]


@pytest.mark.parametrize("retry", [True, False])
def test_what_goes_wrong_between_engines_is_nobodys_failure(drive: Any, retry: bool) -> None:
    """Also where who writes says that it is of no use to try again: by the trainer it is."""
    fleet = wave(drive, 1)
    going = fleet.round
    closed = Closed(round=going.name, error="no memory to pack in", fault="engine", retry=retry)
    fleet.says(E0, closed)
    goes_on_with_the_trainer(fleet, going)
    assert [fleet.fleet.engines[name].failures for name in ENGINES] == [0, 0, 0]
    fleet.passes(fleet.policy.backoff)
    assert fleet.round.writers == {trainer(): (E1, E2)}, "e0 has verified what stands by, and keeps it"


def test_an_edge_between_engines_that_breaks_is_taken_over_by_the_trainer(drive: Any) -> None:
    fleet = wave(drive, 1)
    going = fleet.round
    broken = PeerTransfer(E1, 0, 0, 0.0, (0, 0), "connection reset")
    fleet.says(E0, Closed(round=going.name, peers=(broken,), final=False))
    goes_on_with_the_trainer(fleet, going)
    assert [abort.members for abort in fleet.sent(E0, Abort)] == [(E1, E2)], "what stands by there is whole"


def test_who_is_written_to_and_is_lost_is_left_out_alone(drive: Any) -> None:
    fleet = wave(drive, 1)
    going = fleet.round
    fleet.loses_engine("e1")
    fleet.passes(fleet.policy.heartbeat)
    assert (fleet.fleet.round, going.remaining()) == (going, ["e0", "e2"])
    assert fleet.sent(E0, Abort)[-1].members == (E1,)
    sent = PeerTransfer(E2, BYTES_PER_EDGE, 1, 0.01, fleet.digest)
    fleet.says(E0, Closed(round=going.name, peers=(sent,), final=False))
    fleet.says(E2, fleet.verified())
    assert going.phase is Phase.DECIDING


def test_who_has_other_bytes_than_were_verified_is_left_out_alone(drive: Any) -> None:
    fleet = wave(drive, 1, Phase.VERIFYING)
    going = fleet.round
    fleet.says(E1, fleet.verified(digest=(1, 2)))
    assert going.remaining() == ["e0", "e2"]
    assert "differs from what was lent" in going.engines["e1"].left_out


def test_a_deadline_counts_for_a_wave_and_costs_who_is_late_in_it(drive: Any) -> None:
    fleet = wave(drive, 0)
    going = fleet.round
    fleet.passes(fleet.policy.transfer - 1)
    fleet.says(trainer(), fleet.closed())
    fleet.says(E0, fleet.verified())
    began = fleet.now
    assert going.deadline == began + fleet.policy.transfer
    fleet.passes(fleet.policy.transfer - 1)
    assert fleet.fleet.round is going, "who is done waits for nobody, since all serve on"
    sent = PeerTransfer(E2, BYTES_PER_EDGE, 1, 0.01, fleet.digest)
    fleet.says(E0, Closed(round=going.name, peers=(sent,), final=False))
    fleet.passes(1)
    assert (fleet.fleet.round, going.remaining()) == (going, ["e0", "e2"])


# ------------------------------------------------------------------------------------ words out of turn, and again
def test_a_seed_that_connects_again_is_granted_again_and_may_say_again_what_it_has_verified(drive: Any) -> None:
    fleet = wave(drive, 1)
    going = fleet.round
    stands_by = EngineStatus(standby=VERSION, standby_digest=fleet.digest)
    fleet.loses(E0)
    fleet.connect(E0, stands_by)
    assert len(fleet.sent(E0, Grant)) == 2
    fleet.says(E0, fleet.verified())
    assert fleet.fleet.round is going
    fleet.says(E0, fleet.closed(E0))
    assert going.phase is Phase.VERIFYING


def test_a_seed_that_holds_it_no_more_ends_the_attempt(drive: Any) -> None:
    fleet = wave(drive, 1)
    going = fleet.round
    fleet.loses(E0)
    fleet.connect(E0, EngineStatus())
    goes_on_with_the_trainer(fleet, going)
    assert "e0/0 holds no version now" in going.reason


def test_who_takes_and_connects_again_is_told_what_it_may_have_missed(drive: Any) -> None:
    fleet = wave(drive, 0, Phase.EXPOSING)
    fleet.loses(E1)
    fleet.connect(E1)
    assert [expose.relays for expose in fleet.sent(E1, Expose)] == [True, True]
    fleet = wave(drive, 0, Phase.VERIFYING)
    fleet.loses(E1)
    fleet.connect(E1)
    assert fleet.sent(E1, Verify) == [], "nothing has been written to it"


def test_who_takes_cannot_say_that_it_has_verified_before_it_was_written_to(drive: Any) -> None:
    fleet = wave(drive, 1)
    fleet.says(E1, fleet.verified())
    assert "e1/0 says VERIFIED before it was asked" in fleet.told()
    assert E1 not in fleet.fleet.agents


def test_a_seed_cannot_close_what_it_was_not_granted(drive: Any) -> None:
    fleet = wave(drive, 0)
    going = fleet.round
    fleet.says(E0, fleet.closed(E0))
    assert E0 not in going.closed
    assert going.phase is Phase.WRITING


@pytest.mark.parametrize("word", [Exposed, Closed])
def test_words_of_the_wave_before_count_once(drive: Any, word: type) -> None:
    fleet = wave(drive, 1)
    going = fleet.round
    if word is Exposed:
        fleet.says(E1, Exposed(round=going.name))
    else:
        fleet.says(trainer(), fleet.closed(error="said too late", fault="trainer"))
    assert (fleet.fleet.round, going.phase, going.wave) == (going, Phase.WRITING, 1)


def test_nobody_is_granted_to_write_what_it_has_not_verified(drive: Any) -> None:
    fleet = wave(drive, 1)
    (command,) = [c for c in fleet.commands if getattr(c, "message", None) in fleet.sent(E0, Grant)]
    commanded(fleet.fleet, command)
    agent = fleet.fleet.agents[E0]
    agent.status = msgspec.structs.replace(agent.status, standby_digest=(1, 2))
    with pytest.raises(InvariantViolation, match=r"S1: grant 1\.1 to e0/0"):
        commanded(fleet.fleet, command)


def test_a_relay_is_written_by_a_plan_that_was_proved(drive: Any) -> None:
    fleet = fleet_of(drive)
    fleet.fleet.feed.plan = dataclasses.replace(fleet.fleet.feed.plan, proved=False)
    fleet.stage()
    while fleet.round.phase is not Phase.VERIFYING:
        fleet._forward(fleet.round)
    with pytest.raises(InvariantViolation, match="S6"):
        fleet.says(E0, fleet.verified())
