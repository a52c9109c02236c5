"""The two rounds: everybody announces its layout; each gets only its own edges, warms them up and confirms them."""

from typing import Final

from weightsync.orchestrator.core import members
from weightsync.orchestrator.core.commands import Announced, MakePlan, OpenGroup, SendPlan
from weightsync.orchestrator.core.events import PlanReady, PlanRejected
from weightsync.orchestrator.core.state import ConnectedAgent, Fleet
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.codec import cut
from weightsync.orchestrator.protocol.layout import LeftOut
from weightsync.orchestrator.protocol.messages import Announce, Ready, TcpStoreRendezvous
from weightsync.orchestrator.protocol.names import Member

SHOWN: Final = 8
"""Tensors that a sentence names; ``plan explain`` names all."""


def announced(turn: Turn, agent: ConnectedAgent, message: Announce) -> None:
    """Round 1 of one agent."""
    fleet = turn.fleet
    if agent.announce is not None:
        fleet.planned_for = frozenset()  # the plan was made for its other layout
    agent.announces(message)
    for engine in fleet.engines.values():
        # A misfit is of two layouts together, and one of the two is another now. (The trainer is none of the two
        # where engines contradict one another.)
        if engine.name == agent.member.engine or (agent.member.role == "trainer" and engine.name not in fleet.unlike):
            engine.misfit = ""
    if agent.member.role == "inference":
        fleet.needs_of = frozenset()
        _say_left_out(turn, agent.member, message.layout.left_out)


def _say_left_out(turn: Turn, member: Member, left_out: tuple[LeftOut, ...]) -> None:
    """Once for each engine, and for each of its ranks that leaves out something else."""
    said = turn.fleet.engines[member.engine].left_out_said
    if left_out and left_out not in said.values():
        parts = [
            f"{entry.count} {entry.kind} ({entry.reason}): {', '.join(entry.names[:SHOWN])}"
            f"{', …' if entry.count > min(SHOWN, len(entry.names)) else ''}"
            for entry in left_out
        ]
        turn.say(cut(f"{member}: rounds leave out {'; '.join(parts)}"))
    said[member.rank] = left_out


def confirmed(agent: ConnectedAgent, message: Ready) -> None:
    """Round 2 of one agent. An outdated confirmation is not one."""
    agent.fingerprint = message.fingerprint


def evaluate(turn: Turn) -> None:
    """Plan when the set of members changed; send each member the Connect it has not received. Never within a round."""
    fleet = turn.fleet
    if fleet.round is not None or fleet.planning:
        return
    if fleet.trainers_whole():
        _plan(turn)
    if fleet.plan is not None and not fleet.planning:
        _send_plans(turn)
        _note_complete(turn)


def _plan(turn: Turn) -> None:
    fleet = turn.fleet
    usable = list(fleet.usable())
    expected = [name for name, engine in fleet.engines.items() if not engine.misfit]
    first = fleet.plan is None
    if not usable or (first and len(usable) < len(expected) and turn.now < fleet.started + fleet.policy.join):
        return
    sources = fleet.trainers()
    targets = [agent for name in usable for agent in fleet.ranks_of(name)]
    everybody = frozenset((a.member, a.hello.incarnation, a.connection) for a in [*sources, *targets])
    if everybody == fleet.planned_for:
        return
    fleet.planned_for = everybody
    fleet.planning = True
    fleet.plan_error = ""
    fleet.plan_number += 1
    turn.do(MakePlan(fleet.plan_number, _parties(sources), _parties(targets)))


def _parties(agents: list[ConnectedAgent]) -> tuple[Announced, ...]:
    return tuple(Announced(a.member, a.hello.incarnation, a.announce) for a in agents if a.announce is not None)


def _send_plans(turn: Turn) -> None:
    fleet = turn.fleet
    assert fleet.plan is not None
    for member, connect in fleet.plan.connects.items():
        agent = fleet.agents.get(member)
        if agent is None or agent.announce is None:
            continue
        planned = (member, agent.hello.incarnation, agent.connection) in fleet.planned_for
        if planned and agent.delivered != connect.fingerprint:
            agent.delivered = connect.fingerprint
            turn.do(SendPlan(member, connect))


