"""What an operator asks for. Wishes are journaled; what follows from them is found like everything else."""

from weightsync.orchestrator.core.errors import Trouble
from weightsync.orchestrator.core.events import (
    AbortAsked,
    Asked,
    DeadDeclared,
    DrainAsked,
    ForgetAsked,
    HoldAsked,
    MaintenanceAsked,
    RetryAsked,
    RollbackAsked,
)
from weightsync.orchestrator.core.membership import members, roster
from weightsync.orchestrator.core.records import EngineDrained, EngineHeld, Maintenance
from weightsync.orchestrator.core.round import blame, reports, rollback
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.names import Member


def asked(turn: Turn, event: Asked) -> None:
    """One request. Whoever sends it has seen to it that what it names exists."""
    match event:
        case HoldAsked(engine=engine, held=held):
            if held != (engine in turn.fleet.memory.holds):
                turn.append(EngineHeld(engine=engine, held=held, reason=_words(event)))
            if not held:
                _end_drain(turn, engine, event)
                roster.call_back(turn, engine, _words(event))
            if engine in turn.fleet.engines:
                turn.fleet.touch(engine)
            turn.say(
                f"{engine} is {'held' if held else 'released'}: {_words(event)}",
                "warning",
                event="operator holds",
                engine=engine,
            )
        case DrainAsked(engine=engine):
            for name in turn.fleet.unit(engine):
                if name not in turn.fleet.memory.drains:
                    turn.append(EngineDrained(engine=name, drained=True, reason=_words(event)))
                    turn.say(f"{name} is drained: {_words(event)}", "warning", event="operator drains", engine=name)
        case ForgetAsked(engine=engine):
            roster.forget(turn, engine, _words(event))
        case MaintenanceAsked(on=on):
            turn.append(Maintenance(on=on, reason=_words(event)))
            turn.say(
                f"maintenance is {'on: no round begins' if on else 'over'}: {_words(event)}",
                "warning",
                event="operator maintenance",
            )
        case AbortAsked():
            current = turn.fleet.round
            if current is not None and not current.decided:
                reports.give_up(turn, current, Trouble(f"aborted: {_words(event)}", "config"))
        case RetryAsked():
            turn.fleet.retry_at.clear()
            turn.fleet.passed_over.clear()
            for name in turn.fleet.engines:
                blame.clear(turn, name)
            turn.say(f"everything is tried again: {_words(event)}", event="operator retries")
        case RollbackAsked(step=step):
            found = rollback.found(turn.fleet, step)
            if found.objection or found.version is None:  # whoever asked has heard it, if it was so then already
                turn.say(f"no rollback: {found.objection}", "warning", event="rollback refused")
            else:
                rollback.begin(turn, found.version, found.engines, _words(event))
        case DeadDeclared(writer=writer):
            _declare_dead(turn, writer, _words(event))
        case _:
            raise TypeError(f"nobody knows what {type(event).__name__} asks for")


def _end_drain(turn: Turn, engine: str, event: Asked) -> None:
    for name in turn.fleet.unit(engine) if engine in turn.fleet.engines else ():
        if name in turn.fleet.memory.drains:
            turn.append(EngineDrained(engine=name, drained=False, reason=_words(event)))


def _declare_dead(turn: Turn, writer: Member, words: str) -> None:
    """End the grants of this rank's processes, but not of one that is connected: whoever meant it is mistaken."""
    here = turn.fleet.agents.get(writer)
    for grant, pending in list(turn.fleet.unclosed.items()):
        if grant[0] != writer:
            continue
        if here is not None and here.hello.incarnation == pending.incarnation:
            turn.say(
                f"{writer} is connected and holds the grant of round {grant[1]}; it is not dead",
                "warning",
                event="declare-dead refused",
            )
        else:
            members.grant_over(turn, *grant, f"declared dead: {words}")


def _words(event: Asked) -> str:
    return f"{event.by}: {event.reason}" if event.reason else event.by
