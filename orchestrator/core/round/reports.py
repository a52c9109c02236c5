"""What agents, engines, the journal and the clock report about the round under way, and what follows from it.

An event becomes a ``Report``; ``transitions.TABLE`` names the action for it in the present phase; then the round goes
on through all phases that are complete.
"""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from weightsync.orchestrator.core import standby
from weightsync.orchestrator.core.commands import Drop
from weightsync.orchestrator.core.errors import NO_TROUBLE, ImpossibleTransition, Trouble
from weightsync.orchestrator.core.events import AgentSaid, Call, CallDone, CallFailed
from weightsync.orchestrator.core.round import blame, endings, entry, judge, lending, phases, waits
from weightsync.orchestrator.core.round.progress import Round
from weightsync.orchestrator.core.round.transitions import TABLE, Action, Phase, Report
from weightsync.orchestrator.core.state import ConnectedAgent
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.messages import Closed, Exposed, Left, Quiesced, Verified
from weightsync.orchestrator.protocol.names import NO_BYTES, Digest, Member, RoundName, Version


@dataclass(frozen=True, slots=True)
class About:
    """Whom a report is about: the agent that it came from, the engine that it costs its place if it is bad."""

    member: Member | None = None
    engine: str = ""


# ------------------------------------------------------------------------------------------------- events to reports
def agent_said(turn: Turn, event: AgentSaid) -> None:
    """A worker or writer reports progress. Messages about another round change nothing here.

    The reason beside each report counts only in phases in which it comes out of turn.
    """
    current = turn.fleet.round
    message, member = event.message, event.member
    if current is None or getattr(message, "round", None) != current.name:
        return
    if member in current.ranks and not current.has(member.engine):
        return  # of an engine that was left out: ``members`` tells it how the round ends for it
    about = About(member, member.engine)
    match message:
        case Quiesced() if member in current.ranks:
            if current.phase is not Phase.PAUSING:
                current.quiesced.add(member)
            why = Trouble(f"{member} says QUIESCED before it was asked", "engine")
            handle(turn, current, Report.QUIESCED, why, about)
        case Exposed() if member in current.ranks:
            if current.phase in (Phase.MARKING, Phase.EXPOSING):
                current.exposed.add(member)
                _stands_by(turn, current, member, None, NO_BYTES)
            why = Trouble(f"{member} says EXPOSED before it was asked", "engine")
            handle(turn, current, Report.EXPOSED, why, about)
        case Closed() if member in current.writers:
            if current.wave and member not in current.writing:
                return  # said again, of the wave before
            if current.granted and member in current.writing:
                _book_closed(current, member, message)
            why = Trouble(message.error or f"{member} says CLOSED without a grant", message.fault or judge.side(member))
            handle(turn, current, Report.CLOSED, why, about)
        case Verified() if member in current.verified and not current.decided:
            pass  # said again, while it writes what it has verified
        case Verified() if member in current.ranks:
            if current.phase is Phase.VERIFYING:
                current.verified.setdefault(member, message)
                _stands_by(turn, current, member, None if message.error else current.version, message.digest)
            why = Trouble(f"{member} says VERIFIED before it was asked", "engine")
            handle(turn, current, Report.VERIFIED, why, about)
        case Left() if member in current.ranks:
            current.left[member] = message.status
            progress = current.engines[member.engine]
            progress.audit_seconds = max(progress.audit_seconds, message.audit_seconds)
            why = Trouble(
                f"{member} left the round by itself (its log says why)", message.fault or "engine", message.retry
            )
            handle(turn, current, Report.LEFT, why, about)
        case _:
            pass


def _stands_by(turn: Turn, current: Round, member: Member, version: Version | None, digest: Digest) -> None:
    """What this word says of the worker's standby."""
    if current.engines[member.engine].shadow:
        agent = turn.fleet.known(member)
        agent.status = msgspec.structs.replace(agent.status, standby=version, standby_digest=digest)


def _book_closed(current: Round, writer: Member, message: Closed) -> None:
    """The first report about each peer is the one that counts."""
    done = current.closed.setdefault(writer, {})
    for sent in message.peers:
        done.setdefault(sent.peer, sent)
    if message.final:
        current.final.add(writer)
    if message.error:
        fault = message.fault or judge.side(writer)
        current.failed[writer] = Trouble(f"{writer} could not write: {message.error}", fault, message.retry)


