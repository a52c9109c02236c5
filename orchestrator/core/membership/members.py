"""Who is there: agents that connect, are refused, say what their memory holds, and go."""

from typing import Final

from weightsync.orchestrator.core import standby
from weightsync.orchestrator.core.commands import Accept, Drop, Refuse
from weightsync.orchestrator.core.errors import Trouble
from weightsync.orchestrator.core.events import AgentConnected, AgentLost
from weightsync.orchestrator.core.membership import engines
from weightsync.orchestrator.core.records import EpochBegan, GrantOver, TrainerBegan
from weightsync.orchestrator.core.round import endings, lending
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.state import ConnectedAgent, Fleet, Unclosed
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.codec import SchemaMismatch
from weightsync.orchestrator.protocol.limits import MAX_FOREIGN_EPOCH, SCHEMA_VERSION
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Closed,
    Commit,
    Hello,
    HubRendezvous,
    Refused,
    Staged,
    TcpStoreRendezvous,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Member, RoundName

SHOWN: Final = 8
"""Engines that a refusal names."""


def connected(turn: Turn, event: AgentConnected) -> bool:
    """An agent says Hello: take it in (true), or refuse it with the reason."""
    fleet, hello = turn.fleet, event.hello
    _close_grants(turn, event.member, hello)
    objection = _objection(fleet, event.member, hello)
    if objection is not None:
        refused = Refused(reason=objection.reason, fault=objection.fault, retry=objection.retry)
        turn.do(Refuse(event.member, event.connection, refused))
        turn.say(
            f"{event.member} is refused: {objection.reason}",
            "warning",
            event="agent refused",
            engine=event.member.engine,
        )
        return False
    twin = fleet.leave(event.member)
    if twin is not None:
        turn.do(Drop(twin.member, twin.connection, "the same process connected again"))
    if event.member.role == "trainer":
        _enter_generation(turn, hello.generation)
    agent = ConnectedAgent(event.member, event.connection, hello)
    before = fleet.gone.get(event.member)
    if before is not None and before.hello.incarnation == hello.incarnation:
        agent.resumes(before)
    elif event.member.role == "inference":
        engines.started_anew(turn, event.member.engine)
    fleet.enter(agent)
    _raise_epoch(turn, hello)
    turn.do(Accept(event.member, event.connection, _first_welcome(fleet)))
    _learn(turn, agent)  # what it is told reaches it only once it is accepted
    return True


def _objection(fleet: Fleet, member: Member, hello: Hello) -> Trouble | None:
    """Why this agent cannot be taken in. The one place that judges a Hello; the hub only frames and authenticates."""
    if hello.schema != SCHEMA_VERSION:
        return Trouble(str(SchemaMismatch(hello.schema)), "config", retry=False)
    if hello.run_id != fleet.policy.run_id:
        runs = f"it belongs to run {hello.run_id!r}, this daemon serves run {fleet.policy.run_id!r}"
        return Trouble(runs, "config", retry=False)
    if hello.epoch_seen > max(fleet.epoch, MAX_FOREIGN_EPOCH):
        often = f"it says that it obeyed epoch {hello.epoch_seen}, and no daemon has started so often"
        return Trouble(often, "config", retry=False)
    if member.rank >= hello.world:
        return Trouble(f"rank {member.rank} is outside its world of {hello.world}", "config", retry=False)
    if member.role == "inference" and (stranger := _stranger(fleet, member)):
        return Trouble(stranger, "config")  # worth another try: engines come and go
    peers = fleet.trainers() if member.role == "trainer" else fleet.ranks_of(member.engine)
    if member.role == "trainer":
        if fleet.policy.trainer_world not in (None, hello.world):
            wanted = f"it says that there are {hello.world} ranks, the configuration {fleet.policy.trainer_world}"
            return Trouble(wanted, "config", retry=False)
        if fleet.memory.was_replaced(hello.generation):
            replaced = f"its trainer generation {hello.generation} was replaced by a newer start"
            # Until it has closed its grants it comes again, for nobody else can say that they are.
            return Trouble(replaced, "trainer", retry=_has_unclosed(fleet, member, hello.incarnation))
        others = [a for a in peers if a.hello.generation != hello.generation]
        if others:
            return Trouble(f"{others[0].member} of another trainer start is still connected", "trainer")
    worlds = {agent.hello.world for agent in peers if agent.member != member}
    if worlds - {hello.world}:
        # Worth another try, as below: the others may be of a start before.
        return Trouble(f"it says that there are {hello.world} ranks, others say {sorted(worlds)}", "config")
    twin = fleet.agents.get(member)
    if twin is not None and twin.hello.incarnation != hello.incarnation:
        where = f"{twin.hello.host or 'unknown host'} pid {twin.hello.pid}"
        # Worth another try: the first process may be dead, and its connection not known to be.
        return Trouble(f"duplicate rank: {member} is already connected from {where}", "config")
    if _obeyed_another(fleet, hello) and fleet.round is not None:
        # Taking it in raises the epoch, and a round's grants are of the epoch in which it began.
        return Trouble("it obeyed another daemon; this one takes it in after the current round", "daemon")
    return None


