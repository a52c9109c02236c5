"""The phases of a round, one row each: what it commands, how long it may take, what it waits for, what comes then.

``transitions.TABLE`` says what a report does in a phase. A new phase is a row here and a row there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from weightsync.orchestrator.core.errors import Trouble
from weightsync.orchestrator.core.policy import Policy
from weightsync.orchestrator.core.round import endings, entry, judge, waits
from weightsync.orchestrator.core.round.judge import Verdict
from weightsync.orchestrator.core.round.progress import Round
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.messages import Fault
from weightsync.orchestrator.protocol.names import Member


@dataclass(frozen=True, slots=True)
class PhaseRow:
    """One phase. Only ``enter`` and an ending in ``then`` command anything; the others look."""

    enter: Callable[[Turn, Round], None]
    deadline: Callable[[Policy], float]
    """Seconds from its beginning until the report DEADLINE."""
    missing: Callable[[Fleet, Round], Iterator[str]]
    """Who has not done what the phase waits for."""
    then: Phase | Callable[[Turn, Round], None]
    """The next phase, or how the round ends, once nobody is missing."""
    late: Fault
    """Whose fault a missed deadline is."""
    judge: Callable[[Fleet, Round, Member], Verdict] = judge.nothing
    """What is wrong with the member's report that the phase waits for."""
    again: bool = False
    """WRITING comes once more before ``then``, if engines of the round take from others of it."""
    needs_writers: bool = False
    """It is not left while a writer has no connection: one that is dead tears every engine that it is granted."""


ROWS: Final[dict[Phase, PhaseRow]] = {
    Phase.PAUSING: PhaseRow(entry.pause, lambda p: p.pause, waits.not_paused, Phase.QUIESCING, "engine"),
    Phase.QUIESCING: PhaseRow(
        entry.quiesce, lambda p: p.quiesce, waits.not_quiesced, Phase.MARKING, "engine", needs_writers=True
    ),
    Phase.MARKING: PhaseRow(entry.mark_dirty, lambda p: p.finish, waits.not_durable, Phase.EXPOSING, "daemon"),
    Phase.EXPOSING: PhaseRow(
        entry.nothing, lambda p: p.finish, waits.not_exposed, Phase.WRITING, "engine", needs_writers=True
    ),
    Phase.WRITING: PhaseRow(
        entry.grant, lambda p: p.transfer, waits.not_closed, Phase.VERIFYING, "trainer", judge.closed
    ),
    Phase.VERIFYING: PhaseRow(
        entry.verify, lambda p: p.verify, waits.not_verified, Phase.DECIDING, "engine", judge.verified, again=True
    ),
    Phase.DECIDING: PhaseRow(entry.decide, lambda p: p.finish, waits.not_durable, Phase.SWITCHING, "daemon"),
    Phase.SWITCHING: PhaseRow(
        entry.switch, lambda p: 3 * p.finish, waits.not_serving, Phase.RECORDING, "engine", judge.left
    ),
    Phase.RECORDING: PhaseRow(entry.record, lambda p: p.finish, waits.not_durable, endings.committed, "daemon"),
}


def enter(turn: Turn, current: Round, phase: Phase) -> None:
    """Begin a phase: book the time of the last one, set the deadline, command what the phase is for."""
    current.times[current.phase.value] = current.times.get(current.phase.value, 0.0) + turn.now - current.phase_began
    if current.first_done is not None:
        current.waited += turn.now - current.first_done
        current.first_done = None
    current.phase = phase
    current.phase_began = turn.now
    current.deadline = turn.now + ROWS[phase].deadline(turn.fleet.policy)
    ROWS[phase].enter(turn, current)


def advance(turn: Turn, current: Round) -> None:
    """Leave the present phase, and each one after it, for as long as nobody is missing."""
    while turn.fleet.round is current:
        row = ROWS[current.phase]
        if next(row.missing(turn.fleet, current), None) is not None:
            return
        if row.needs_writers and next(waits.writers_away(current), None) is not None:
            return  # they are back, or missed, within a heartbeat
        if row.again and not current.wave and any(map(current.relays_to, current.remaining())):
            current.wave = 1
            enter(turn, current, Phase.WRITING)
        elif isinstance(row.then, Phase):
            enter(turn, current, row.then)
        else:
            row.then(turn, current)


def missing(fleet: Fleet, current: Round) -> list[str]:
    """Who has not done what the present phase waits for."""
    return list(ROWS[current.phase].missing(fleet, current))


def waits_for(fleet: Fleet, current: Round) -> str:
    """Who that is, and writers whose connection it waits for, as a list for people; empty where it is nobody."""
    late = missing(fleet, current)
    if not late and ROWS[current.phase].needs_writers:
        late = [str(writer) for writer in waits.writers_away(current)]
    more = f" and {len(late) - waits.SHOWN} more" if len(late) > waits.SHOWN else ""
    return f"{', '.join(late[: waits.SHOWN])}{more}"


def behind(fleet: Fleet, current: Round) -> set[str]:
    """Engines of the round that are not done with the present phase; none where it waits for nobody's engine."""
    if current.phase is Phase.WRITING:
        return waits.engines_not_closed(fleet, current)
    if current.phase is Phase.SWITCHING and fleet.policy.together and (unfinished := waits.not_finished(current)):
        return unfinished  # all others wait for these to be able to serve, before any of them does
    if ROWS[current.phase].missing is waits.not_durable:
        return set()
    return waits.engines_of(missing(fleet, current))


def is_impatient(turn: Turn, current: Round) -> bool:
    """Engines that are done have waited for the others for as long as the policy allows, over all phases; or one has
    that would catch up by the next round."""
    late = behind(turn.fleet, current)
    # What is written takes as long as the links let it; there ``transport.stall_seconds`` finds who hangs.
    keeps_another = current.keeps_another and current.phase is not Phase.WRITING
    if not late or (len(late) == len(_concerned(current)) and not keeps_another):
        return False  # nobody waits for another
    if current.first_done is None:
        current.first_done = turn.now
    return current.waited + turn.now - current.first_done >= turn.fleet.policy.patience


def about(current: Round) -> list[str]:
    """Engines that the present phase is about: in a wave those that are written to in it."""
    waves = current.phase in (Phase.WRITING, Phase.VERIFYING)
    return [name for name in current.remaining() if not waves or current.in_wave(name)]


def _concerned(current: Round) -> list[str]:
    """Engines that have something to do in the present phase: of those that serve on nobody waits for a pause."""
    pauses = current.phase in (Phase.PAUSING, Phase.QUIESCING)
    return [name for name in about(current) if not (pauses and current.engines[name].serves_on)]


def overdue(turn: Turn, current: Round) -> Trouble:
    """What to say about a missed deadline."""
    seconds = turn.now - current.phase_began
    late = ", ".join(missing(turn.fleet, current)[: waits.SHOWN]) or "nobody"
    reason = f"{current.phase} took longer than {seconds:.0f} s; missing: {late}"
    return Trouble(reason, ROWS[current.phase].late)


def newer_waits(turn: Turn, current: Round) -> str:
    """Why a catch-up is to end, or go on without an engine: it keeps a version from all the others."""
    waiting = [since for version, since in turn.fleet.waiting_since.items() if version != current.version]
    if not current.catch_up or not waiting or not turn.fleet.trainers_whole():
        return ""
    seconds = turn.now - max(min(waiting), current.began)
    return f"a new version has waited {seconds:.0f} s for it" if seconds >= turn.fleet.policy.patience else ""