def call_ended(turn: Turn, event: CallDone | CallFailed) -> None:
    """A call to an engine answered, or did not."""
    current = turn.fleet.round
    if current is None or not current.has(event.engine) or event.call in (Call.PROBE, Call.ATTACH):
        return
    progress = current.engines[event.engine]
    if not progress.asked(event.call):
        return  # by this round: it was for the engine as it is outside of one
    about = About(engine=event.engine)
    if event.call is Call.UPDATE:
        progress.call_over = True
    if isinstance(event, CallDone):
        why = Trouble(f"{event.engine} ended its update call before the round did", "engine")
        handle(turn, current, _done(turn, current, event), why, about)
        return
    why = Trouble(f"{event.engine}: {event.call} failed: {event.reason}", event.fault, event.retry)
    report = Report.CALL_FAILED
    # Its answer may be lost; after the decision only the workers' words count.
    if event.call is Call.UPDATE and current.decided:
        report = Report.UPDATE_OVER
    elif event.call is Call.SWITCH and waits.all_hold(current, event.engine):
        report, progress.call_over, progress.paused = Report.SWITCHED, True, True  # one that runs may be resumed, too
    handle(turn, current, report, why, about)


def _done(turn: Turn, current: Round, event: CallDone) -> Report:
    progress = current.engines[event.engine]
    if event.call is Call.UPDATE:
        return Report.UPDATE_OVER
    progress.http_seconds += event.seconds
    match event.call:
        case Call.PAUSE:
            progress.paused = True
            return Report.PAUSED
        case Call.SWITCH:
            progress.call_over, progress.paused = True, event.paused is not False
            progress.switch_seconds = event.switch_seconds
            progress.served_at = 0.0 if progress.paused else turn.now
            return Report.SWITCHED
        case Call.FINISH:
            progress.finished, progress.finished_at = True, turn.now
            return Report.FINISHED
        case _:
            entry.serves(turn, current, event.engine)
            return Report.RESUMED


def agent_lost(turn: Turn, member: Member, reason: str) -> None:
    """An agent of the round has no connection; it has the time of a reconnect before that counts."""
    current = turn.fleet.round
    if current is not None and (member in current.ranks or member in current.writers):
        current.away[member] = (turn.now, f"{member} was lost: {reason}")


def agent_returned(turn: Turn, agent: ConnectedAgent) -> None:
    """An agent of the round is connected again: tell it what it may have missed. Another process is not the member."""
    current, member = turn.fleet.round, agent.member
    if current is None or (member not in current.ranks and member not in current.writers):
        return
    current.away.pop(member, None)
    known = current.ranks.get(member, current.sources.get(member))
    if agent.hello.incarnation != known:
        _gone(turn, current, member, f"{member} was started anew")
        if current.phase is Phase.SWITCHING and current.has(member.engine):
            _leave_out(turn, current, Trouble(f"{member} was started anew", "engine"), About(engine=member.engine))
            phases.advance(turn, current)
    elif status_changed(turn, agent):
        return
    elif current.phase in (Phase.MARKING, Phase.EXPOSING) and member in current.ranks and current.has(member.engine):
        entry.expose(turn, current, member)
    elif current.phase is Phase.WRITING and member in current.writing and not current.is_done(member):
        if current.name not in lending.open_rounds(agent.hello):
            entry.grant_to(turn, current, member)
    elif current.phase is Phase.VERIFYING and current.owes_a_digest(member):
        entry.ask_to_verify(turn, current, member)
    if turn.fleet.round is current:
        phases.advance(turn, current)  # it may have waited for this writer


def status_changed(turn: Turn, agent: ConnectedAgent) -> bool:
    """A rank has said what it holds; whether its part in this round ends by that: it has left it with the version and
    holds something else since, or it lends and its memory is not whole any more, or of another version."""
    current, member = turn.fleet.round, agent.member
    if current is None:
        return False
    has_left = current.phase is Phase.SWITCHING and member in current.left and current.has(member.engine)
    if has_left and agent.status.whole != current.version:
        current.left[member] = agent.status
        handle(turn, current, Report.LEFT, NO_TROUBLE, About(member, member.engine))
        return True
    if not current.lending or member not in current.writing or current.is_done(member):
        return False
    if standby.may_lend(turn.fleet, agent):
        return False
    held = agent.status.applied if current.catch_up else agent.status.standby
    why = f"{member} holds {held or 'no version'}{', torn' if agent.status.torn else ''} now"
    _gone(turn, current, member, why)
    return True