def _stranger(fleet: Fleet, member: Member) -> str:
    """Why the agent's engine is no member; empty where it is one."""
    over = fleet.memory.forgotten_engines.get(member.engine)
    if over is not None:
        return f"engine {member.engine!r} was forgotten ({over}); release makes it a member again"
    if member.engine in fleet.engines:
        return ""
    names = [*fleet.engines][:SHOWN]
    more = " …" if len(fleet.engines) > SHOWN else ""
    return f"engine {member.engine!r} is neither configured nor admitted; engines are: {', '.join(names)}{more}"


def _obeyed_another(fleet: Fleet, hello: Hello) -> bool:
    """It obeyed a later epoch, or another daemon's of ours: a lost, copied or restored journal, or two lives of one."""
    ours = (hello.journal_id, hello.life_seen) == (fleet.journal_id, fleet.life)
    return hello.epoch_seen > fleet.epoch or (hello.epoch_seen == fleet.epoch and not ours)


def _enter_generation(turn: Turn, generation: int) -> None:
    fleet = turn.fleet
    if fleet.generation == generation:
        return
    fleet.generation = generation
    if generation not in fleet.memory.generations:
        # Journaled, or one that was away would be taken for a new one after a restart, and the new one for replaced.
        turn.append(TrainerBegan(generation=generation))
    turn.say(f"trainer generation {generation} begins", event="trainer begins")


def _learn(turn: Turn, agent: ConnectedAgent) -> None:
    """Believe what the agent says about its own memory."""
    hello, member = agent.hello, agent.member
    if hello.trainer is not None and hello.trainer.staged is not None:
        staged, again = hello.trainer.staged, hello.trainer.restaged
        agent.staged = Staged(version=staged, bytes=0, convert_seconds=0.0, digest_seconds=0.0, restaged=again)
        endings.staged_again(turn, staged, again)
    agent.converting = hello.trainer.converting if hello.trainer is not None else None
    _compare_grants(turn, member, hello)
    if hello.engine is not None:
        agent.status = hello.engine
        turn.fleet.touch(member.engine)
        _untaint(turn, member, hello.incarnation)
        let_out(turn, agent)


def _close_grants(turn: Turn, writer: Member, hello: Hello) -> None:
    """Believe a writer that a grant of its own is closed, also one that is not taken in: it was replaced while it could
    not be heard, say, and then its CLOSED was lost with the connection."""
    fleet = turn.fleet
    if hello.schema != SCHEMA_VERSION or hello.run_id != fleet.policy.run_id:
        return
    for (member, name), pending in list(fleet.unclosed.items()):
        known = member == writer and pending.incarnation == hello.incarnation
        # Of the round under way it may not have had its grant yet; it is told again, and says CLOSED.
        under_way = fleet.round is not None and fleet.round.name == name
        if known and name not in lending.open_rounds(hello) and not under_way:
            grant_over(turn, writer, name, "its writer has closed it")


def _has_unclosed(fleet: Fleet, writer: Member, incarnation: int) -> bool:
    return any(who == writer and pending.incarnation == incarnation for (who, _), pending in fleet.unclosed.items())


def _compare_grants(turn: Turn, writer: Member, hello: Hello) -> None:
    """What the writer says it may still write, beside what we know that it may."""
    fleet = turn.fleet
    for (member, name), pending in list(fleet.unclosed.items()):
        if member == writer and pending.is_proved_dead_by(hello):
            grant_over(turn, writer, name, "a newer process runs in its writer's place")
    for name in lending.open_rounds(hello):
        if (writer, name) not in fleet.unclosed:
            # Of a grant that we do not know, nobody knows the targets: all that are here may be among them.
            reach = {a.member: a.hello.incarnation for e in fleet.engines for a in fleet.ranks_of(e)}
            fleet.unclosed[writer, name] = Unclosed(hello.incarnation, hello.host, hello.boot, reach, outlived=True)


def closed(turn: Turn, writer: Member, message: Closed) -> None:
    """A writer is done with some peers, or with all: they are out of its reach. Also of rounds that are over."""
    pending = turn.fleet.unclosed.get((writer, message.round))
    if pending is None:
        return
    for sent in message.peers:
        pending.targets.pop(sent.peer, None)
    if message.final or not pending.targets:
        grant_over(turn, writer, message.round, "its writer has closed it")


