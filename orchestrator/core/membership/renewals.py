"""Engines that a writer does not get through to: asked for another endpoint, which nothing sent before can reach.

A write whose path has gone never ends, and its writer cannot take it back. The target can: its transport drops what
comes for an endpoint that is no more. The writer learns of the new one by its next Connect, says CLOSED, and the engine
is in rounds again. An edge that is dead without a write over it may lead to an address that is no more, too. A writer
is a trainer rank, or a rank that lends; of one that lent and has gone, from another machine, it is enough that there is
another endpoint. Any other writer that has gone could wake up at any time, and may share the target's memory: the
target puts a spare in the place of its landing, too, where it has one, and what the writer could reach is nobody's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from weightsync.orchestrator.core.membership.members import is_lost_elsewhere, may_wake
from weightsync.orchestrator.core.state import ConnectedAgent, Fleet, Renewal
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.messages import Renew
from weightsync.orchestrator.protocol.names import Member

LONGEST_WAIT_SECONDS: Final = 600.0
"""Between two endpoints of a worker that nothing gets through to: each has all its writers connect anew."""


def evaluate(turn: Turn) -> None:
    """Ask each worker that a writer does not get through to; again after the patience, then half as often each time."""
    fleet, policy = turn.fleet, turn.fleet.policy
    dead_ends = any(agent.dead_edges or agent.unlent or agent.renewal for agent in fleet.agents.values())
    if not fleet.unclosed and not dead_ends:
        return  # as nearly always
    dead = dict(_dead(fleet))
    for target, lost in dead.items():
        agent = fleet.agents[target]
        known = agent.renewal
        if known is None:
            # Most of what was told to stop ends by itself in a moment; who starts, or starts anew, answers in a while.
            due = turn.now + (policy.probe_interval if lost.hangs and not lost.wakes else policy.patience)
            agent.renewal = Renewal(due, policy.patience)
        elif turn.now >= known.due:
            agent.renewal = Renewal(turn.now + known.wait, min(2 * known.wait, LONGEST_WAIT_SECONDS))
            reason = lost.why(target)
            asked = f"{reason}: {target} is asked for another {'landing' if lost.wakes else 'endpoint'}"
            turn.say(asked, "warning", event="endpoint renewed", engine=target.engine)
            turn.send(target, Renew(reason=reason, spare=lost.wakes))
    for agent in fleet.agents.values():
        if agent.renewal is not None and agent.member not in dead and not _is_dead(fleet, agent.member):
            agent.renewal = None


@dataclass(frozen=True, slots=True)
class _Lost:
    """Why a worker is to be reached otherwise: a write of ``writer`` to it ``hangs``, or may come when that
    ``wakes``."""

    writer: Member
    hangs: bool
    wakes: bool

    def why(self, target: Member) -> str:
        if self.wakes:
            return f"{self.writer} has gone and may still write to {target}"
        return f"what {self.writer} wrote to {target} hangs" if self.hangs else f"{self.writer} does not reach {target}"


def _unreached(fleet: Fleet) -> Iterator[tuple[Member, Member, bool]]:
    """Each writer that is here, and whom it does not reach; each that is gone, what is to be out of its reach, and
    whether that takes a spare."""
    for agent in fleet.agents.values():
        for target in agent.unreached:
            yield agent.member, target, False
    for (writer, _), pending in fleet.unclosed.items():
        for target in pending.targets:
            here = fleet.agents.get(target)
            if here is not None and is_lost_elsewhere(fleet, writer, pending, here):
                yield writer, target, False
            elif here is not None and may_wake(fleet, writer, pending, here):
                yield writer, target, True


def _dead(fleet: Fleet) -> Iterator[tuple[Member, _Lost]]:
    """Connected workers in no round that some writer does not reach; what takes a spare comes last, and is believed."""
    hanging = {(writer, target) for (writer, _), pending in fleet.unclosed.items() for target in pending.targets}
    for writer, target, wakes in sorted(_unreached(fleet), key=lambda found: found[2]):
        if _may_renew(fleet, fleet.agents.get(target)):
            yield target, _Lost(writer, (writer, target) in hanging, wakes)


def _is_dead(fleet: Fleet, target: Member) -> bool:
    return any(target == dead for _, dead, _ in _unreached(fleet))


def _may_renew(fleet: Fleet, agent: ConnectedAgent | None) -> bool:
    current = fleet.round
    return agent is not None and (
        current is None or not (current.has(agent.member.engine) or agent.member in current.writers)
    )