def leaves(turn: Turn, engine: str, reason: str) -> None:
    """An engine of the round is no member any more: the round goes on without it."""
    current = turn.fleet.round
    # In the two phases left out here the round waits for the disk alone, and is past them in a moment.
    if current is not None and current.has(engine) and current.phase not in (Phase.DECIDING, Phase.RECORDING):
        _leave_out(turn, current, Trouble(reason, "config"), About(engine=engine))
        phases.advance(turn, current)


def agent_changed(turn: Turn, member: Member) -> None:
    """A member of the round announces another layout: it cannot go on in this one."""
    current = turn.fleet.round
    if current is not None and (member in current.ranks or member in current.writers):
        _gone(turn, current, member, f"{member} has another layout")


def edges_changed(turn: Turn, writer: ConnectedAgent) -> None:
    """A writer has said which peers it cannot reach: those it still writes to are as good as gone for this round."""
    current, member = turn.fleet.round, writer.member
    if current is None or current.phase is not Phase.WRITING or member not in current.writing:
        return
    done = current.closed.get(member, {})
    for target in [target for target in current.writing[member] if target not in done]:
        error = writer.unreached.get(target)
        if error is not None and turn.fleet.round is current and current.has(target.engine):
            why = Trouble(f"{member} cannot write to {target}: {error}", "network")
            handle(turn, current, Report.RANK_GONE, why, About(engine=target.engine))


def _gone(turn: Turn, current: Round, member: Member, reason: str) -> None:
    current.away.pop(member, None)
    if member in current.ranks:
        if current.has(member.engine):
            handle(turn, current, Report.RANK_GONE, Trouble(reason, "engine"), About(None, member.engine))
    elif not current.is_done(member):
        handle(turn, current, Report.WRITER_GONE, Trouble(reason, judge.side(member)))


def durable(turn: Turn, name: RoundName | None) -> None:
    """The record that round ``name`` waits for is on disk; it may have ended meanwhile."""
    current = turn.fleet.round
    if current is not None and current.name == name:
        handle(turn, current, Report.DURABLE, NO_TROUBLE)


def tick(turn: Turn) -> None:
    """A member may be away for too long; the phase's deadline, or the patience of the engines, may be over."""
    current = turn.fleet.round
    if current is None:
        return
    for member, (since, reason) in list(current.away.items()):
        if turn.fleet.round is current and turn.now >= since + turn.fleet.policy.heartbeat:
            _gone(turn, current, member, reason)
    if turn.fleet.round is not current or current.awaits_trainer:
        return
    newer = phases.newer_waits(turn, current)
    if turn.now >= current.deadline:
        handle(turn, current, Report.DEADLINE, phases.overdue(turn, current))
    elif newer and not current.decided:
        give_up(turn, current, Trouble(newer, "engine"))
    elif newer or phases.is_impatient(turn, current):
        handle(turn, current, Report.IMPATIENCE, phases.overdue(turn, current))


# ------------------------------------------------------------------------------------------------ reports to actions
def handle(turn: Turn, current: Round, report: Report, why: Trouble, about: About = About()) -> None:
    """Look the pair up and act; then go on for as long as phases are complete. ``why``: what to say if it costs.

    Raises:
        ImpossibleTransition: the table has no entry for ``report`` in the present phase.
    """
    action = TABLE[current.phase].get(report)
    if action is None:
        raise ImpossibleTransition(
            f"round {current.name} for {current.version}: {report} in phase {current.phase} ({why.reason}); "
            f"engines {current.remaining()}, closed {sorted(map(str, current.closed))}, times {current.times}"
        )
    _ACTIONS[action](turn, current, why, about)
    if turn.fleet.round is current and current.phase is Phase.SWITCHING:
        _move_on(turn, current, report, about.engine)
    phases.advance(turn, current)


def _move_on(turn: Turn, current: Round, report: Report, engine: str) -> None:
    """After the decision: what an engine does concerns the others only where they begin to serve at once."""
    if not current.has(engine):
        names = current.remaining()
    elif report in (Report.LEFT, Report.UPDATE_OVER) and not current.engines[engine].shadow:
        names = [engine]
    else:
        names = entry.together(turn, current, engine)
    for name in names:
        entry.move_on(turn, current, name)


