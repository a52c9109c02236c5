"""What agents, engines, the journal and the clock report about the round under way, and what follows from it.

An event becomes a ``Report``; ``transitions.TABLE`` names the action for it in the present phase; then the round goes
on through all phases that are complete.
"""

from collections.abc import Callable

from weightsync.orchestrator.core.errors import NO_TROUBLE, ImpossibleTransition, Trouble
from weightsync.orchestrator.core.events import AgentSaid, Call, CallDone, CallFailed
from weightsync.orchestrator.core.round import endings, phases, waits
from weightsync.orchestrator.core.round.transitions import TABLE, Action, Phase, Report
from weightsync.orchestrator.core.state import Progress, Round
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.messages import Abort, Closed, Left, Quiesced, Verified
from weightsync.orchestrator.protocol.names import Member, RoundName


# ------------------------------------------------------------------------------------------------- events to reports
def agent_said(turn: Turn, event: AgentSaid) -> None:
    """A worker or writer reports progress. Messages about another round change nothing here.

    The reason beside each report counts only in phases in which it comes out of turn.
    """
    current = turn.fleet.round
    message, member = event.message, event.member
    if current is None or getattr(message, "round", None) != current.name:
        return
    match message:
        case Quiesced() if member in current.ranks:
            current.quiesced.add(member)
            why = Trouble(f"{member} says QUIESCED before it was asked", "engine")
            handle(turn, current, Report.QUIESCED, why, member=member, engine=member.engine)
        case Closed() if member in current.writers:
            current.closed.setdefault(member, message)  # the first report is the one that counts
            reason = message.error or f"{member} says CLOSED without a grant"
            why = Trouble(reason, message.fault or "trainer", message.retry)
            handle(turn, current, Report.CLOSED, why, member=member)
        case Verified() if member in current.ranks:
            current.verified.setdefault(member, message)
            reason = message.error or f"{member} says VERIFIED before it was asked"
            why = Trouble(reason, message.fault or "engine", message.retry)
            handle(turn, current, Report.VERIFIED, why, member=member, engine=member.engine)
        case Left() if member in current.ranks:
            current.left[member] = message.status
            why = Trouble(f"{member} left the update call by itself", message.fault or "engine", message.retry)
            handle(turn, current, Report.LEFT, why, member=member, engine=member.engine)
        case _:
            pass


def call_ended(turn: Turn, event: CallDone | CallFailed) -> None:
    """A call to an engine answered, or did not."""
    current = turn.fleet.round
    if current is None or event.engine not in current.engines or event.call in (Call.PROBE, Call.ATTACH):
        return
    progress = current.engines[event.engine]
    if isinstance(event, CallFailed):
        progress.update_over = progress.update_over or event.call is Call.SWITCH
        why = Trouble(f"{event.engine}: {event.call} failed: {event.reason}", event.fault, event.retry)
        handle(turn, current, Report.CALL_FAILED, why, engine=event.engine)
        return
    why = Trouble(f"{event.engine} ended its update call before the round did", "engine")
    handle(turn, current, _done(turn, progress, event), why, engine=event.engine)


def _done(turn: Turn, progress: Progress, event: CallDone) -> Report:
    if event.call is Call.SWITCH:
        progress.update_over = True
        return Report.UPDATE_OVER
    progress.http_seconds += event.seconds
    match event.call:
        case Call.PAUSE:
            progress.paused = True
            return Report.PAUSED
        case Call.FINISH:
            progress.finished = True
            return Report.FINISHED
        case _:
            progress.resumed = True
            progress.resumed_at = turn.now
            return Report.RESUMED


def agent_lost(turn: Turn, member: Member, reason: str) -> None:
    """An agent of the round lost its connection."""
    current = turn.fleet.round
    if current is None:
        return
    lost = f"{member} was lost: {reason}"
    if member in current.writers and member not in current.closed:
        handle(turn, current, Report.WRITER_LOST, Trouble(lost, "trainer"), member=member)
    elif member in current.ranks:
        handle(turn, current, Report.RANK_LOST, Trouble(lost, "engine"), member=member, engine=member.engine)


