"""The daemon's decisions: ``step(fleet, events, now) -> commands``. Nothing here touches the outside."""

from collections.abc import Sequence

import msgspec
from weightsync.orchestrator.core import invariants, operator, since, standby, versions
from weightsync.orchestrator.core.commands import Command
from weightsync.orchestrator.core.events import (
    AgentConnected,
    AgentLost,
    AgentSaid,
    Appended,
    Asked,
    CallDone,
    CallFailed,
    EngineApplied,
    Event,
    MarkersSeen,
    NeedsReady,
    PlanReady,
    PlanRejected,
    PolicyChanged,
    StopAsked,
    Tick,
)
from weightsync.orchestrator.core.membership import (
    admission,
    engines,
    feeds,
    members,
    needs,
    rendezvous,
    renewals,
    roster,
)
from weightsync.orchestrator.core.memory import Memory, replay
from weightsync.orchestrator.core.policy import Policy
from weightsync.orchestrator.core.records import AnyRecord, Committed, EpochBegan, RoundEnded
from weightsync.orchestrator.core.round import endings
from weightsync.orchestrator.core.round import reports as rounds
from weightsync.orchestrator.core.state import ConnectedAgent, EngineState, Fleet, Unclosed
from weightsync.orchestrator.core.story import sentence, standing
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.messages import (
    Announce,
    Bye,
    Closed,
    Converting,
    EngineStatus,
    Examined,
    Holding,
    Left,
    Quiesced,
    Ready,
    Staged,
    Standing,
    Verified,
)
from weightsync.orchestrator.protocol.names import Member, Role
from weightsync.orchestrator.protocol.text import clean


def start(
    policy: Policy, journal_id: str, records: list[AnyRecord], now: float, life: str = ""
) -> tuple[Fleet, list[Command]]:
    """The state of a daemon that read ``records`` from its journal, and what it does first.

    A round that was DECIDED is committed now. A round that was not is over; its writers count as unclosed until they
    say otherwise. What engines are, they say themselves. ``life``: a nonce, so that no two daemons are taken for one.
    """
    memory = Memory()
    for record in records:
        replay(memory, record)
    wanted = roster.members(policy, memory).values()
    known = {config.name: EngineState(config.name, config.pair, now, probe_at=now) for config in wanted}
    fleet = Fleet(policy, journal_id, memory, memory.epoch + 1, now, known, life)
    turn = Turn(fleet, now, 0)
    turn.append(EpochBegan(epoch=fleet.epoch))
    admission.configured_anew(turn)
    for name, orphan in list(memory.open_rounds.items()):
        torn = orphan.dirty and not orphan.decided
        for engine in orphan.began.engines:
            if engine in known and torn:
                known[engine].torn_by = orphan.began.version
        _end_orphan(turn, orphan.decided, RoundEnded(
            round=name, version=orphan.began.version, attempt=orphan.began.attempt, engines=orphan.began.engines,
            left_out=(), outcome="committed" if orphan.decided else "failed", reason="the daemon was restarted",
            fault="" if orphan.decided else "daemon", bytes=0, descriptors=0, times={},
            unclosed=orphan.writers if torn else {},
        ))  # fmt: skip
    for (writer, name), taint in memory.unclosed.items():
        reach = {_named("inference", rank): incarnation for rank, incarnation in taint.targets.items()}
        pending = Unclosed(taint.incarnation, taint.host, taint.boot, reach, outlived=True)
        fleet.unclosed[_named("inference" if taint.engine else "trainer", writer), name] = pending
    return fleet, turn.commands


def _named(role: Role, text: str) -> Member:
    """The member of ``role`` that prints as ``text``."""
    engine, _, rank = text.rpartition("/")
    return Member(role, engine if role == "inference" else "", int(rank))


def _end_orphan(turn: Turn, decided: bool, ended: RoundEnded) -> None:
    memory = turn.fleet.memory
    if decided and memory.committed != ended.version:
        turn.append(Committed(round=ended.round, version=ended.version, sequence=memory.sequence + 1))
        endings.mark_committed(turn, ended.round, ended.version, ended.engines)
    turn.append(ended)


def step(fleet: Fleet, events: Sequence[Event], now: float) -> list[Command]:
    """What ``events``, which came together, lead to. ``now``: seconds of one monotonic clock.

    Raises:
        InvariantViolation: one of S1-S6 does not hold afterwards; nothing of the commands may be performed.
        ImpossibleTransition: the round's table has no entry for it.
    """
    # Level-triggered: handling an event only books what it says about the world. What follows from the whole state is
    # decided in the sweep below, after every batch of events and whatever they were: the plan first, which a round
    # needs; then the versions, which begin rounds; engines last, since a call to one keeps it out of a round. A
    # decision that was missed, or whose effect was lost, is thus made again by the next event, of which there is one
    # every quarter of a second. The invariants look at grants and resumes as they are commanded, and at the rest last,
    # before anything is performed.
    turn = Turn(fleet, now, 0)
    before = invariants.snapshot(fleet)
    for event in events:
        turn.cause = event.id
        _handle(turn, event)
    admission.evaluate(turn)
    roster.evaluate(turn)
    rendezvous.gather_group(turn)
    needs.evaluate(turn)
    renewals.evaluate(turn)
    rendezvous.evaluate(turn)
    feeds.evaluate(turn)
    versions.evaluate(turn)
    engines.tend_engines(turn)
    _tell_story(turn)
    invariants.check(fleet, before, turn.commands)
    return turn.commands


