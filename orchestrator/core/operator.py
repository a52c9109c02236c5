"""What an operator asks for. Wishes are journaled; what follows from them is found like everything else."""

from weightsync.orchestrator.core.errors import Trouble
from weightsync.orchestrator.core.events import (
    AbortAsked,
    Asked,
    DeadDeclared,
    HoldAsked,
    MaintenanceAsked,
    RetryAsked,
)
from weightsync.orchestrator.core.membership import members
from weightsync.orchestrator.core.records import EngineHeld, Maintenance
from weightsync.orchestrator.core.round import blame, reports
from weightsync.orchestrator.core.turn import Turn


def asked(turn: Turn, event: Asked) -> None:
    """One request. Whoever sends it has seen to it that what it names exists."""
    match event:
        case HoldAsked(engine=engine, held=held):
            if held != (engine in turn.fleet.memory.holds):
                turn.append(EngineHeld(engine=engine, held=held, reason=_words(event)))
            turn.fleet.touch(engine)
            turn.say(f"{engine} is {'held' if held else 'released'}: {_words(event)}", "warning")
        case MaintenanceAsked(on=on):
            turn.append(Maintenance(on=on, reason=_words(event)))
            turn.say(f"maintenance is {'on: no round begins' if on else 'over'}: {_words(event)}", "warning")
        case AbortAsked():
            current = turn.fleet.round
            if current is not None and not current.decided:
                reports.give_up(turn, current, Trouble(f"aborted: {_words(event)}", "config"))
        case RetryAsked():
            turn.fleet.retry_at.clear()
            for name in turn.fleet.engines:
                blame.clear(turn, name)
            turn.say(f"everything is tried again: {_words(event)}")
        case DeadDeclared(writer=writer):
            for grant in [grant for grant in turn.fleet.unclosed if grant[0] == writer]:
                members.grant_over(turn, *grant, f"declared dead: {_words(event)}")
        case _:
            raise TypeError(f"nobody knows what {type(event).__name__} asks for")


def _words(event: Asked) -> str:
    return f"{event.by}: {event.reason}" if event.reason else event.by
