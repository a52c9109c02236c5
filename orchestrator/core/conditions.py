"""What a round for a version needs, in one ordered list: it is due when nothing is left, and waits for the first else.

The order is the one in which people can do something about it: the trainer first, then the engines, then time.
"""

from collections.abc import Callable, Iterable
from typing import Final

from weightsync.orchestrator.core import standby
from weightsync.orchestrator.core.round import relays
from weightsync.orchestrator.core.state import ConnectedAgent, Fleet
from weightsync.orchestrator.protocol.names import Version

SHOWN: Final = 8
"""Members that a clause names; a fleet may have thousands."""


def is_stable(fleet: Fleet, version: Version) -> bool:
    """STABLE of this step is there, empty or of this generation."""
    return any(s.step == version.step and s.generation in (None, version.generation) for s in fleet.stable)


def staged(fleet: Fleet) -> Version | None:
    """The version that all trainer ranks have staged."""
    return _of_all(fleet, _staged_by)


def converted(fleet: Fleet) -> Version | None:
    """The version that all trainer ranks have staged or are converting, some of them still."""
    return _of_all(fleet, held_by)


def held_by(fleet: Fleet, agent: ConnectedAgent) -> Version | None:
    """The version that a trainer rank has staged or is converting."""
    return agent.converting or _staged_by(fleet, agent)


def _of_all(fleet: Fleet, of: Callable[[Fleet, ConnectedAgent], Version | None]) -> Version | None:
    if not fleet.trainers_whole():
        return None
    found: Version | None = None
    for agent in fleet.trainer_ranks.values():
        version = of(fleet, agent)
        if version is None or (found is not None and version != found):
            return None
        found = version
    return found


def _staged_by(fleet: Fleet, agent: ConnectedAgent) -> Version | None:
    """What the agent's slots hold; not the version of a staging that FAILED, whose slots are being filled again."""
    report = agent.staged
    current = report is not None and report.restaged >= fleet.memory.restaged.get(report.version, 0)
    return report.version if report is not None and current else None


def is_published(fleet: Fleet, version: Version) -> bool:
    """The trainer has done its part: every rank has staged the version, and STABLE is there."""
    return staged(fleet) == version and is_stable(fleet, version)


def runs_ahead(fleet: Fleet, version: Version, now: float) -> bool:
    """A round for it may begin although the trainer still converts it: nobody stands still for it, nobody is left out
    who could take part a moment later, and what it writes is served by nobody before it is published. One attempt; what
    goes wrong in it may be the conversion itself."""
    memory = fleet.memory
    known = version in memory.done or version in memory.failed or version in fleet.attempts or memory.forgot(version)
    if known or fleet.generation != version.generation or staged(fleet) == version or converted(fleet) != version:
        return False
    wished = [name for name in fleet.usable() if name not in memory.holds and name not in memory.drains]
    taking = targets(fleet, version, now)
    return all(name in taking and standby.serves_on(fleet, name) and not unready(fleet, name) for name in wished)


def is_catch_up(fleet: Fleet, version: Version) -> bool:
    """A round for it would bring engines to what is committed already."""
    return version in fleet.memory.done


def targets(fleet: Fleet, version: Version, now: float) -> list[str]:
    """Engines that a round should bring to the version.

    One that was left out comes back by a round of its own, in which it can cost nobody anything; it takes part with
    others only where a commit needs it.
    """
    if is_catch_up(fleet, version):
        if fleet.policy.fan_out == "peers":
            return []
        lent = fleet.feed.borrowers if fleet.feed is not None else {}
        return [name for name in behind(fleet, version, now) if name not in lent]
    usable = _whole_units(fleet, version, [name for name in fleet.usable() if _may_take_part(fleet, name, now)])
    good = [name for name in usable if not _has_failed(fleet, name) or _had_its_time(fleet, name, now)]
    return good if len(good) >= fleet.quorum() else usable


