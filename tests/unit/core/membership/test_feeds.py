"""Feeds: when there is one, who is sent what, what its round does, and when somebody else is asked."""

import dataclasses
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from fleets import BYTES_PER_EDGE, plan_facts, rank
from weightsync.orchestrator.core import conditions
from weightsync.orchestrator.core.commands import MakePlan, SendPlan
from weightsync.orchestrator.core.errors import InvariantViolation
from weightsync.orchestrator.core.events import Call, MaintenanceAsked, PlanReady, PlanRejected, RetryAsked
from weightsync.orchestrator.core.machine import start
from weightsync.orchestrator.core.membership.feeds import NOTHING
from weightsync.orchestrator.core.records import Committed, LiveDirty, RoundEnded
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.protocol.edges import EdgeFailure, PeerTransfer
from weightsync.orchestrator.protocol.layout import Layout, Tensor
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Announce,
    Closed,
    Connect,
    EngineStatus,
    Exposed,
    Grant,
    Left,
    Ready,
    Renew,
)
from weightsync.orchestrator.protocol.names import Version

VERSION = Version(7, 1)
ENGINES = ("e0", "e1", "e2")


def behind(drive: Any, *, trainer: bool = False, fan_out: str = "auto", **more: Any) -> Any:
    """All serve VERSION in copy; then e2 is started anew, and the trainer is gone unless it is to stay."""
    lands = dict.fromkeys(ENGINES, "copy")
    fleet = drive(engines=ENGINES, ranks=1, options={"fan_out": fan_out}, **{"lands": lands, **more})
    fleet.to(Phase.RECORDING)
    fleet.durable()
    fleet.settle()
    if not trainer:
        fleet.loses(next(iter(fleet.fleet.trainer_ranks.values())).member)
    fleet.loses_engine("e2")
    fleet.settle()
    fleet.bring("e2", incarnation=300)
    fleet.settle()
    return fleet


def feeds(fleet: Any) -> list[MakePlan]:
    plans = [command for command in fleet.commands if isinstance(command, MakePlan)]
    return [command for command in plans if command.lends and not command.standby]


def lends(fleet: Any) -> Any:
    """The round of the feed, with everybody's word up to the grant."""
    fleet.plan()
    fleet.settle()
    if fleet.fleet.round is not None and fleet.round.phase is Phase.PAUSING:
        fleet.answers("e2", Call.PAUSE, True)
    fleet.durable()
    fleet.says(rank("e2"), Exposed(round=fleet.round.name))
    return fleet.round


def closed(fleet: Any, **more: Any) -> Closed:
    sent = PeerTransfer(rank("e2"), BYTES_PER_EDGE, 1, 0.01, fleet.digest)
    return Closed(round=fleet.round.name, peers=(msgspec.structs.replace(sent, **more),))


def test_an_engine_that_is_behind_is_fed_by_one_that_serves(drive: Any) -> None:
    fleet = behind(drive)
    (wanted,) = feeds(fleet)
    assert [party.member for party in wanted.sources] == [rank("e0")]
    assert [party.member for party in wanted.targets] == [rank("e2")]
    going = lends(fleet)
    assert (going.catch_up, going.lenders, going.writers) == (True, {"e2": "e0"}, {rank("e0"): (rank("e2"),)})
    assert (going.lent, going.quorum) == ({rank("e2"): fleet.digest}, 1)
    (dirty,) = [record for record in fleet.written() if isinstance(record, LiveDirty) and "e0/0" in record.writers]
    assert (dirty.writers["e0/0"].engine, dirty.writers["e0/0"].targets) == ("e0", {"e2/0": 300})
    (grant,) = fleet.sent(rank("e0"), Grant)
    assert (grant.version, grant.members) == (VERSION, (rank("e2"),))
    fleet.says(rank("e0"), closed(fleet))
    fleet.says(rank("e2"), fleet.verified())
    fleet.durable()
    fleet.answers("e2", Call.SWITCH, True)
    fleet.says(rank("e2"), Left(round=going.name, status=EngineStatus(applied=VERSION)))
    fleet.answers("e2", Call.RESUME, False)
    fleet.durable()
    assert fleet.fleet.round is None
    row = [record for record in fleet.written() if isinstance(record, RoundEnded)][-1]
    assert (row.outcome, row.kind, row.lenders, row.bytes) == ("committed", "catch-up", {"e2": "e0"}, BYTES_PER_EDGE)
    commits = [record.sequence for record in fleet.written() if isinstance(record, Committed)]
    assert commits == [1, 1], "it is one commit"
    assert fleet.fleet.feed is None
    assert fleet.sent(rank("e0"), Connect) == [NOTHING], "its edges are not kept"


