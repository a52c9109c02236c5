"""What each phase waits for: pure predicates that name who is missing. A phase is complete when nobody is.

They are iterators because each of a fleet's thousands of reports asks only whether there is a first one.
"""

from collections.abc import Container, Iterable, Iterator
from typing import Final

from weightsync.orchestrator.core.round.progress import Round
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.protocol.names import Member

SHOWN: Final = 8
"""Members that a sentence names; a fleet may have thousands."""


def not_paused(fleet: Fleet, current: Round) -> Iterator[str]:
    """Engines that may not serve meanwhile and whose pause has not answered."""
    engines = current.engines
    return (name for name in current.remaining() if not engines[name].paused and not engines[name].serves_on)


def not_quiesced(fleet: Fleet, current: Round) -> Iterator[str]:
    """Workers that land live and are not inside the update call."""
    live = (member for member in current.remaining_ranks() if not current.engines[member.engine].shadow)
    return _missing(live, current.quiesced)


def not_exposed(fleet: Fleet, current: Round) -> Iterator[str]:
    """Workers that have not said that they count as written to."""
    written = (member for member in current.remaining_ranks() if not current.engines[member.engine].kept)
    return _missing(written, current.exposed)


def writers_away(current: Round) -> Iterator[Member]:
    """Writers of the round that have no connection, and may come back."""
    return (member for member in current.away if member in current.writers and not current.is_done(member))


def not_durable(fleet: Fleet, current: Round) -> Iterator[str]:
    """The record that must be on disk before the round goes on."""
    if fleet.awaited is not None:
        yield f"{fleet.awaited[0]} in the journal"


def not_closed(fleet: Fleet, current: Round) -> Iterator[str]:
    """Writers that may still write to an engine of the round."""
    return (str(writer) for writer in current.writing if not current.is_done(writer))


def not_verified(fleet: Fleet, current: Round) -> Iterator[str]:
    """Workers that have been written to and whose digest is not there; the trainer, if this is no version yet."""
    yield from _missing((m for m in current.remaining_ranks() if current.in_wave(m.engine)), current.verified)
    if current.ahead:
        yield f"the publish of {current.version}"


def not_serving(fleet: Fleet, current: Round) -> Iterator[str]:
    """Engines that do not serve the version."""
    return (name for name in current.remaining() if not current.engines[name].resumed)


def applied(current: Round, engine: str) -> bool:
    """Every worker of the engine has left the round with the version, and the call that it left has ended."""
    return all_hold(current, engine) and current.engines[engine].call_over


def all_hold(current: Round, engine: str) -> bool:
    """Every worker of the engine says that it has left with the version, whole."""
    said = (current.left.get(member) for member in current.by_engine[engine])
    return all(each is not None and each.whole == current.version for each in said)


# ------------------------------------------------------------------------------------------------- engines behind them
def engines_of(names: Iterable[str]) -> set[str]:
    """The engines of those who are missing, where a phase waits for engines and their workers."""
    return {name.rpartition("/")[0] if "/" in name else name for name in names}


def not_finished(current: Round) -> set[str]:
    """Engines that could not serve the version yet if they were resumed."""
    return {name for name in current.remaining() if not current.engines[name].finished}


def engines_not_closed(fleet: Fleet, current: Round) -> set[str]:
    """Engines of the round towards which some writer has not closed."""
    late: set[str] = set()
    for writer, targets in current.writing.items():
        if writer not in current.final:
            done = current.closed.get(writer, {})
            late |= {target.engine for target in targets if current.has(target.engine) and target not in done}
    return late


def _missing(wanted: Iterable[Member], there: Container[Member]) -> Iterator[str]:
    return (str(member) for member in wanted if member not in there)