def behind(fleet: Fleet, version: Version, now: float) -> list[str]:
    """Engines that a round may bring to ``version``, which is committed; one that has failed, alone."""
    if all(fleet.version_of(name) == version for name in fleet.engines):
        return []  # as nearly always
    able = [name for name in fleet.usable() if _may_take_part(fleet, name, now)]
    # Before units are looked at: the other one of its pair waits until it has switched.
    usable = _whole_units(fleet, version, [name for name in able if not _switches(fleet, name, now)])
    late = [name for name in usable if fleet.version_of(name) != version]
    alone = next((name for name in late if _has_failed(fleet, name)), None)
    return [name for name in late if not _has_failed(fleet, name)] or (
        [name for name in fleet.unit(alone) if name in late] if alone is not None else []
    )


def _may_take_part(fleet: Fleet, name: str, now: float) -> bool:
    waits = now < fleet.engines[name].retry_at
    wished = name not in fleet.memory.holds and name not in fleet.memory.drains
    return not waits and wished and not fleet.tainted(name)


def _switches(fleet: Fleet, name: str, now: float) -> bool:
    """It is brought there by a switch to its standby, unless that fails or shows no effect."""
    engine = fleet.engines[name]
    tried = engine.switch_again_at and now >= engine.switch_again_at
    return not engine.error and not tried and standby.owed(fleet, name)


def _has_failed(fleet: Fleet, name: str) -> bool:
    return any(fleet.engines[other].failures for other in fleet.unit(name))


def _had_its_time(fleet: Fleet, name: str, now: float) -> bool:
    """It has failed, could have caught up alone since, and has not: a trainer that publishes without a rest always has
    the next version in the making."""
    return all(now >= fleet.engines[other].retry_at + fleet.policy.patience for other in fleet.unit(name))


def ready(fleet: Fleet, version: Version, now: float) -> list[str]:
    """Those of them that a round can begin with at once."""
    return _whole_units(fleet, version, [name for name in targets(fleet, version, now) if not unready(fleet, name)])


def unready(fleet: Fleet, name: str) -> str:
    """What the engine itself has to do before it can be in a round; empty when it can."""
    late = [agent.member for agent in fleet.ranks_of(name) if not fleet.is_confirmed(agent.member)]
    if late:
        return f"agents that have not confirmed their edges: {named(map(str, late))}"
    if dead := fleet.dead_edge(name):
        return dead
    # Answers are told apart by number, so a second call of its kind would make the first one's answer look outdated.
    if fleet.engines[name].calls:
        return f"an answer of {name}"
    inside = [str(agent.member) for agent in fleet.ranks_of(name) if agent.status.window is not None]
    return f"workers that are still inside an earlier round: {named(inside)}" if inside else ""


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
    """Every trainer rank has staged the version, or a round for it may run ahead of that."""
    if staged(fleet) == version or runs_ahead(fleet, version, now):
        return ""
    here = {agent.member.rank for agent in fleet.trainers() if _staged_by(fleet, agent) == version}
    lacking = [f"trainer/{rank}" for rank in range(fleet.trainer_world() or 0) if rank not in here]
    if lacking:
        return f"not STAGED by {named(lacking)}"
    if not fleet.trainers():
        return "a trainer: none is connected"
    silent = [str(agent.member) for agent in fleet.trainers() if agent.announce is None]
    return f"trainer ranks that have not announced their layout: {named(silent)}"


def _not_marked(fleet: Fleet, version: Version, now: float) -> str:
    """The trainer has marked it; or it is committed and some engine has to catch up."""
    if is_catch_up(fleet, version):  # its STABLE has COMMITTED beside it and is reported no more
        return "" if version == fleet.memory.committed else f"nothing: {fleet.memory.committed} was committed after it"
    if runs_ahead(fleet, version, now):
        return ""
    return "" if is_stable(fleet, version) else f"broadcasts/step_{version.step}/STABLE is missing"


def _stopping(fleet: Fleet, version: Version, now: float) -> str:
    """The daemon is to stay."""
    return "the next start of the daemon, which is stopping" if fleet.stopping else ""


def _maintenance(fleet: Fleet, version: Version, now: float) -> str:
    """The operator lets rounds begin."""
    wish = fleet.memory.maintenance
    return f"the end of maintenance ({wish})" if wish is not None else ""