def test_a_borrower_gets_the_trainers_edges_back_when_it_is_over(drive: Any) -> None:
    fleet = behind(drive, trainer=True)
    trainers, feed = [command for command in fleet.commands if isinstance(command, MakePlan)][-2:]
    assert (trainers.lends, feed.lends) == (False, True)
    fleet.happens(PlanReady(fleet.id(), trainers.number, plan_facts(trainers)))
    fleet.happens(PlanReady(fleet.id(), feed.number, plan_facts(feed), True))
    fleet.passes(0.1)
    assert "feed" in fleet.fleet.agents[rank("e2")].delivered
    assert "feed" not in fleet.fleet.agents[rank("e0")].delivered, "it lends beside being written to"
    fleet.fleet.policy = dataclasses.replace(fleet.fleet.policy, fan_out="trainer")
    fleet.passes(0.1)
    fleet.passes(0.1)
    assert fleet.fleet.feed is None
    assert "feed" not in fleet.fleet.agents[rank("e2")].delivered


def test_who_was_sent_other_edges_has_not_confirmed_the_ones_before(drive: Any) -> None:
    """Else a round by the trainer's edges begins with a rank that runs the feed's by the time of the grant."""
    fleet = behind(drive, trainer=True)
    trainers, feed = [command for command in fleet.commands if isinstance(command, MakePlan)][-2:]
    fleet.happens(PlanReady(fleet.id(), trainers.number, plan_facts(trainers)))
    fleet.passes(0.1)
    borrower = fleet.fleet.agents[rank("e2")]
    own = borrower.delivered
    fleet.says(rank("e2"), Ready(fingerprint=own))
    assert fleet.fleet.is_confirmed(rank("e2"))
    fleet.happens(PlanReady(fleet.id(), feed.number, plan_facts(feed), True))
    fleet.passes(0.1)
    lent = borrower.delivered
    assert lent != own
    assert not fleet.fleet.is_confirmed(rank("e2"))
    fleet.fleet.policy = dataclasses.replace(fleet.fleet.policy, fan_out="trainer")
    fleet.passes(0.1)
    fleet.passes(0.1)
    fleet.says(rank("e2"), Ready(fingerprint=lent))
    assert borrower.delivered == own
    assert not fleet.fleet.is_confirmed(rank("e2")), "the answer to what it was sent before"
    fleet.says(rank("e2"), Ready(fingerprint=own))
    assert fleet.fleet.is_confirmed(rank("e2"))


@pytest.mark.parametrize(("fan_out", "targets"), [("auto", ["e2"]), ("peers", [])])
def test_where_nobody_lends_the_trainer_writes_if_it_may(drive: Any, fan_out: str, targets: list[str]) -> None:
    fleet = behind(drive, trainer=True, fan_out=fan_out, reads_only=ENGINES)
    assert feeds(fleet) == []
    assert conditions.targets(fleet.fleet, VERSION, fleet.now) == targets
    why = "ready" if targets else "fan_out: peers, and none that serves it holds the same"
    assert conditions.why_not(fleet.fleet, "e2", fleet.now) == why


def test_what_is_lent_the_trainer_does_not_write(drive: Any) -> None:
    fleet = behind(drive, trainer=True)
    assert conditions.targets(fleet.fleet, VERSION, fleet.now) == []
    assert conditions.why_not(fleet.fleet, "e2", fleet.now) == "e0 lends it what it serves"


@pytest.mark.parametrize("fan_out", ["trainer", "auto", "peers"])
def test_fan_out_says_who_writes(drive: Any, fan_out: str) -> None:
    fleet = behind(drive, fan_out=fan_out)
    assert len(feeds(fleet)) == (fan_out != "trainer")


@pytest.mark.parametrize("alike", [True, False])
def test_of_a_pair_all_borrow_or_none(drive: Any, alike: bool) -> None:
    fleet = behind(drive, pairs=(("e1", "e2"),))
    fleet.fleet.feed = None
    fleet.loses_engine("e1")
    fleet.settle()
    before = len(feeds(fleet))
    fleet.connect(rank("e1"), incarnation=301)
    layout = fleet.announcement("e1").layout
    other = layout if alike else msgspec.structs.replace(layout, tensors=(Tensor("w", "int8", (1,)),))
    fleet.says(rank("e1"), Announce(layout=other, lends_name="lends"))
    fleet.settle()
    fed = [party.member.engine for feed in feeds(fleet)[before:] for party in feed.targets]
    assert fed == (["e1", "e2"] if alike else [])


def test_nothing_is_lent_while_the_operator_lets_no_round_begin(drive: Any) -> None:
    fleet = behind(drive)
    fleet.happens(MaintenanceAsked(fleet.id(), "ann", "", True))
    assert fleet.fleet.feed is None
    fleet.happens(MaintenanceAsked(fleet.id(), "ann", "", False))
    assert fleet.fleet.feed is not None