def _note_complete(turn: Turn) -> None:
    fleet = turn.fleet
    if (
        fleet.plan is None
        or fleet.confirmed_plan == fleet.plan_number
        or not all(map(fleet.is_confirmed, fleet.plan.connects))
    ):
        return
    fleet.confirmed_plan = fleet.plan_number
    seconds = turn.now - fleet.planned_at
    turn.say(f"rendezvous complete: {len(fleet.plan.connects)} agents on plan {fleet.plan.root[:12]}, {seconds:.2f} s")


def planned(turn: Turn, event: PlanReady) -> None:
    """The planner is done."""
    fleet = turn.fleet
    if event.number != fleet.plan_number:
        return
    fleet.planning = False
    before = fleet.plan.unneeded if fleet.plan is not None else ()
    fleet.plan = event.facts
    fleet.planned_at = turn.now
    total = sum(event.facts.flows.values())
    turn.say(
        f"plan {event.facts.root[:12]}: {total} bytes over {len(event.facts.flows)} edges, "
        f"every destination byte covered once, {event.facts.seconds:.2f} s"
    )
    unneeded = event.facts.unneeded
    if unneeded and unneeded != before:
        shown = f"{', '.join(unneeded[:SHOWN])}{', …' if len(unneeded) > SHOWN else ''}"
        turn.say(f"the trainer has {len(unneeded)} tensors that no engine needs: {shown}", "warning")


def rejected(turn: Turn, event: PlanRejected) -> None:
    """The layouts do not fit: leave the engine out that is to blame, or wait for other layouts."""
    fleet = turn.fleet
    if event.number != fleet.plan_number:
        return
    fleet.planning = False
    fleet.plan = None  # the last one was for other layouts
    turn.say(f"no plan: {event.reason}", "error")
    if event.engine in fleet.engines:
        engine = fleet.engines[event.engine]
        engine.misfit = event.reason
        engine.misfit_fault = event.fault
        fleet.planned_for = frozenset()  # plan again at once, without this engine
    else:
        fleet.plan_error = event.reason


def obstacle(fleet: Fleet) -> str:
    """Why there will be no plan with the present layouts; empty while there may be one."""
    if fleet.plan_error:
        return fleet.plan_error
    misfits = [engine.misfit for engine in fleet.engines.values() if engine.misfit]
    return misfits[0] if misfits and len(misfits) == len(fleet.engines) else ""


def gather_group(turn: Turn) -> None:
    """``rendezvous: tcpstore``: once everybody is here, open a group and tell all their ranks in it.

    As for the first plan, an engine that does not fit is not waited for, one that does not come until it is overdue.
    """
    fleet = turn.fleet
    address = fleet.policy.group
    if address is None or fleet.round is not None:
        return
    fitting = [fleet.ranks_of(name) for name, engine in fleet.engines.items() if not engine.misfit]
    whole = [ranks for ranks in fitting if ranks and len(ranks) == ranks[0].hello.world]
    patient = turn.now < fleet.started + fleet.policy.join
    if not whole or (len(whole) < len(fitting) and patient) or len(fleet.trainers()) != fleet.trainer_world():
        return
    agents = [*fleet.trainers(), *(agent for ranks in whole for agent in ranks)]
    group = tuple((agent.member, agent.connection) for agent in agents)
    if group == fleet.group:
        return
    fleet.group = group
    size = len(agents) + 1
    store = TcpStoreRendezvous(address.host, address.port, 0, size, address.timeout_seconds)
    turn.do(OpenGroup(store, group))
    for rank, agent in enumerate(agents, start=1):
        place = TcpStoreRendezvous(address.host, address.port, rank, size, address.timeout_seconds)
        agent.announces(None)
        turn.send(agent.member, members.welcome(fleet, place))