def grant_over(turn: Turn, writer: Member, name: RoundName, reason: str) -> None:
    """Nothing can be written by this grant any more."""
    pending = turn.fleet.unclosed.pop((writer, name), None)
    if pending is not None and pending.outlived:
        turn.append(GrantOver(round=name, writer=str(writer), reason=reason))
        turn.say(f"the grant of round {name} to {writer} is over: {reason}", event="grant over")


def is_lost_elsewhere(fleet: Fleet, writer: Member, pending: Unclosed, target: ConnectedAgent) -> bool:
    """The grant is of an engine's rank that has gone, after its round, and that ran on another machine than ``target``:
    they share no memory, so that another endpoint of the target is out of its reach."""
    gone = writer.role == "inference" and writer not in fleet.agents and pending.outlived
    apart = bool(pending.boot) and target.hello.boot not in ("", pending.boot)
    return gone and apart and pending.targets.get(target.member) == target.hello.incarnation


def may_wake(fleet: Fleet, writer: Member, pending: Unclosed, target: ConnectedAgent) -> bool:
    """The grant is of a process that has gone, after its round, and that nobody has seen end; the target lands where a
    spare can take the place of what that could write to."""
    gone = writer not in fleet.agents and pending.outlived
    spare = target.announce is not None and target.announce.spares > 0
    return gone and spare and pending.targets.get(target.member) == target.hello.incarnation


def renewed(turn: Turn, agent: ConnectedAgent, spared: bool) -> None:
    """The rank is reached by another endpoint than before; ``spared``: and its landing is other memory."""
    for (writer, name), pending in list(turn.fleet.unclosed.items()):
        reached = pending.outlived and pending.targets.get(agent.member) == agent.hello.incarnation
        if (spared and reached) or is_lost_elsewhere(turn.fleet, writer, pending, agent):
            del pending.targets[agent.member]
            if not pending.targets:
                grant_over(turn, writer, name, "what it could write to is reached by other endpoints")


def _untaint(turn: Turn, member: Member, incarnation: int) -> None:
    """A restarted target is out of reach of writers that still hold a grant for its old memory."""
    for (writer, name), pending in list(turn.fleet.unclosed.items()):
        if pending.targets.get(member, incarnation) != incarnation:
            del pending.targets[member]
            if not pending.targets:
                grant_over(turn, writer, name, "all that it could write to was started anew")


def let_out(turn: Turn, agent: ConnectedAgent) -> None:
    """Send a worker inside a round that is over for it the message that ends its wait; it may have missed it."""
    if agent.status.window is not None:
        final = _final_message(turn.fleet, agent.member, agent.status.window)
        if final is not None:
            turn.send(agent.member, final)


def mend(turn: Turn, agent: ConnectedAgent, name: RoundName) -> None:
    """A worker left round ``name`` as torn because nobody told it in time how the round ended: it may hold it whole.

    Not one that lands elsewhere: what tore that was its own switch.
    """
    if standby.lands(turn.fleet, agent.member.engine) != "live":
        return
    final = _final_message(turn.fleet, agent.member, name)
    if final is not None and (isinstance(final, Commit) or not final.torn):
        turn.send(agent.member, final)


def _final_message(fleet: Fleet, member: Member, name: RoundName) -> Commit | Abort | None:
    """How round ``name`` ends for a worker; None while the round itself will tell it."""
    current = fleet.round
    if current is not None and current.name == name:
        if current.decided and member.engine in current.live:
            return None if current.phase is Phase.DECIDING else Commit(round=name, version=current.version)
        if current.has(member.engine):
            return None
        return Abort(round=name, torn=current.granted, reason=current.engines[member.engine].left_out)
    ended = fleet.memory.ended.get(name)
    if ended is not None and str(member) in ended.digests:
        return Commit(round=name, version=ended.began.version)
    torn = ended is None or ended.dirty  # of a round that nobody remembers, the worst is assumed
    return Abort(round=name, torn=torn, reason="the round ended while this worker was away")


def _raise_epoch(turn: Turn, hello: Hello) -> None:
    """An agent obeyed a later epoch than ours (our journal was lost or replaced): go above it."""
    fleet = turn.fleet
    if _obeyed_another(fleet, hello):
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
        life=fleet.life,
        lease_seconds=policy.lease,
        run_dir=policy.run_dir,
        lends=policy.fan_out != "trainer",
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
    turn.say(f"{event.member} is gone: {event.reason}", "warning", event="agent gone", engine=event.member.engine)
    if event.member.engine in fleet.engines:
        engine = fleet.engines[event.member.engine]
        engine.probe_at = turn.now  # at once: its server may have died with the agent
        fleet.touch(engine.name)
    return True