def test_no_plan_between_two_engines_passes_the_lender_over(drive: Any) -> None:
    fleet = behind(drive)
    fleet.happens(PlanRejected(fleet.id(), feeds(fleet)[-1].number, "its landing is too small", "e2", lends=True))
    assert fleet.fleet.passed_over["e2", "e0"][1] == "its landing is too small"
    assert [party.member for party in feeds(fleet)[-1].sources] == [rank("e1")]
    assert not fleet.fleet.engines["e2"].misfit, "it may fit the trainer all the same"


def test_an_edge_that_stays_dead_passes_the_lender_over(drive: Any) -> None:
    fleet = behind(drive)
    wanted = feeds(fleet)[-1]
    facts = plan_facts(wanted)
    fleet.happens(PlanReady(fleet.id(), wanted.number, facts, True))
    fleet.passes(0.1)
    dead = (EdgeFailure(rank("e2"), "it does not answer"),)
    fleet.says(rank("e0"), Ready(fingerprint=facts.connects[rank("e0")].fingerprint, failed=dead))
    fleet.says(rank("e2"), Ready(fingerprint=facts.connects[rank("e2")].fingerprint))
    assert fleet.fleet.round is None
    fleet.passes(31.0)
    assert "the edge between e0/0 and e2/0 is dead: it does not answer" in fleet.fleet.passed_over["e2", "e0"][1]


def test_a_lender_that_is_lost_ends_the_round(drive: Any) -> None:
    fleet = behind(drive)
    going = lends(fleet)
    fleet.loses(rank("e0"))
    fleet.passes(6.0)
    assert fleet.fleet.round is not going
    assert (going.trouble.fault, "e0/0 was lost" in going.reason) == ("engine", True)
    assert len(feeds(fleet)) == 1, "nobody lends to e2 while it is within reach of e0"
    assert fleet.fleet.tainted("e2")
    assert fleet.sent(rank("e2"), Abort)


def hangs(fleet: Any) -> Any:
    """A round in which what e0 lends to e2 never ends; then it is over, and e0 has not closed."""
    going = lends(fleet)
    why = (EdgeFailure(rank("e2"), "nothing has moved for 30 s"),)
    fleet.says(rank("e0"), Ready(fingerprint=fleet.fleet.agents[rank("e0")].lends, failed=why))
    return going


def test_an_edge_of_a_lender_that_hangs_ends_the_round_at_once(drive: Any) -> None:
    fleet = behind(drive)
    going = hangs(fleet)
    assert fleet.fleet.round is None
    assert going.engines["e2"].left_out == "e0/0 cannot write to e2/0: nothing has moved for 30 s"
    assert fleet.sent(rank("e0"), Abort)
    assert fleet.fleet.tainted("e2") == [(rank("e0"), going.name)]


def test_a_lender_is_told_by_which_endpoint_those_are_reached_that_it_may_still_write_to(drive: Any) -> None:
    fleet = behind(drive)
    going = hangs(fleet)
    fleet.passes(0.1)
    [told] = fleet.sent(rank("e0"), Connect)
    assert [(peer.member, peer.incarnation, peer.endpoint_name) for peer in told.peers] == [(rank("e2"), 300, "")]
    assert (told.lends, told.copies, told.expected_bytes) == (True, b"", 0)
    fleet.says(rank("e2"), Announce(layout=fleet.announcement("e2").layout, endpoint_name="another", endpoint=b"card"))
    again = fleet.sent(rank("e0"), Connect)[-1]
    assert [(peer.endpoint_name, peer.endpoint) for peer in again.peers] == [("another", b"card")]
    assert again.fingerprint != told.fingerprint
    fleet.says(rank("e0"), Ready(fingerprint=again.fingerprint))
    fleet.says(rank("e0"), Closed(round=going.name))
    fleet.passes(0.1)
    assert fleet.sent(rank("e0"), Connect) == [told, again, NOTHING]
    assert fleet.fleet.tainted("e2") == []


def test_a_lender_that_connects_again_is_told_again_that_it_lends_or_that_it_does_no_more(drive: Any) -> None:
    fleet = behind(drive)
    fleet.plan()
    confirmed = fleet.fleet.agents[rank("e0")].lends
    fleet.connect(rank("e0"), EngineStatus(applied=VERSION))
    agent = fleet.fleet.agents[rank("e0")]
    assert (agent.lends, agent.lends_delivered) == (confirmed, ""), "what it has confirmed holds in the round"
    fleet.happens(MaintenanceAsked(fleet.id(), "ann", "", True))
    assert fleet.sent(rank("e0"), Connect) == []
    fleet.loses_engine("e2")
    fleet.passes(6.0)
    assert fleet.fleet.round is None
    assert fleet.sent(rank("e0"), Connect) == [NOTHING]


