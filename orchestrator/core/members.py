"""Who is there: agents that come and go, engines that are probed, held and released."""

from weightsync.orchestrator.core.commands import Accept, Drop, OpenGroup, Refuse
from weightsync.orchestrator.core.events import AgentConnected, AgentLost, Call, CallDone, CallFailed
from weightsync.orchestrator.core.records import EpochBegan
from weightsync.orchestrator.core.round import endings
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.state import Agent, Engine, Fleet, Unclosed
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.limits import SCHEMA_VERSION
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Commit,
    Fault,
    Hello,
    HubRendezvous,
    Refused,
    Staged,
    TcpStoreRendezvous,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Member, RoundName


def connected(turn: Turn, event: AgentConnected) -> None:
    """An agent says Hello: take it in, or refuse it with the reason."""
    fleet, hello = turn.fleet, event.hello
    objection = _objection(fleet, event.member, hello)
    if objection is not None:
        fault, reason, retry = objection
        refused = Refused(reason=reason, fault=fault, retry=retry)
        turn.do(Refuse(turn.cause, event.member, event.connection, refused))
        turn.say(f"{event.member} is refused: {reason}", "warning")
        return
    before = fleet.leave(event.member)
    if before is not None:
        turn.do(Drop(turn.cause, before.member, before.connection, "the same process connected again"))
    if event.member.role == "trainer":
        _enter_generation(turn, hello.generation)
    agent = Agent(event.member, event.connection, hello)
    fleet.enter(agent)
    _raise_epoch(turn, hello)
    turn.do(Accept(turn.cause, event.member, event.connection, _first_welcome(fleet)))
    _learn(turn, agent)  # what it is told reaches it only once it is accepted


def _objection(fleet: Fleet, member: Member, hello: Hello) -> tuple[Fault, str, bool] | None:
    """Why this agent cannot be taken in: fault, reason, whether to try again."""
    if hello.schema != SCHEMA_VERSION:
        wants = f"it speaks schema {hello.schema}, the daemon {SCHEMA_VERSION}; install the same release on both sides"
        return "config", wants, False
    if hello.run_id != fleet.policy.run_id:
        return "config", f"it belongs to run {hello.run_id!r}, this daemon serves run {fleet.policy.run_id!r}", False
    if member.rank >= hello.world:
        return "config", f"rank {member.rank} is outside its world of {hello.world}", False
    if member.role == "inference" and member.engine not in fleet.engines:
        known = ", ".join(fleet.engines)
        return "config", f"engine {member.engine!r} is not configured; engines are: {known}", False
    peers = fleet.trainers() if member.role == "trainer" else fleet.ranks_of(member.engine)
    worlds = {agent.hello.world for agent in peers if agent.member != member}
    if member.role == "trainer" and fleet.policy.trainer_world is not None:
        worlds.add(fleet.policy.trainer_world)
    if worlds - {hello.world}:
        return "config", f"it says that there are {hello.world} ranks, others say {sorted(worlds)}", False
    if member.role == "trainer":
        if hello.generation in fleet.past_generations:
            return "trainer", f"its trainer generation {hello.generation:x} was replaced by a newer start", False
        others = [a for a in peers if a.hello.generation != hello.generation]
        if others:
            return "trainer", f"{others[0].member} of another trainer start is still connected", True
    twin = fleet.agents.get(member)
    if twin is not None and twin.hello.incarnation != hello.incarnation:
        where = f"{twin.hello.host or 'unknown host'} pid {twin.hello.pid}"
        return "config", f"duplicate rank: {member} is already connected from {where}", True
    if hello.epoch_seen >= fleet.epoch and hello.journal_id != fleet.journal_id and fleet.round is not None:
        return "daemon", "it obeyed another daemon; this one takes it in after the current round", True
    return None


def _enter_generation(turn: Turn, generation: int) -> None:
    fleet = turn.fleet
    if fleet.generation == generation:
        return
    if fleet.generation is not None:
        fleet.past_generations.add(fleet.generation)
        current = fleet.round.version if fleet.round is not None else None  # its fate is the round's
        for version in list(fleet.waiting_since):
            if version != current:
                endings.fail_version(turn, version, "its trainer ended before the version was committed")
    fleet.generation = generation
    turn.say(f"trainer generation {generation:x} begins")


def _learn(turn: Turn, agent: Agent) -> None:
    """Believe what the agent says about its own memory."""
    fleet, hello, member = turn.fleet, agent.hello, agent.member
    if hello.trainer is not None:
        if hello.trainer.staged is not None:
            agent.staged = Staged(version=hello.trainer.staged, bytes=0, convert_seconds=0.0, digest_seconds=0.0)
        pending, still_open = fleet.unclosed.get(member), hello.trainer.open_round
        if still_open is not None:
            reach = {a.member: a.hello.incarnation for e in fleet.engines for a in fleet.ranks_of(e)}
            known = pending.targets if pending is not None and pending.round == still_open else reach
            fleet.unclosed[member] = Unclosed(still_open, hello.incarnation, known)
        elif pending is not None:
            del fleet.unclosed[member]  # closed, or a newer incarnation: the old process is dead
    if hello.engine is not None:
        agent.status = hello.engine
        _untaint(fleet, member, hello.incarnation)
        _let_out(turn, agent)


