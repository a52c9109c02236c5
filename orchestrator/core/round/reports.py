"""One round in live mode: from the pause of the engines to COMMITTED, or back. The table is in ``transitions``."""

from collections.abc import Callable

from weightsync.orchestrator.core.errors import ImpossibleTransition
from weightsync.orchestrator.core.events import AgentSaid, Call, CallDone, CallFailed
from weightsync.orchestrator.core.round import phases
from weightsync.orchestrator.core.round.transitions import TABLE, Action, Happening, Phase
from weightsync.orchestrator.core.state import Engine, Progress, Round
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.messages import Closed, Left, Quiesced, Verified
from weightsync.orchestrator.protocol.names import Member, RoundName


def agent_said(turn: Turn, event: AgentSaid) -> None:
    """A worker or writer reports progress. Words about another round than the current one change nothing here."""
    current, message = turn.fleet.round, event.message
    if current is None or getattr(message, "round", None) != current.name:
        return
    match message:
        case Quiesced() if event.member in current.ranks:
            current.quiesced.add(event.member)
            why = f"{event.member} says QUIESCED before it was asked"
            happened(turn, current, Happening.QUIESCED, why, event.member)
        case Closed() if event.member in current.writers:
            current.closed.setdefault(event.member, message)
            why = message.error or f"{event.member} says CLOSED without a grant"
            happened(turn, current, Happening.CLOSED, why, event.member)
        case Verified() if event.member in current.ranks:
            current.verified.setdefault(event.member, message)
            why = message.error or f"{event.member} says VERIFIED before it was asked"
            happened(turn, current, Happening.VERIFIED, why, event.member)
        case Left() if event.member in current.ranks:
            current.left[event.member] = message.status
            why = f"{event.member} left the update call by itself"
            happened(turn, current, Happening.LEFT, why, event.member)
        case _:
            pass


def call_ended(turn: Turn, event: CallDone | CallFailed, engine: Engine) -> None:
    """An engine's HTTP route answered, or did not."""
    current = turn.fleet.round
    if current is None or event.engine not in current.engines:
        return
    progress = current.engines[event.engine]
    if isinstance(event, CallFailed):
        _failed_call(turn, current, progress, event)
        return
    happening = _done_call(turn, progress, event)
    if happening is not None:
        why = f"{event.engine} ended its update call before the round did"
        happened(turn, current, happening, why, Member("inference", event.engine, 0))


def _done_call(turn: Turn, progress: Progress, event: CallDone) -> Happening | None:
    if event.call is not Call.SWITCH:
        progress.http_seconds += event.seconds
    match event.call:
        case Call.PAUSE:
            progress.paused, progress.paused_at = True, turn.now
            return Happening.PAUSED
        case Call.SWITCH:
            progress.update_over = True
            return Happening.UPDATE_OVER
        case Call.FINISH:
            progress.finished = True
            return Happening.FINISHED
        case Call.RESUME:
            progress.resumed, progress.resumed_at = True, turn.now
            return Happening.RESUMED
        case _:
            return None


def _failed_call(turn: Turn, current: Round, progress: Progress, event: CallFailed) -> None:
    if event.call in (Call.PROBE, Call.ATTACH):
        return
    if event.call is Call.SWITCH:
        progress.update_over, progress.update_error = True, event.reason
    member = Member("inference", event.engine, 0)
    happened(turn, current, Happening.CALL_FAILED, f"{event.engine}: {event.call} failed: {event.reason}", member)


def agent_lost(turn: Turn, member: Member, reason: str) -> None:
    """An agent of the round lost its connection."""
    current = turn.fleet.round
    if current is None:
        return
    if member in current.writers and member not in current.closed:
        happened(turn, current, Happening.WRITER_LOST, f"{member} was lost: {reason}", member)
    elif member in current.ranks:
        happened(turn, current, Happening.RANK_LOST, f"{member} was lost: {reason}", member)


def durable(turn: Turn, name: RoundName | None) -> None:
    """The record that round ``name`` waits for is on disk; it may have ended meanwhile."""
    current = turn.fleet.round
    if current is not None and current.name == name:
        happened(turn, current, Happening.DURABLE, "", None)


def tick(turn: Turn) -> None:
    """The phase's deadline may have passed."""
    current = turn.fleet.round
    if current is not None and turn.now >= current.deadline:
        happened(turn, current, Happening.DEADLINE, phases.overdue(turn, current), None)


def happened(turn: Turn, current: Round, happening: Happening, why: str, member: Member | None) -> None:
    """Look the pair up and act; then go on for as long as phases are complete."""
    action = TABLE[current.phase].get(happening)
    if action is None:
        raise ImpossibleTransition(
            f"round {current.name} for {current.version}: {happening} in phase {current.phase} ({why}); "
            f"engines {current.going()}, closed {sorted(map(str, current.closed))}, times {current.times}"
        )
    _ACTIONS[action](turn, current, why, member)
    while turn.fleet.round is current and phases.complete(turn, current):
        phases.advance(turn, current)


def _note(turn: Turn, current: Round, why: str, member: Member | None) -> None:
    if current.phase in (Phase.WRITING, Phase.VERIFYING):  # nowhere else can a report tear
        trouble = phases.trouble(turn, current, member)
        if trouble:
            _tear(turn, current, trouble, member)


def _cancel(turn: Turn, current: Round, why: str, member: Member | None) -> None:
    current.reason = why
    phases.enter(turn, current, Phase.CANCELLING)


def _tear(turn: Turn, current: Round, why: str, member: Member | None) -> None:
    current.reason = why
    phases.enter(turn, current, Phase.TEARING)


def _evict(turn: Turn, current: Round, why: str, member: Member | None) -> None:
    assert member is not None
    phases.evict(turn, current, member.engine, why)


def _evict_missing(turn: Turn, current: Round, why: str, member: Member | None) -> None:
    for engine in phases.missing_engines(turn, current):
        phases.evict(turn, current, engine, why)


def _give_up(turn: Turn, current: Round, why: str, member: Member | None) -> None:
    phases.end_failed(turn, current)


def _ignore(turn: Turn, current: Round, why: str, member: Member | None) -> None:
    pass


_ACTIONS: dict[Action, Callable[[Turn, Round, str, Member | None], None]] = {
    Action.note: _note,
    Action.cancel: _cancel,
    Action.tear: _tear,
    Action.evict: _evict,
    Action.evict_missing: _evict_missing,
    Action.give_up: _give_up,
    Action.ignore: _ignore,
}
