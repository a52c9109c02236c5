"""Engines within reach of bytes that hang: asked for another endpoint, which nothing that was sent before reaches.

A write whose path has gone never ends, and its writer cannot take it back. The target can: its transport drops what
comes for an endpoint that is no more. The writer learns of the new one by its next Connect, says CLOSED, and the engine
is in rounds again.
"""

from collections.abc import Iterator
from dataclasses import replace

from weightsync.orchestrator.core.state import ConnectedAgent, Fleet, Renewal
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.messages import Renew
from weightsync.orchestrator.protocol.names import Member, RoundName


def evaluate(turn: Turn) -> None:
    """Ask each worker that a writer has given up for a new endpoint: once a round and connection."""
    fleet = turn.fleet
    for target, writer, name in _hanging(fleet):
        agent = fleet.agents[target]
        known = agent.renewal
        if known is None or known.round < name:
            # Most of what was told to stop ends by itself in a moment.
            agent.renewal = Renewal(name, turn.now + fleet.policy.probe_interval)
        elif known.round == name and not known.asked and turn.now >= known.due:
            agent.renewal = replace(known, asked=True)
            reason = f"what {writer} wrote to {target} in round {name} hangs"
            turn.say(f"{reason}: {target} is asked for another endpoint", "warning")
            turn.send(target, Renew(reason=reason))


def _hanging(fleet: Fleet) -> Iterator[tuple[Member, Member, RoundName]]:
    """Connected workers in no round, and who has given up a write to them that has not ended, of which round."""
    for (writer, name), pending in fleet.unclosed.items():
        source = fleet.agents.get(writer)
        if source is None or source.hello.incarnation != pending.incarnation:
            continue  # nobody would hear of the new endpoint
        for target, incarnation in pending.targets.items():
            if target in source.dead_edges and _may_renew(fleet, fleet.agents.get(target), incarnation):
                yield target, writer, name


def _may_renew(fleet: Fleet, agent: ConnectedAgent | None, incarnation: int) -> bool:
    if agent is None or agent.hello.incarnation != incarnation:
        return False
    return fleet.round is None or not fleet.round.has(agent.member.engine)