def _untaint(fleet: Fleet, member: Member, incarnation: int) -> None:
    """A restarted target is out of reach of writers that still hold a grant for its old memory."""
    for writer, pending in list(fleet.unclosed.items()):
        if pending.targets.get(member, incarnation) != incarnation:
            del pending.targets[member]
            if not pending.targets:
                del fleet.unclosed[writer]


def _let_out(turn: Turn, agent: Agent) -> None:
    """A worker that comes back from inside a round may have missed the word that ends its wait."""
    if agent.status.window is not None:
        word = _last_word(turn.fleet, agent.status.window)
        if word is not None:
            turn.send(agent.member, word)


def _last_word(fleet: Fleet, name: RoundName) -> Commit | Abort | None:
    """How round ``name`` ends for a worker; None while the round itself will tell it."""
    current, ended = fleet.round, fleet.memory.ended.get(name)
    if current is None or current.name != name:
        if ended is not None and ended.decided:
            return Commit(round=name, version=ended.began.version)
        torn = ended is None or ended.dirty
        return Abort(round=name, torn=torn, reason="the round ended while this worker was away")
    if current.phase in (Phase.CANCELLING, Phase.TEARING):
        return Abort(round=name, torn=current.phase is Phase.TEARING, reason=current.reason)
    if current.decided and current.phase is not Phase.DECIDING:
        return Commit(round=name, version=current.version)
    return None


def _raise_epoch(turn: Turn, hello: Hello) -> None:
    """An agent obeyed a later epoch than ours (our journal was lost or replaced): go above it."""
    fleet = turn.fleet
    if hello.epoch_seen > fleet.epoch or (hello.epoch_seen == fleet.epoch and hello.journal_id != fleet.journal_id):
        fleet.epoch, fleet.group = hello.epoch_seen + 1, ()
        turn.append(EpochBegan(epoch=fleet.epoch))
        for agent in fleet.agents.values():
            if agent.hello is not hello:
                turn.send(agent.member, _first_welcome(fleet))


def welcome(fleet: Fleet, rendezvous: HubRendezvous | TcpStoreRendezvous | None) -> Welcome:
    """What an accepted agent is told."""
    policy = fleet.policy
    return Welcome(
        epoch=fleet.epoch,
        journal_id=fleet.journal_id,
        heartbeat_seconds=policy.heartbeat,
        transfer_seconds=policy.transfer,
        transport=policy.transport,
        rendezvous=rendezvous,
        run_dir=policy.run_dir,
    )


def _first_welcome(fleet: Fleet) -> Welcome:
    return welcome(fleet, HubRendezvous() if fleet.policy.group is None else None)


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
    turn.do(OpenGroup(turn.cause, store, group))
    for rank, agent in enumerate(agents, start=1):
        place = TcpStoreRendezvous(address.host, address.port, rank, size, address.timeout_seconds)
        agent.announce, agent.delivered, agent.fingerprint = None, "", ""
        turn.send(agent.member, welcome(fleet, place))


def lost(turn: Turn, event: AgentLost) -> bool:
    """A connection ended. True when it was the member's current one."""
    fleet = turn.fleet
    agent = fleet.agents.get(event.member)
    if agent is None or agent.connection != event.connection:
        return False
    fleet.leave(event.member)
    turn.say(f"{event.member} is gone: {event.reason}", "warning")
    if event.member.engine in fleet.engines:
        fleet.engines[event.member.engine].probe_at = turn.now
        fleet.engines[event.member.engine].misfit = ""
    return True


def tend_engines(turn: Turn) -> None:
    """Probe engines, start their agents, and resume those that we owe it."""
    fleet = turn.fleet
    busy = fleet.round.engines.keys() if fleet.round is not None else frozenset()
    for name, engine in fleet.engines.items():
        if name in busy or engine.calls or turn.now < engine.probe_at:
            continue
        engine.probe_at = turn.now + fleet.policy.probe
        if engine.ours_paused and fleet.attached(name) and endings.may_serve(fleet, name):
            endings.release(turn, name)
        elif engine.paused is False and endings.must_not_serve(fleet, name):
            endings.hold(turn, name)
        elif engine.reachable and not fleet.ranks_of(name):
            turn.call(name, Call.ATTACH, fleet.policy.probe * 4)
        else:
            turn.call(name, Call.PROBE, fleet.policy.probe * 2)


def engine_answered(turn: Turn, event: CallDone | CallFailed, engine: Engine) -> None:
    """Book what an answer says about the engine itself."""
    if isinstance(event, CallFailed):
        if event.reason != engine.error:
            turn.say(f"{engine.name}: {event.call} failed: {event.reason}", "warning")
        engine.error = event.reason
        if event.call in (Call.PROBE, Call.ATTACH):
            engine.reachable, engine.paused = False, None  # another server may stand there when it answers again
        return
    if event.paused is not None:
        engine.paused = event.paused
    match event.call:
        case Call.PROBE:
            if not engine.reachable:
                engine.probe_at = turn.now  # its agents are started at once
            engine.reachable = True
            engine.error = engine.error if not engine.ranks else ""  # without agents, what ATTACH says counts
        case Call.RESUME:
            engine.ours_paused, engine.error = False, ""
        case _:
            engine.error = ""