def durable(turn: Turn, name: RoundName | None) -> None:
    """The record that round ``name`` waits for is on disk; it may have ended meanwhile."""
    current = turn.fleet.round
    if current is not None and current.name == name:
        handle(turn, current, Report.DURABLE, NO_TROUBLE)


def tick(turn: Turn) -> None:
    """The phase's deadline may have passed."""
    current = turn.fleet.round
    if current is not None and turn.now >= current.deadline:
        handle(turn, current, Report.DEADLINE, phases.overdue(turn, current))


# ------------------------------------------------------------------------------------------------ reports to actions
def handle(
    turn: Turn, current: Round, report: Report, why: Trouble, *, member: Member | None = None, engine: str = ""
) -> None:
    """Look the pair up and act; then go on for as long as phases are complete.

    Args:
        why: what to say if the report costs the round or an engine.
        member: who reports, where it is an agent.
        engine: the engine that it is about, where it is about one.

    Raises:
        ImpossibleTransition: the table has no entry for ``report`` in the present phase.
    """
    action = TABLE[current.phase].get(report)
    if action is None:
        raise ImpossibleTransition(
            f"round {current.name} for {current.version}: {report} in phase {current.phase} ({why.reason}); "
            f"engines {current.remaining()}, closed {sorted(map(str, current.closed))}, times {current.times}"
        )
    if action is Action.note and member is not None:
        wrong = phases.ROWS[current.phase].judge(current, member)
        if wrong is not None:  # only phases after a grant judge, so what is wrong may be in live memory
            action, why = Action.tear, wrong
    _ACTIONS[action](turn, current, why, engine)
    phases.advance(turn, current)


def _note(turn: Turn, current: Round, why: Trouble, engine: str) -> None:
    """It was written down where the event became a report."""


def _cancel(turn: Turn, current: Round, why: Trouble, engine: str) -> None:
    current.trouble = why
    phases.enter(turn, current, Phase.CANCELLING)


def _tear(turn: Turn, current: Round, why: Trouble, engine: str) -> None:
    current.trouble = why
    phases.enter(turn, current, Phase.TEARING)


def _evict(turn: Turn, current: Round, why: Trouble, engine: str) -> None:
    """Go on without an engine and its pair: they stay paused until a round of their own brings them back."""
    unit = turn.fleet.unit(engine)
    for name in current.remaining():
        if name in unit:
            current.engines[name].evicted = why.reason
            turn.say(
                f"{name} is left out of {current.version}: {why.reason}; it stays paused until it catches up", "error"
            )
    if not current.remaining():
        current.trouble = why
        endings.failed(turn, current)


def _evict_missing(turn: Turn, current: Round, why: Trouble, engine: str) -> None:
    for late in phases.missing(turn.fleet, current):
        if turn.fleet.round is current:  # the last eviction may have ended it
            _evict(turn, current, why, late)


def _give_up(turn: Turn, current: Round, why: Trouble, engine: str) -> None:
    if current.phase is Phase.TEARING:  # writers that do not end have kept the workers waiting
        for member in waits.workers_inside(turn.fleet, current):
            turn.send(member, Abort(round=current.name, torn=True, reason=current.reason))
    endings.failed(turn, current)


def _ignore(turn: Turn, current: Round, why: Trouble, engine: str) -> None:
    pass


_ACTIONS: dict[Action, Callable[[Turn, Round, Trouble, str], None]] = {
    Action.note: _note,
    Action.cancel: _cancel,
    Action.tear: _tear,
    Action.evict: _evict,
    Action.evict_missing: _evict_missing,
    Action.give_up: _give_up,
    Action.ignore: _ignore,
}
