"""What each phase waits for: pure predicates that name who is missing. A phase is complete when nobody is.

They are iterators because each of a fleet's thousands of reports asks only whether there is a first one.
"""

from collections.abc import Container, Iterable, Iterator

from weightsync.orchestrator.core.events import Call
from weightsync.orchestrator.core.state import Fleet, Round
from weightsync.orchestrator.protocol.names import Member


def not_paused(fleet: Fleet, current: Round) -> Iterator[str]:
    """Engines whose pause has not answered."""
    return (name for name, progress in current.engines.items() if not progress.paused)


def not_quiesced(fleet: Fleet, current: Round) -> Iterator[str]:
    """Workers that are not inside the update call."""
    return _missing(current.ranks, current.quiesced)


def not_durable(fleet: Fleet, current: Round) -> Iterator[str]:
    """The record that must be on disk before the round goes on."""
    if fleet.awaited is not None:
        yield f"{fleet.awaited[0]} in the journal"


def not_closed(fleet: Fleet, current: Round) -> Iterator[str]:
    """Writers that may still write."""
    return _missing(current.writers, current.closed)


def not_verified(fleet: Fleet, current: Round) -> Iterator[str]:
    """Workers whose digest is not there."""
    return _missing(current.ranks, current.verified)


def not_applied(fleet: Fleet, current: Round) -> Iterator[str]:
    """Engines of which some worker does not hold the version, or whose update call has not answered."""
    return (name for name in current.remaining() if not _applied(current, name))


def not_finished(fleet: Fleet, current: Round) -> Iterator[str]:
    """Engines that have not been told the version."""
    return (name for name in current.remaining() if not current.engines[name].finished)


def not_resumed(fleet: Fleet, current: Round) -> Iterator[str]:
    """Engines whose resume has not answered."""
    return (name for name in current.remaining() if not current.engines[name].resumed)


def not_cancelled(fleet: Fleet, current: Round) -> Iterator[str]:
    """Engines with a worker inside the update call, or with a call of the round under way."""
    return (name for name in current.engines if inside(fleet, current, name) or Call.RESUME in _calls(fleet, name))


def not_torn_down(fleet: Fleet, current: Round) -> Iterator[str]:
    """Writers to wait for, then workers inside the update call, then engines where that call has not answered."""
    yield from map(str, writing(fleet, current))
    yield from map(str, workers_inside(fleet, current))
    yield from (name for name in current.engines if Call.SWITCH in _calls(fleet, name))


def writing(fleet: Fleet, current: Round) -> list[Member]:
    """Writers to wait for when a round is torn: they are here, and so is some target of theirs.

    A writer that is gone cannot say CLOSED, and writes to a target that is gone harm nobody. What they leave open keeps
    the next round back, not the end of this one.
    """
    return [writer for writer in current.writers if _may_write(fleet, writer)]


def workers_inside(fleet: Fleet, current: Round) -> list[Member]:
    """Connected workers that have not said LEFT."""
    return [member for member in current.ranks if member in fleet.agents and member not in current.left]


def inside(fleet: Fleet, current: Round, engine: str) -> bool:
    """Some worker of the engine is inside the round's update call, or the call or the pause before it is under way."""
    workers = any(agent.status.window == current.name for agent in fleet.ranks_of(engine))
    return workers or bool(_calls(fleet, engine) & {Call.PAUSE, Call.SWITCH})


def _missing(wanted: Iterable[Member], there: Container[Member]) -> Iterator[str]:
    return (str(member) for member in wanted if member not in there)


def _applied(current: Round, engine: str) -> bool:
    ranks = [member for member in current.ranks if member.engine == engine]
    all_hold = all(m in current.left and current.left[m].applied == current.version for m in ranks)
    return all_hold and current.engines[engine].update_over


def _may_write(fleet: Fleet, writer: Member) -> bool:
    pending = fleet.unclosed.get(writer)
    return pending is not None and writer in fleet.agents and not pending.targets.keys().isdisjoint(fleet.agents)


def _calls(fleet: Fleet, engine: str) -> set[Call]:
    return set(fleet.engines[engine].calls)
