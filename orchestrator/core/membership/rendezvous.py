"""The two rounds: everybody announces its layout; each gets only its own edges, warms them up and confirms them."""

from typing import Final

from weightsync.orchestrator.core import standby
from weightsync.orchestrator.core.commands import Announced, MakePlan, OpenGroup, SendPlan
from weightsync.orchestrator.core.events import PlanReady, PlanRejected
from weightsync.orchestrator.core.membership import members
from weightsync.orchestrator.core.state import ConnectedAgent, Fleet
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.layout import LeftOut
from weightsync.orchestrator.protocol.messages import Announce, Ready, TcpStoreRendezvous
from weightsync.orchestrator.protocol.names import Member
from weightsync.orchestrator.protocol.text import clean

SHOWN: Final = 8
"""Tensors that a sentence names; ``plan explain`` names all."""


def announced(turn: Turn, agent: ConnectedAgent, message: Announce) -> bool:
    """Round 1 of one agent. Whether that is news: after a reconnect, an agent says again what it has said."""
    fleet = turn.fleet
    if agent.announce == message:
        return False
    if agent.announce is not None:
        fleet.planned_for = frozenset()  # the plan was made for its other layout …
        fleet.feed = None  # … and so may this one be
        if agent.announce.endpoint_name != message.endpoint_name:
            members.renewed(turn, agent, spared=message.spares < agent.announce.spares)
    agent.announces(message)
    for engine in fleet.engines.values():
        # A misfit is of two layouts together, and one of the two is another now. (The trainer is none of the two
        # where engines contradict one another.)
        if engine.name == agent.member.engine or (agent.member.role == "trainer" and engine.name not in fleet.unlike):
            engine.misfit = ""
    if agent.member.role == "inference":
        fleet.engines[agent.member.engine].kept = None  # of another process, layout or landing
        fleet.needs_of = frozenset()
        _judge_modes(turn, agent.member.engine)
        _say_left_out(turn, agent.member, message.layout.left_out)
        fleet.touch(agent.member.engine)
    return True


def _judge_modes(turn: Turn, engine: str) -> None:
    """An engine whose ranks do not land in one mode would change in parts."""
    disagreement = standby.disagreement(turn.fleet, engine)
    if disagreement:
        state = turn.fleet.engines[engine]
        state.misfit, state.misfit_fault = disagreement, "config"
        turn.say(f"{engine} takes part in no round: {disagreement}", "error", event="engine misfit", engine=engine)


def _say_left_out(turn: Turn, member: Member, left_out: tuple[LeftOut, ...]) -> None:
    """Once for each engine, and for each of its ranks that leaves out something else."""
    said = turn.fleet.engines[member.engine].left_out_said
    if left_out and left_out not in said.values():
        parts = [
            f"{entry.count} {entry.kind} ({entry.reason}): {', '.join(entry.names[:SHOWN])}"
            f"{', …' if entry.count > min(SHOWN, len(entry.names)) else ''}"
            for entry in left_out
        ]
        turn.say(
            clean(f"{member}: rounds leave out {'; '.join(parts)}"), event="tensors left out", engine=member.engine
        )
    said[member.rank] = left_out


def confirmed(turn: Turn, agent: ConnectedAgent, message: Ready) -> None:
    """Round 2 of one agent. An outdated confirmation is not one."""
    dead = {failure.peer: failure.error for failure in message.failed}
    if message.fingerprint == agent.delivered:
        before, agent.fingerprint, agent.dead_edges = agent.dead_edges, message.fingerprint, dead
    elif message.fingerprint == agent.lends_delivered:
        before, agent.lends, agent.unlent = agent.unlent, message.fingerprint, dead
    elif message.fingerprint == agent.relayed_delivered:
        before, agent.relayed, agent.unrelayed = agent.unrelayed, message.fingerprint, dead
    else:
        return
    for peer in [peer for peer in dead if peer not in before]:
        turn.say(
            f"the edge between {agent.member} and {peer} is dead: {dead[peer]}",
            "warning",
            event="edge dead",
            engine=peer.engine or agent.member.engine,
        )


