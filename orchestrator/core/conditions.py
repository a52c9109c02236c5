"""What a round for a version needs, in one ordered list: it is due when nothing is left, and waits for the first else.

The order is the one in which people can do something about it: the trainer first, then the engines, then time.
"""

from collections.abc import Callable, Iterable
from typing import Final

from weightsync.orchestrator.core.state import ConnectedAgent, Fleet
from weightsync.orchestrator.protocol.names import Version

SHOWN: Final = 8
"""Members that a clause names; a fleet may have thousands."""


def is_stable(fleet: Fleet, version: Version) -> bool:
    """STABLE of this step is there, empty or of this generation."""
    return any(s.step == version.step and s.generation in (None, version.generation) for s in fleet.stable)


def staged(fleet: Fleet) -> Version | None:
    """The version that all trainer ranks have staged."""
    if not fleet.trainers_whole():
        return None
    versions = {_staged_by(fleet, agent) for agent in fleet.trainers()}
    return versions.pop() if len(versions) == 1 else None


def _staged_by(fleet: Fleet, agent: ConnectedAgent) -> Version | None:
    """What the agent's slots hold; not the version of a staging that FAILED, whose slots are being filled again."""
    report = agent.staged
    current = report is not None and report.restaged >= fleet.memory.restaged.get(report.version, 0)
    return report.version if report is not None and current else None


def is_published(fleet: Fleet, version: Version) -> bool:
    """The trainer has done its part: every rank has staged the version, and STABLE is there."""
    return staged(fleet) == version and is_stable(fleet, version)


def is_catch_up(fleet: Fleet, version: Version) -> bool:
    """A round for it would bring engines to what is committed already."""
    return version in fleet.memory.done


def targets(fleet: Fleet, version: Version) -> list[str]:
    """Engines that a round should bring to the version."""
    catch_up = is_catch_up(fleet, version)
    usable = [name for name in fleet.usable() if not (catch_up and fleet.version_of(name) == version)]
    return _whole_units(fleet, version, usable)


def ready(fleet: Fleet, version: Version) -> list[str]:
    """Those of them whose every rank has confirmed its edges."""
    confirmed = [
        name for name in targets(fleet, version) if all(fleet.is_confirmed(a.member) for a in fleet.ranks_of(name))
    ]
    return _whole_units(fleet, version, confirmed)


def _whole_units(fleet: Fleet, version: Version, engines: list[str]) -> list[str]:
    """Without an engine whose pair could not be at the version after the round."""
    known = set(engines)
    return [
        name
        for name in engines
        if all(other in known or fleet.version_of(other) == version for other in fleet.unit(name))
    ]


# ------------------------------------------------------------------------------------------------------------ clauses
def _not_staged(fleet: Fleet, version: Version, now: float) -> str:
    """Every trainer rank has staged the version."""
    here = {agent.member.rank for agent in fleet.trainers() if _staged_by(fleet, agent) == version}
    lacking = [f"trainer/{rank}" for rank in range(fleet.trainer_world() or 0) if rank not in here]
    if lacking:
        return f"not STAGED by {_named(lacking)}"
    if staged(fleet) == version:
        return ""
    silent = [str(agent.member) for agent in fleet.trainers() if agent.announce is None]
    return f"trainer ranks that have not announced their layout: {_named(silent)}"


def _not_marked(fleet: Fleet, version: Version, now: float) -> str:
    """The trainer has marked it; or it is committed and some engine has to catch up."""
    if is_catch_up(fleet, version):  # its STABLE has COMMITTED beside it and is reported no more
        return "" if version == fleet.memory.committed else f"nothing: {fleet.memory.committed} was committed after it"
    return "" if is_stable(fleet, version) else f"broadcasts/step_{version.step}/STABLE is missing"


def _unclosed(fleet: Fleet, version: Version, now: float) -> str:
    """Nobody may still write for an earlier round."""
    names = [f"{writer} (round {pending.round})" for writer, pending in sorted(fleet.unclosed.items())]
    return f"writers that have not closed their grant and are not proved dead: {', '.join(names)}" if names else ""


def _no_plan(fleet: Fleet, version: Version, now: float) -> str:
    """There is a plan for the present members."""
    if fleet.plan is not None:
        return "the plan" if fleet.planning else ""
    misfits = [engine.misfit for engine in fleet.engines.values() if engine.misfit]
    if misfits:
        return f"an engine that fits: {misfits[0]}"
    late = [name for name in fleet.engines if not fleet.attached(name)]
    return f"engines that have not joined: {', '.join(late)}" if late else "the plan"


def _no_target(fleet: Fleet, version: Version, now: float) -> str:
    """Some engine needs the version and can take it."""
    if targets(fleet, version):
        return ""
    usable = set(fleet.usable())
    late = [name for name in fleet.engines if name not in usable and fleet.version_of(name) != version]
    return f"engines that can take part: {', '.join(late)}" if late else "nothing: every engine holds it"


def _unconfirmed(fleet: Fleet, version: Version, now: float) -> str:
    """Every member has confirmed its edges of the plan."""
    trainers = [agent.member for agent in fleet.trainers()]
    ranks = [agent.member for name in targets(fleet, version) for agent in fleet.ranks_of(name)]
    late = [member for member in (*trainers, *ranks) if not fleet.is_confirmed(member)]
    # Every writer must be there, but a round does not wait for ever for an engine beside others that are ready.
    overdue = now >= fleet.planned_at + fleet.policy.rendezvous and ready(fleet, version)
    if not late or (overdue and all(member.role == "inference" for member in late)):
        return ""
    return f"agents that have not confirmed their edges: {_named(map(str, late))}"


def _too_early(fleet: Fleet, version: Version, now: float) -> str:
    """The pause between two attempts is over."""
    return "the next attempt" if now < fleet.retry_at.get(version, 0.0) else ""


def _other_round(fleet: Fleet, version: Version, now: float) -> str:
    """No round is under way."""
    return "" if fleet.round is None else f"the end of round {fleet.round.name}"


def _calls_under_way(fleet: Fleet, version: Version, now: float) -> str:
    """The engines have answered every call."""
    # A probe's answer comes within its deadline. Answers are told apart by number, so a second call of its kind
    # within the round would make the first one's answer look outdated.
    busy = [name for name in ready(fleet, version) if fleet.engines[name].calls]
    return f"an answer of {', '.join(busy)}" if busy else ""


def _inside_earlier_round(fleet: Fleet, version: Version, now: float) -> str:
    """No worker is inside the update call of an earlier round."""
    # Told to leave; each will say LEFT, or leaves at its own deadline.
    agents = [agent for name in ready(fleet, version) for agent in fleet.ranks_of(name)]
    inside = [str(agent.member) for agent in agents if agent.status.window is not None]
    return f"workers that are still inside an earlier round: {_named(inside)}" if inside else ""


def _named(members: Iterable[str]) -> str:
    names = list(members)
    return f"{', '.join(names[:SHOWN])}{' …' if len(names) > SHOWN else ''}"


CONDITIONS: Final[tuple[Callable[[Fleet, Version, float], str], ...]] = (
    _not_staged,
    _not_marked,
    _unclosed,
    _no_plan,
    _no_target,
    _unconfirmed,
    _too_early,
    _other_round,
    _calls_under_way,
    _inside_earlier_round,
)
"""In their order. Each gives the clause that says what is missing, or nothing when its condition holds."""


def waits_for(fleet: Fleet, version: Version, now: float) -> str:
    """One clause: what a round for ``version`` waits for; empty when it is due."""
    return next((clause for lacking in CONDITIONS if (clause := lacking(fleet, version, now))), "")
