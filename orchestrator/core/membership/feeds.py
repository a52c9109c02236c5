"""Feeds: plans by which engines that catch up take the committed version from engines that serve it (``fan_out``).

A feed is there for as long as somebody is behind and somebody lends. Its borrowers run its edges in the place of the
trainer's, which they are sent again when it is over; its lenders run them beside theirs. Like all that is swept it
follows from the fleet anew after every event, and a round changes nothing of it.
"""

from typing import Final

import msgspec
from weightsync.orchestrator.core import conditions
from weightsync.orchestrator.core.commands import MakePlan, SendPlan
from weightsync.orchestrator.core.events import Call, PlanReady, PlanRejected
from weightsync.orchestrator.core.membership.rendezvous import parties
from weightsync.orchestrator.core.round import blame, lending
from weightsync.orchestrator.core.round.begin import begin
from weightsync.orchestrator.core.state import ConnectedAgent, Feed, Fleet
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.edges import Peer, reached_fingerprint
from weightsync.orchestrator.protocol.messages import Connect

NOTHING: Final = Connect(fingerprint="", root="", peers=(), copies=b"", expected_bytes=0, lends=True)
"""The part of a lender in no feed."""


def evaluate(turn: Turn) -> None:
    """Ask for a plan when who borrows or lends has changed; send it; begin the round when it is due."""
    fleet = turn.fleet
    if fleet.round is not None:
        return
    fleet.passed_over = {pair: told for pair, told in fleet.passed_over.items() if turn.now < told[0]}
    lenders, version = _wanted(fleet, turn.now), fleet.memory.committed
    if not lenders or version is None:
        fleet.feed = None
        _part(turn)
        return
    targets = [agent for name in lenders for agent in fleet.ranks_of(name)]
    sources = [agent for name in dict.fromkeys(lenders.values()) for agent in fleet.ranks_of(name)]
    members = frozenset((agent.member, agent.hello.incarnation) for agent in [*sources, *targets])
    feed = fleet.feed
    if feed is None or (feed.version, feed.lenders, feed.members) != (version, lenders, members):
        fleet.feed_number += 1
        fleet.feed = Feed(fleet.feed_number, version, lenders, members)
        turn.do(MakePlan(fleet.feed_number, parties(sources), parties(targets), lends=True))
    elif feed.plan is not None:
        _send(turn, feed)
        _begin(turn, feed)


def _wanted(fleet: Fleet, now: float) -> dict[str, str]:
    """Engine that is behind → who lends to it; of a pair, all that are behind, or none.

    One unit and its lenders, and whoever else takes from them alone: by one plan, any of them may write to any.
    """
    version = fleet.memory.committed
    if fleet.policy.fan_out == "trainer" or version is None or fleet.stopping or fleet.memory.maintenance is not None:
        return {}
    staged = conditions.staged(fleet)
    if staged is not None and not fleet.memory.settled(staged):
        return {}  # which brings everybody to something newer
    behind = conditions.behind(fleet, version, now)
    found = {name: lender for name in behind if (lender := lending.lender_of(fleet, name, now)) is not None}
    late = {name: [other for other in fleet.unit(name) if other in behind] for name in found}
    units = [unit for unit in late.values() if all(other in found for other in unit)]
    lenders = {found[name] for name in units[0]} if units else set()
    return {name: found[name] for unit in units for name in unit if all(found[other] in lenders for other in unit)}


def _part(turn: Turn) -> None:
    """Nobody borrows any more: edges to engines that may end are not kept."""
    writers = {writer for writer, _ in turn.fleet.unclosed}
    for agent in turn.fleet.agents.values():
        if agent.member.role == "inference" and (agent.lends_delivered or agent.lends or agent.member in writers):
            rest = _rest(turn.fleet, agent)
            if rest.fingerprint != agent.lends_delivered or (agent.lends and agent.lends != rest.fingerprint):
                agent.lends_delivered, agent.lends = rest.fingerprint, ""
                known = agent.unlent
                agent.unlent = {peer.member: known.get(peer.member, "it has not ended") for peer in rest.peers}
                turn.send(agent.member, rest)


