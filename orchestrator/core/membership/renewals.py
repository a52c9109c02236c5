"""Engines that a writer does not get through to: asked for another endpoint, which nothing sent before can reach.

A write whose path has gone never ends, and its writer cannot take it back. The target can: its transport drops what
comes for an endpoint that is no more. The writer learns of the new one by its next Connect, says CLOSED, and the engine
is in rounds again. An edge that is dead without a write over it may lead to an address that is no more, too. A writer
is a trainer rank, or a rank that lends; of one that lent and has gone, from another machine, it is enough that there is
another endpoint. Any other writer that has gone could wake up at any time, and may share the target's memory: the
target puts a spare in the place of its landing, too, where it has one, and what the writer could reach is nobody's.
"""

from collections.abc import Iterator, Sequence
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
    outlived = any(pending.outlived for pending in fleet.unclosed.values())
    if not outlived and not any(agent.dead_edges or agent.unlent or agent.renewal for agent in fleet.agents.values()):
        return  # as nearly always
    unreached = list(_unreached(fleet))
    dead = dict(_dead(fleet, unreached))
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
    targets = {target for _, target, _ in unreached}
    for agent in fleet.agents.values():
        if agent.renewal is not None and agent.member not in targets:
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
    whether that takes a spare, which comes last."""
    for agent in fleet.agents.values():
        for target in agent.unreached:
            yield agent.member, target, False
    gone = [(writer, pending) for (writer, _), pending in fleet.unclosed.items() if writer not in fleet.agents]
    for writer, pending in gone:
        for target in pending.targets if writer.role == "inference" else ():
            if target in fleet.agents and is_lost_elsewhere(fleet, writer, pending, fleet.agents[target]):
                yield writer, target, False
    able = [a for a in fleet.agents.values() if a.announce is not None and a.announce.spares] if gone else ()
    for writer, pending in gone:
        for agent in able:
            if may_wake(fleet, writer, pending, agent) and not is_lost_elsewhere(fleet, writer, pending, agent):
                yield writer, agent.member, True


def _dead(fleet: Fleet, unreached: Sequence[tuple[Member, Member, bool]]) -> Iterator[tuple[Member, _Lost]]:
    """Connected workers in no round that some writer does not reach; of one that takes a spare, that comes last."""
    writers = {writer for writer, _, wakes in unreached if not wakes}
    open_to = ((writer, pending.targets) for (writer, _), pending in fleet.unclosed.items() if writer in writers)
    hanging = {(writer, target) for writer, targets in open_to for target in targets}
    for writer, target, wakes in unreached:
        if _may_renew(fleet, fleet.agents.get(target)):
            yield target, _Lost(writer, (writer, target) in hanging, wakes)


def _may_renew(fleet: Fleet, agent: ConnectedAgent | None) -> bool:
    current = fleet.round
    return agent is not None and (
        current is None or not (current.has(agent.member.engine) or agent.member in current.writers)
    )