def give_up(turn: Turn, current: Round, why: Trouble) -> None:
    """End the round as failed. After a grant live engines are torn; else all go on with what they had."""
    current.trouble = why
    round_of = f"round {current.name} for {current.version}"
    if current.granted:
        torn = ", ".join(name for name in current.remaining() if not current.engines[name].shadow)
        then = f"{torn} stay paused until repaired" if torn else "its engines go on with what they had"
        turn.say(f"{round_of} failed after the first grant: {why.reason}; {then}", "error", event="round given up")
    else:
        turn.say(f"{round_of} is given up before anything was written: {why.reason}", "warning", event="round given up")
    entry.let_out(turn, current, entry.keep(turn, current), why)
    for name in current.remaining():
        if name in current.lenders and current.lending:
            blame.pass_over(turn, name, current.lenders[name], why.reason)
    endings.failed(turn, current)


def _note(turn: Turn, current: Round, why: Trouble, about: About) -> None:
    """It was written down where the event became a report; what is wrong with it is to be found out."""
    if about.member is None:
        return
    verdict = phases.ROWS[current.phase].judge(turn.fleet, current, about.member)
    if verdict.whole is not None:
        give_up(turn, current, verdict.whole)
    for engine, trouble in verdict.engines.items():
        _leave_out(turn, current, trouble, About(engine=engine))


def _leave_out(turn: Turn, current: Round, why: Trouble, about: About) -> None:
    """Go on without an engine and its pair: they stay paused until a round of their own brings them back."""
    unit = [name for name in turn.fleet.unit(about.engine) if current.has(name)]
    if not unit or turn.fleet.round is not current:
        return
    blame.put(turn, about.engine, why)
    if about.engine in current.lenders and current.lending and not current.decided:
        blame.pass_over(turn, about.engine, current.lenders[about.engine], why.reason)
    for name in unit:
        progress = current.engines[name]
        progress.left_out = why.reason
        serves_on = progress.serves_on and not current.decided
        then = "it serves on until another is decided" if serves_on else "it stays paused until it catches up"
        turn.say(
            f"{name} is left out of {current.version}: {why.reason}; {then}",
            "error",
            event="engine left out",
            engine=name,
        )
        turn.fleet.touch(name)
    if current.decided:
        return
    entry.let_out(turn, current, unit, why)
    if orphans := current.orphans():
        # None of them is to blame or stands still: another attempt is what costs them least.
        lost = f"{', '.join(orphans[: waits.SHOWN])} cannot take it from {about.engine}: {why.reason}"
        give_up(turn, current, Trouble(lost, why.fault))
        return
    here = len(current.remaining())
    if here < current.quorum:
        too_few = f"; {here} engines are left and a commit needs {current.quorum}" if here else ""
        give_up(turn, current, Trouble(why.reason + too_few, why.fault, why.retry))


def _leave_out_late(turn: Turn, current: Round, why: Trouble, about: About) -> None:
    late = phases.behind(turn.fleet, current)
    alone = current.wave and current.phase is not Phase.WRITING  # who takes is not to blame for who gives nothing
    everybody = current.remaining() if alone else phases.about(current)
    if len(late) == len(everybody) and not current.decided:
        for name in sorted(late) if why.fault == "engine" else ():
            blame.put(turn, name, why)
        give_up(turn, current, why)
        return
    for name in sorted(late):
        _leave_out(turn, current, Trouble(f"{name}: {why.reason}", "engine"), About(engine=name))


def _give_up(turn: Turn, current: Round, why: Trouble, about: About) -> None:
    give_up(turn, current, why)


def _drop(turn: Turn, current: Round, why: Trouble, about: About) -> None:
    agent = turn.fleet.agents.get(about.member) if about.member is not None else None
    if agent is not None:
        told = f"{agent.member} contradicts the protocol and loses its connection: {why.reason}"
        turn.say(told, "warning", event="agent dropped", engine=agent.member.engine)
        turn.do(Drop(agent.member, agent.connection, why.reason))
        turn.fleet.leave(agent.member)  # of a connection that we end ourselves nobody reports the end
        agent_lost(turn, agent.member, why.reason)


def _ignore(turn: Turn, current: Round, why: Trouble, about: About) -> None:
    pass


_ACTIONS: dict[Action, Callable[[Turn, Round, Trouble, About], None]] = {
    Action.note: _note,
    Action.leave_out: _leave_out,
    Action.leave_out_late: _leave_out_late,
    Action.give_up: _give_up,
    Action.drop: _drop,
    Action.ignore: _ignore,
}