def _no_plan(fleet: Fleet, version: Version, now: float) -> str:
    """There is a plan for the present members."""
    if fleet.plan is not None:
        return "the plan" if fleet.planning else ""
    misfits = [engine.misfit for engine in fleet.engines.values() if engine.misfit]
    if misfits:
        return f"an engine that fits: {misfits[0]}"
    late = [name for name in fleet.expected() if not fleet.attached(name)]
    return f"engines that have not joined: {', '.join(late)}" if late else "the plan"


def _no_target(fleet: Fleet, version: Version, now: float) -> str:
    """Some engine needs the version and can take it."""
    here = len(targets(fleet, version, now))
    enough = 1 if is_catch_up(fleet, version) else fleet.quorum()
    if here >= enough:
        return ""
    late = [f"{name} ({why_not(fleet, name, now)})" for name in fleet.engines if fleet.version_of(name) != version]
    if not late:
        return "nothing: every engine holds it"
    few = f"{enough - here} more of " if here else ""
    return f"{few}engines that can take part: {named(late)}"


def why_not(fleet: Fleet, name: str, now: float) -> str:
    """Why the engine is in no round."""
    engine = fleet.engines[name]
    if name in fleet.memory.holds:
        return f"held: {fleet.memory.holds[name]}"
    if name in fleet.memory.drains:
        return f"drained: {fleet.memory.drains[name]}"
    if not engine.reachable:
        return engine.error or "it has not answered yet"
    if not fleet.attached(name):
        return "not all of its ranks have joined"
    if engine.misfit:
        return engine.misfit
    writers = [f"{writer} of round {grant}" for writer, grant in fleet.tainted(name)]
    if writers:
        return f"{named(writers)} may still write to it and is not proved dead"
    if engine.failures:
        return f"tried again in {max(0.0, engine.retry_at - now):.0f} s: {engine.blame.reason}"
    if standby.owed(fleet, name):
        return "it switches to what it has in its standby"
    if fleet.feed is not None and name in fleet.feed.borrowers:
        return f"{fleet.feed.lenders[name]} lends it what it serves"
    return "fan_out: peers, and none that serves it holds the same" if fleet.policy.fan_out == "peers" else "ready"


def _unready(fleet: Fleet, version: Version, now: float) -> str:
    """Every writer has confirmed its edges of the plan, and every engine is ready, or the others have waited for it."""
    late = [str(agent.member) for agent in fleet.trainers() if not fleet.is_confirmed(agent.member)]
    if late:
        return f"agents that have not confirmed their edges: {named(late)}"
    here = ready(fleet, version, now)
    wanted = targets(fleet, version, now)
    enough = 1 if is_catch_up(fleet, version) else fleet.quorum()
    overdue = now >= max(fleet.planned_at, fleet.ended_at) + fleet.policy.patience and len(here) >= enough
    if overdue:
        return ""
    if len(here) == len(wanted):
        taker = relays.awaited(fleet, now)
        return f"edges by which {taker} takes from another engine" if taker else ""
    return next(
        why for name in wanted if name not in here for other in fleet.unit(name) if (why := unready(fleet, other))
    )


def _too_early(fleet: Fleet, version: Version, now: float) -> str:
    """The pause between two attempts is over."""
    return "the next attempt" if now < fleet.retry_at.get(version, 0.0) else ""


def _other_round(fleet: Fleet, version: Version, now: float) -> str:
    """No round is under way."""
    return "" if fleet.round is None else f"the end of round {fleet.round.name}"


def named(members: Iterable[str]) -> str:
    names = list(members)
    return f"{', '.join(names[:SHOWN])}{' …' if len(names) > SHOWN else ''}"


CONDITIONS: Final[tuple[Callable[[Fleet, Version, float], str], ...]] = (
    _not_staged,
    _not_marked,
    _stopping,
    _maintenance,
    _other_round,
    _no_plan,
    _no_target,
    _unready,
    _too_early,
)
"""In their order. Each gives the clause that says what is missing, or nothing when its condition holds."""


def waits_for(fleet: Fleet, version: Version, now: float) -> str:
    """One clause: what a round for ``version`` waits for; empty when it is due."""
    return next((clause for lacking in CONDITIONS if (clause := lacking(fleet, version, now))), "")