def _handle(turn: Turn, event: Event) -> None:
    match event:
        case AgentConnected():
            if members.connected(turn, event):
                rounds.agent_returned(turn, turn.fleet.agents[event.member])
                _retell(turn, event.member)
        case AgentSaid():
            _said(turn, event)
        case AgentLost():
            if members.lost(turn, event):
                rounds.agent_lost(turn, event.member, event.reason)
        case PlanReady(lends=True):
            feeds.planned(turn, event)
        case PlanRejected(lends=True):
            feeds.rejected(turn, event)
        case PlanReady():
            rendezvous.planned(turn, event)
        case PlanRejected():
            rendezvous.rejected(turn, event)
        case NeedsReady():
            needs.ready(turn, event)
        case CallDone() | CallFailed():
            _call_ended(turn, event)
        case MarkersSeen():
            turn.fleet.stable = event.stable
            turn.fleet.looking = False
        case Appended(kind=kind, round=name):
            if turn.fleet.awaited == (kind, name):
                turn.fleet.awaited = None
                rounds.durable(turn, name)
        case EngineApplied():
            admission.applied(turn, event)
        case Asked():
            operator.asked(turn, event)
        case StopAsked():
            turn.fleet.stopping = True
        case PolicyChanged(policy=policy):
            turn.fleet.policy = policy
            admission.configured_anew(turn)
        case Tick():
            rounds.tick(turn)
            since.note(turn)


def _retell(turn: Turn, member: Member) -> None:
    """A trainer that reconnects may have missed the result of the version that it waits for."""
    agent = turn.fleet.agents.get(member)
    if agent is not None and agent.staged is not None:
        endings.tell_trainers(turn, agent.staged.version)


def _said(turn: Turn, event: AgentSaid) -> None:
    agent = turn.fleet.agents.get(event.member)
    if agent is None or agent.connection != event.connection:
        return  # of a connection that a newer one replaced
    message = event.message
    match message:
        case Announce():
            if rendezvous.announced(turn, agent, message):
                rounds.agent_changed(turn, event.member)
        case Ready():
            rendezvous.confirmed(turn, agent, message)
            rounds.edges_changed(turn, agent)
        case Converting():
            agent.staged, agent.converting = None, message.version
            versions.tend_ahead(turn)  # before its CLOSED, which is no engine's fault
        case Staged():
            agent.staged, agent.converting = message, None
            endings.staged_again(turn, message.version, message.restaged)
            endings.tell_trainers(turn, message.version)  # it may have failed while this rank was still converting
        case Quiesced():
            _status(turn, agent, msgspec.structs.replace(agent.status, window=message.round))  # until it says LEFT
            members.let_out(turn, agent)
        case Left() | Holding():
            _status(turn, agent, message.status)
            if isinstance(message, Left):
                agent.told_hold = None  # a commit ends a hold, so what it was told before says nothing
            if isinstance(message, Left) and message.status.torn:
                members.mend(turn, agent, message.round)
        case Examined():
            agent.findings = message.findings
        case Verified():
            standby.kept_verified(turn.fleet, agent, message)
        case Closed():
            members.closed(turn, event.member, message)
        case Bye():
            turn.say(f"{event.member} says good-bye: {message.reason}", event="agent gone", engine=event.member.engine)
        case _:
            pass
    rounds.agent_said(turn, event)


def _status(turn: Turn, agent: ConnectedAgent, status: EngineStatus) -> None:
    """Only an inference rank has one; a trainer's word about it says nothing."""
    if agent.member.role == "inference":
        agent.status = status
        turn.fleet.touch(agent.member.engine)
        rounds.status_changed(turn, agent)


def _call_ended(turn: Turn, event: CallDone | CallFailed) -> None:
    engine = turn.fleet.engines.get(event.engine)
    if engine is None or engine.calls.get(event.call) != event.number:
        return  # of an engine that is no member any more, or the answer to a call that a newer one replaced
    del engine.calls[event.call]
    engines.engine_answered(turn, event, engine)
    rounds.call_ended(turn, event)


def _tell_story(turn: Turn) -> None:
    told = sentence(turn.fleet, turn.now)
    if told != turn.fleet.sentence:
        turn.fleet.sentence = told
        turn.say(told, event="state")
    _tell_trainer(turn)


def _tell_trainer(turn: Turn) -> None:
    """The first rank, when it changes: a publish that waits says why."""
    first = turn.fleet.trainer_ranks.get(0)
    if first is None:
        return
    told = standing(turn.fleet)
    if told != first.standing:
        first.standing = told
        turn.send(first.member, Standing(sentence=clean(told)))