def test_who_lends_is_asked_for_another_endpoint_when_it_is_done(drive: Any) -> None:
    fleet = behind(drive, trainer=True, fan_out="peers")
    going = lends(fleet)
    writer = next(iter(fleet.fleet.trainer_ranks.values()))
    writer.dead_edges = {rank("e0"): "no answer", rank("e1"): "no answer"}
    for _ in range(2):
        fleet.passes(fleet.policy.patience)
    assert fleet.fleet.round is going
    assert len(fleet.sent(rank("e1"), Renew)) == 1
    assert fleet.sent(rank("e0"), Renew) == [], "another endpoint is another layout, and ends what it lends"


def test_a_lender_whose_memory_is_torn_meanwhile_ends_the_round(drive: Any) -> None:
    fleet = behind(drive)
    going = lends(fleet)
    fleet.says(rank("e0"), Left(round=going.name, status=EngineStatus(applied=VERSION, torn=True)))
    assert going.reason == f"e0/0 holds {VERSION}, torn now"
    assert fleet.sent(rank("e0"), Abort)[0].torn is False


def test_what_the_lender_says_that_it_sent_must_be_what_was_decided(drive: Any) -> None:
    fleet = behind(drive)
    going = lends(fleet)
    fleet.says(rank("e0"), closed(fleet, digest=(1, 2)))
    assert fleet.fleet.round is not going
    assert going.reason.startswith("e0 has lent e2/0 bytes of digest 00000000000000010000000000000002, and ")


def test_what_has_landed_is_compared_with_the_journal_and_not_with_the_lenders_word(drive: Any) -> None:
    fleet = behind(drive)
    going = lends(fleet)
    going.lent[rank("e2")] = (5, 6)
    fleet.says(rank("e0"), closed(fleet, digest=(5, 6)))
    fleet.says(rank("e2"), fleet.verified())
    assert "differs from what was lent" in going.reason


def test_no_grant_to_lend_what_is_not_served(drive: Any) -> None:
    fleet = behind(drive)
    fleet.plan()
    fleet.settle()
    fleet.answers("e2", Call.PAUSE, True)
    fleet.durable()
    fleet.fleet.agents[rank("e0")].status = EngineStatus(applied=Version(7, 9))
    with pytest.raises(InvariantViolation, match=r"S1: grant 1\.2 to e0/0, which does not hold"):
        fleet.says(rank("e2"), Exposed(round=fleet.round.name))


def test_a_restarted_daemon_knows_that_a_lender_may_still_write(drive: Any) -> None:
    fleet = behind(drive)
    lends(fleet)
    again, _ = start(fleet.policy, "journal", fleet.written(), 0.0)
    assert [writer for writer, _ in again.unclosed] == [rank("e0")]
    assert again.tainted("e2")


def test_a_lender_that_is_announced_anew_is_planned_anew(drive: Any) -> None:
    fleet = behind(drive)
    fleet.plan()
    agent = fleet.fleet.agents[rank("e0")]
    assert agent.lends
    agent.announces(Announce(layout=Layout((), (), b""), lends_name="anew"))
    assert (agent.lends, agent.lends_delivered) == ("", "")


def test_another_layout_of_the_same_process_is_fed_by_another_plan(drive: Any) -> None:
    fleet = behind(drive)
    assert len(feeds(fleet)) == 1
    fleet.says(rank("e0"), Announce(layout=fleet.announcement("e0").layout, lends_name="by another endpoint"))
    assert len(feeds(fleet)) == 2
    assert feeds(fleet)[-1].sources[0].announce.lends_name == "by another endpoint"


def test_each_is_sent_its_part_once(drive: Any) -> None:
    fleet = behind(drive)
    fleet.plan()
    fleet.passes(0.1)
    sent = [
        command for command in fleet.commands if isinstance(command, SendPlan) and "feed" in command.connect.fingerprint
    ]
    assert sorted(str(command.member) for command in sent) == ["e0/0", "e2/0"]
    assert {command.member: command.connect.lends for command in sent} == {rank("e0"): True, rank("e2"): False}


def _another(fleet: Any, engine: str) -> None:
    fleet.loses(rank(engine))
    fleet.connect(rank(engine), incarnation=900)


@pytest.mark.parametrize(
    "happens",
    [
        lambda fleet: _another(fleet, "e0"),
        lambda fleet: _another(fleet, "e2"),
        lambda fleet: fleet.happens(RetryAsked(fleet.id(), "ann", "")),
        lambda fleet: fleet.passes(1000.0),
    ],
)
def test_who_was_passed_over_is_asked_anew(drive: Any, happens: Callable[[Any], None]) -> None:
    """When its time is over, another process has taken its place or the borrower's, or the operator says so."""
    fleet = behind(drive)
    fleet.fleet.passed_over = {("e2", "e0"): (999.0, "its edge was dead")}
    happens(fleet)
    assert fleet.fleet.passed_over == {}