def awaited(turn: Turn, names: list[str]) -> list[str]:
    """Engines that the first plan still waits for, given those that are here.

    Enough for a commit are waited for without end, the others for as long as ``patience`` from then on; after the first
    commit only those that were in the last one, since the journal knows that the others were not there.
    """
    fleet = turn.fleet
    if fleet.memory.committed is None:
        expected = [name for name in fleet.expected() if not fleet.engines[name].misfit]
    else:
        live = fleet.memory.live
        expected = [name for name in fleet.expected() if name in live and not fleet.engines[name].misfit]
    here = set(names) & set(fleet.expected())
    late = [name for name in expected if name not in here]
    if len(here) < fleet.quorum():
        fleet.quorum_since = None
        return late or [name for name in fleet.expected() if name not in here]
    if fleet.quorum_since is None:
        fleet.quorum_since = turn.now
    return late if turn.now < fleet.quorum_since + fleet.policy.patience else []


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
    if not usable or (fleet.plan is None and awaited(turn, usable)):
        return
    sources = fleet.trainers()
    targets = [agent for name in usable for agent in fleet.ranks_of(name)]
    everybody = frozenset((a.member, a.hello.incarnation) for a in [*sources, *targets])
    if everybody <= fleet.planned_for:
        return  # who is away may come back as it was, and until then nobody is granted anything towards it
    fleet.planned_for = everybody
    fleet.planning = True
    fleet.plan_error = ""
    fleet.plan_number += 1
    turn.do(MakePlan(fleet.plan_number, parties(sources), parties(targets)))


def parties(agents: list[ConnectedAgent]) -> tuple[Announced, ...]:
    """Those of the agents that have announced, for a plan."""
    return tuple(Announced(a.member, a.hello.incarnation, a.announce) for a in agents if a.announce is not None)


def _send_plans(turn: Turn) -> None:
    fleet = turn.fleet
    assert fleet.plan is not None
    borrowing = fleet.feed.borrowers if fleet.feed is not None and fleet.feed.plan is not None else {}
    for member, connect in fleet.plan.connects.items():
        agent = fleet.agents.get(member)
        if agent is None or agent.announce is None or member.engine in borrowing:
            continue
        if agent.delivered != connect.fingerprint and (member, agent.hello.incarnation) in fleet.planned_for:
            agent.is_sent(connect)
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
    turn.say(
        f"rendezvous complete: {len(fleet.plan.connects)} agents on plan {fleet.plan.root[:12]}, {seconds:.2f} s",
        event="rendezvous complete",
    )


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
        f"every destination byte covered once, {event.facts.seconds:.2f} s",
        event="plan made",
    )
    unneeded = event.facts.unneeded
    if unneeded and unneeded != before:
        shown = f"{', '.join(unneeded[:SHOWN])}{', …' if len(unneeded) > SHOWN else ''}"
        turn.say(
            f"the trainer has {len(unneeded)} tensors that no engine needs: {shown}",
            "warning",
            event="tensors unneeded",
        )


def rejected(turn: Turn, event: PlanRejected) -> None:
    """The layouts do not fit: leave the engine out that is to blame, or wait for other layouts."""
    fleet = turn.fleet
    if event.number != fleet.plan_number:
        return
    fleet.planning = False
    fleet.plan = None  # the last one was for other layouts
    turn.say(f"no plan: {event.reason}", "error", event="plan rejected")
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
    fitting = {name: fleet.ranks_of(name) for name, engine in fleet.engines.items() if not engine.misfit}
    whole = {name: ranks for name, ranks in fitting.items() if ranks and len(ranks) == ranks[0].hello.world}
    if not whole or len(fleet.trainers()) != fleet.trainer_world():
        return
    if fleet.plan is None and awaited(turn, list(whole)):
        return
    agents = [*fleet.trainers(), *(agent for ranks in whole.values() for agent in ranks)]
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