def _rest(fleet: Fleet, lender: ConnectedAgent) -> Connect:
    """Of a lender in no feed: how those are reached now that something it wrote may still be on its way to. Of one that
    is reached by another endpoint than the one written to, the lender knows by this that it has ended."""
    writer = lender.member, lender.hello.incarnation
    left = {target for (member, _), pending in fleet.unclosed.items() if (member, pending.incarnation) == writer
            for target in pending.targets}  # fmt: skip
    agents = [fleet.agents[target] for target in sorted(left) if target in fleet.agents]
    peers = tuple(
        Peer(agent.member, agent.hello.incarnation, agent.announce.endpoint_name, agent.announce.endpoint, ())
        for agent in agents
        if agent.announce is not None
    )
    if not peers:
        return NOTHING
    return msgspec.structs.replace(NOTHING, fingerprint=reached_fingerprint("", peers), peers=peers)


def planned(turn: Turn, event: PlanReady) -> None:
    """The planner is done."""
    feed = turn.fleet.feed
    if feed is not None and feed.number == event.number:
        feed.plan, feed.planned_at = event.facts, turn.now


def rejected(turn: Turn, event: PlanRejected) -> None:
    """There is no plan between these engines."""
    feed = turn.fleet.feed
    if feed is not None and feed.number == event.number:
        _pass_over(turn, feed, dict.fromkeys(feed.lenders, event.reason))


def _send(turn: Turn, feed: Feed) -> None:
    """Each member its own part, unless it has it."""
    assert feed.plan is not None
    for member, connect in feed.plan.connects.items():
        agent = turn.fleet.agents.get(member)
        if agent is None or connect.fingerprint == (agent.lends_delivered if connect.lends else agent.delivered):
            continue
        agent.is_sent(connect)
        turn.do(SendPlan(member, connect))


def _begin(turn: Turn, feed: Feed) -> None:
    """As soon as all can, or those that can when they have waited for the others."""
    fleet = turn.fleet
    assert feed.plan is not None
    if turn.now < fleet.retry_at.get(feed.version, 0.0):
        return
    late = {name: why for name in feed.lenders for other in fleet.unit(name) if (why := _unready(fleet, feed, other))}
    if late and turn.now < max(feed.planned_at, fleet.ended_at) + fleet.policy.patience:
        return
    ready = [name for name in feed.lenders if name not in late]
    if ready:
        begin(turn, feed.version, ready, True, feed.plan, {name: feed.lenders[name] for name in ready})
    _pass_over(turn, feed, late)


def _pass_over(turn: Turn, feed: Feed, engines: dict[str, str]) -> None:
    for name, why in engines.items():
        blame.pass_over(turn, name, feed.lenders[name], why)


def _unready(fleet: Fleet, feed: Feed, name: str) -> str:
    """What a borrower and all lenders have to do before a round; empty when they can begin, or ``name`` is none."""
    if name not in feed.lenders:
        return ""
    lenders = sorted(set(feed.lenders.values()))
    ranks = [agent for each in (name, *lenders) for agent in fleet.ranks_of(each)]
    late = [str(agent.member) for agent in ranks if not fleet.is_confirmed(agent.member, feed.plan)]
    if late:
        return f"agents that have not confirmed their edges: {conditions.named(late)}"
    for agent in ranks:
        borrows = agent.member.engine == name
        for peer, error in (agent.dead_edges if borrows else agent.unlent).items():
            if borrows or peer.engine == name:
                return f"the edge between {agent.member} and {peer} is dead: {error}"
    busy = [each for each in lenders if fleet.engines[each].calls.keys() & {Call.SWITCH, Call.UPDATE}]
    if fleet.engines[name].calls or busy:
        return f"an answer of {[*busy, name][0]}"
    inside = [str(agent.member) for agent in fleet.ranks_of(name) if agent.status.window is not None]
    return f"workers that are still inside an earlier round: {conditions.named(inside)}" if inside else ""
