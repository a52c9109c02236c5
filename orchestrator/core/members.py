"""Who is there: agents that connect, are refused, say what their memory holds, and go."""

from weightsync.orchestrator.core.commands import Accept, Drop, Refuse
from weightsync.orchestrator.core.errors import Trouble
from weightsync.orchestrator.core.events import AgentConnected, AgentLost
from weightsync.orchestrator.core.records import EpochBegan
from weightsync.orchestrator.core.round import endings
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.state import ConnectedAgent, Fleet, Unclosed
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.codec import SchemaMismatch, cut
from weightsync.orchestrator.protocol.limits import SCHEMA_VERSION
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Commit,
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
        refused = Refused(reason=objection.reason, fault=objection.fault, retry=objection.retry)
        turn.do(Refuse(event.member, event.connection, refused))
        turn.say(f"{event.member} is refused: {objection.reason}", "warning")
        return
    before = fleet.leave(event.member)
    if before is not None:
        turn.do(Drop(before.member, before.connection, "the same process connected again"))
    if event.member.role == "trainer":
        _enter_generation(turn, hello.generation)
    agent = ConnectedAgent(event.member, event.connection, hello)
    fleet.enter(agent)
    _raise_epoch(turn, hello)
    turn.do(Accept(event.member, event.connection, _first_welcome(fleet)))
    _learn(turn, agent)  # what it is told reaches it only once it is accepted


def _objection(fleet: Fleet, member: Member, hello: Hello) -> Trouble | None:
    """Why this agent cannot be taken in. The one place that judges a Hello; the hub only frames and authenticates."""
    if hello.schema != SCHEMA_VERSION:
        return Trouble(str(SchemaMismatch(hello.schema)), "config", retry=False)
    if hello.run_id != fleet.policy.run_id:
        runs = f"it belongs to run {hello.run_id!r}, this daemon serves run {fleet.policy.run_id!r}"
        return Trouble(runs, "config", retry=False)
    if member.rank >= hello.world:
        return Trouble(f"rank {member.rank} is outside its world of {hello.world}", "config", retry=False)
    if member.role == "inference" and member.engine not in fleet.engines:
        known = ", ".join(fleet.engines)
        return Trouble(f"engine {member.engine!r} is not configured; engines are: {known}", "config", retry=False)
    peers = fleet.trainers() if member.role == "trainer" else fleet.ranks_of(member.engine)
    worlds = {agent.hello.world for agent in peers if agent.member != member}
    if member.role == "trainer" and fleet.policy.trainer_world is not None:
        worlds.add(fleet.policy.trainer_world)
    if worlds - {hello.world}:
        sizes = f"it says that there are {hello.world} ranks, others say {sorted(worlds)}"
        return Trouble(sizes, "config", retry=False)
    if member.role == "trainer":
        if hello.generation in fleet.past_generations:
            replaced = f"its trainer generation {hello.generation:x} was replaced by a newer start"
            return Trouble(replaced, "trainer", retry=False)
        others = [a for a in peers if a.hello.generation != hello.generation]
        if others:
            return Trouble(f"{others[0].member} of another trainer start is still connected", "trainer")
    twin = fleet.agents.get(member)
    if twin is not None and twin.hello.incarnation != hello.incarnation:
        where = f"{twin.hello.host or 'unknown host'} pid {twin.hello.pid}"
        # Worth another try: the first process may be dead, and its connection not known to be.
        return Trouble(f"duplicate rank: {member} is already connected from {where}", "config")
    if hello.epoch_seen >= fleet.epoch and hello.journal_id != fleet.journal_id and fleet.round is not None:
        # Taking it in raises the epoch, and a round's grants are of the epoch in which it began.
        return Trouble("it obeyed another daemon; this one takes it in after the current round", "daemon")
    return None


def _enter_generation(turn: Turn, generation: int) -> None:
    fleet = turn.fleet
    if fleet.generation == generation:
        return
    if fleet.generation is not None:
        fleet.past_generations.add(fleet.generation)
        current = fleet.round.version if fleet.round is not None else None  # the round decides about its own
        for version in list(fleet.waiting_since):
            if version != current:
                endings.fail_version(turn, version, "its trainer ended before the version was committed")
    fleet.generation = generation
    turn.say(f"trainer generation {generation:x} begins")


def _learn(turn: Turn, agent: ConnectedAgent) -> None:
    """Believe what the agent says about its own memory."""
    fleet = turn.fleet
    hello, member = agent.hello, agent.member
    if hello.trainer is not None:
        if hello.trainer.staged is not None:
            staged, again = hello.trainer.staged, hello.trainer.restaged
            agent.staged = Staged(version=staged, bytes=0, convert_seconds=0.0, digest_seconds=0.0, restaged=again)
            endings.staged_again(turn, staged, again)
        pending = fleet.unclosed.get(member)
        still_open = next(iter(hello.trainer.open_rounds), None)
        if still_open is not None:
            # Of a grant that we do not know, nobody knows the targets: all that are here may be among them.
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


def _let_out(turn: Turn, agent: ConnectedAgent) -> None:
    """Send a worker that comes back from inside a round the message that ends its wait; it may have missed it."""
    if agent.status.window is not None:
        final = _final_message(turn.fleet, agent.status.window)
        if final is not None:
            turn.send(agent.member, final)


def _final_message(fleet: Fleet, name: RoundName) -> Commit | Abort | None:
    """How round ``name`` ends for a worker; None while the round itself will tell it."""
    current = fleet.round
    ended = fleet.memory.ended.get(name)
    if current is None or current.name != name:
        if ended is not None and ended.decided:
            return Commit(round=name, version=ended.began.version)
        torn = ended is None or ended.dirty  # of a round that nobody remembers, the worst is assumed
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
        fleet.epoch = hello.epoch_seen + 1
        fleet.group = ()  # its members learnt the old epoch: they meet again
        turn.append(EpochBegan(epoch=fleet.epoch))
        for agent in fleet.agents.values():
            if agent.hello is not hello:
                turn.send(agent.member, _first_welcome(fleet))


def welcome(fleet: Fleet, rendezvous: HubRendezvous | TcpStoreRendezvous | None) -> Welcome:
    """The Welcome of an accepted agent. ``rendezvous`` None: where to meet follows, once the group is whole."""
    policy = fleet.policy
    return Welcome(
        epoch=fleet.epoch,
        journal_id=fleet.journal_id,
        heartbeat_seconds=policy.heartbeat,
        lost_after_heartbeats=policy.lost_after,
        transport=policy.transport,
        rendezvous=rendezvous,
        run_dir=cut(policy.run_dir),
    )


def _first_welcome(fleet: Fleet) -> Welcome:
    return welcome(fleet, HubRendezvous() if fleet.policy.group is None else None)


def lost(turn: Turn, event: AgentLost) -> bool:
    """A connection ended. True when it was the member's current one."""
    fleet = turn.fleet
    agent = fleet.agents.get(event.member)
    if agent is None or agent.connection != event.connection:
        return False
    fleet.leave(event.member)
    turn.say(f"{event.member} is gone: {event.reason}", "warning")
    if event.member.engine in fleet.engines:
        engine = fleet.engines[event.member.engine]
        engine.probe_at = turn.now  # at once: its server may have died with the agent
        engine.misfit = ""  # the process that comes next may have another layout
    return True
