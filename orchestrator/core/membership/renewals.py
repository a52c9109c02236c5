"""Engines that a writer does not get through to: asked for another endpoint, which nothing sent before can reach.

A write whose path has gone never ends, and its writer cannot take it back. The target can: its transport drops what
comes for an endpoint that is no more. The writer learns of the new one by its next Connect, says CLOSED, and the engine
is in rounds again. An edge that is dead without a write over it may lead to an address that is no more, too. A writer
is a trainer rank, or a rank that lends; of one that lent and has gone, from another machine, it is enough that there is
another endpoint.
"""

from collections.abc import Iterator
from typing import Final

from weightsync.orchestrator.core.membership.members import is_lost_elsewhere
from weightsync.orchestrator.core.state import ConnectedAgent, Fleet, Renewal
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.messages import Renew
from weightsync.orchestrator.protocol.names import Member

LONGEST_WAIT_SECONDS: Final = 600.0
"""Between two endpoints of a worker that nothing gets through to: each has all its writers connect anew."""


def evaluate(turn: Turn) -> None:
    """Ask each worker that a writer does not get through to; again after the patience, then half as often each time."""
    fleet, policy = turn.fleet, turn.fleet.policy
    writes = any(writer.role == "inference" for writer, _ in fleet.unclosed)
    if not writes and not any(agent.dead_edges or agent.unlent or agent.renewal for agent in fleet.agents.values()):
        return  # as nearly always
    dead = dict(_dead(fleet))
    for target, (writer, hangs) in dead.items():
        agent = fleet.agents[target]
        known = agent.renewal
        if known is None:
            # Most of what was told to stop ends by itself in a moment, and who starts answers in a while.
            due = turn.now + (policy.probe_interval if hangs else policy.patience)
            agent.renewal = Renewal(due, policy.patience)
        elif turn.now >= known.due:
            agent.renewal = Renewal(turn.now + known.wait, min(2 * known.wait, LONGEST_WAIT_SECONDS))
            reason = f"what {writer} wrote to {target} hangs" if hangs else f"{writer} does not reach {target}"
            asked = f"{reason}: {target} is asked for another endpoint"
            turn.say(asked, "warning", event="endpoint renewed", engine=target.engine)
            turn.send(target, Renew(reason=reason))
    for agent in fleet.agents.values():
        if agent.renewal is not None and agent.member not in dead and not _is_dead(fleet, agent.member):
            agent.renewal = None


def _unreached(fleet: Fleet) -> Iterator[tuple[Member, Member]]:
    """Each writer that is here, and whom it does not reach; each that is gone, and what is to be out of its reach."""
    for agent in fleet.agents.values():
        for target in agent.unreached:
            yield agent.member, target
    for (writer, _), pending in fleet.unclosed.items():
        for target in pending.targets:
            if target in fleet.agents and is_lost_elsewhere(fleet, writer, pending, fleet.agents[target]):
                yield writer, target


def _dead(fleet: Fleet) -> Iterator[tuple[Member, tuple[Member, bool]]]:
    """Connected workers in no round that some writer does not reach, which one, and whether a write to them hangs."""
    hanging = {(writer, target) for (writer, _), pending in fleet.unclosed.items() for target in pending.targets}
    for writer, target in _unreached(fleet):
        if _may_renew(fleet, fleet.agents.get(target)):
            yield target, (writer, (writer, target) in hanging)


def _is_dead(fleet: Fleet, target: Member) -> bool:
    return any(target == dead for _, dead in _unreached(fleet))


def _may_renew(fleet: Fleet, agent: ConnectedAgent | None) -> bool:
    current = fleet.round
    return agent is not None and (
        current is None or not (current.has(agent.member.engine) or agent.member in current.writers)
    )
