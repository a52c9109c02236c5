"""Back to a version that engines have in their standby: a round without writers, and a commit of its own."""

from dataclasses import dataclass
from typing import Final

from weightsync.orchestrator.core import standby
from weightsync.orchestrator.core.records import RoundBegan
from weightsync.orchestrator.core.round import phases
from weightsync.orchestrator.core.round.begin import progress
from weightsync.orchestrator.core.round.progress import Round
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.names import RoundName, Version

SHOWN: Final = 8
"""Engines that an objection names."""


@dataclass(frozen=True, slots=True)
class Rollback:
    """What a rollback would be: to which version and on which engines, or what stands against it."""

    version: Version | None
    engines: list[str]
    objection: str = ""


def found(fleet: Fleet, step: int | None) -> Rollback:
    """The rollback to ``step``; None: to whatever version all engines that serve have beside it.

    An engine that does not serve the committed version now is not asked; it switches later if it can.
    """
    engines = [name for name in fleet.expected() if _serves(fleet, name)]
    objection = _not_now(fleet, engines)
    if objection:
        return Rollback(None, engines, objection)
    before = {name: _before(fleet, name) for name in engines}
    if step is None and len(offered := {version for version in before.values() if version is not None}) > 1:
        steps = ", ".join(sorted(str(version.step) for version in offered))
        return Rollback(None, engines, f"engines hold different versions before it (steps {steps}): name one")
    wanted = {version for version in before.values() if version is not None and step in (None, version.step)}
    lacking = [f"{name} ({_lacks(fleet, name)})" for name in engines if before[name] not in wanted]
    if lacking or len(wanted) != 1:
        what = "the version before" if step is None else f"step {step}"
        more = f" and {len(lacking) - SHOWN} more" if len(lacking) > SHOWN else ""
        return Rollback(None, engines, f"{what} is not held by {', '.join(lacking[:SHOWN])}{more}")
    return Rollback(wanted.pop(), engines)


def _serves(fleet: Fleet, name: str) -> bool:
    """Committed, whole, and not the operator's; of a pair both."""
    unit = fleet.unit(name)
    return all(
        fleet.attached(each) and each not in fleet.memory.holds and fleet.version_of(each) == fleet.memory.committed
        for each in unit
    )


def _not_now(fleet: Fleet, engines: list[str]) -> str:
    if fleet.memory.committed is None:
        return "nothing is committed yet"
    if fleet.stopping:
        return "the daemon is stopping"
    if fleet.round is not None:
        return f"round {fleet.round.name} for {fleet.round.version} is under way: abort it, or wait for its end"
    here, enough = len(engines), fleet.quorum()
    return "" if here >= enough else f"{here} engines serve {fleet.memory.committed}, and a commit needs {enough}"


def _before(fleet: Fleet, name: str) -> Version | None:
    """What all of the engine's ranks have in their standby, if it was committed before."""
    version = standby.beside(fleet, name)
    return version if version in fleet.memory.done and version != fleet.memory.committed else None


def _lacks(fleet: Fleet, name: str) -> str:
    version, mode = _before(fleet, name), standby.lands(fleet, name)
    if version is not None:
        return f"it holds step {version.step}"
    return "it holds no earlier version" + ("" if mode == "flip" else f", as always in mode {mode}")


def begin(turn: Turn, version: Version, engines: list[str], why: str) -> None:
    """Decide for ``version``, which ``found`` has found on all of ``engines``."""
    fleet = turn.fleet
    ranks = {agent.member: agent for name in engines for agent in fleet.ranks_of(name)}
    name = RoundName(fleet.epoch, fleet.memory.round_number + 1)
    fleet.round = current = Round(
        name=name,
        version=version,
        attempt=1,
        catch_up=False,
        rollback=True,
        engines={engine: progress(fleet, engine) for engine in engines},
        ranks={member: agent.hello.incarnation for member, agent in ranks.items()},
        writers={},
        quorum=fleet.quorum(),
        phase=Phase.DECIDING,
        phase_began=turn.now,
        began=turn.now,
    )
    for engine in engines:
        current.engines[engine].paused = fleet.engines[engine].paused is True
    for member, agent in ranks.items():
        current.stands_by(member, agent.status.standby_digest, 0)  # which ``believed`` has compared with the journal's
    turn.append(RoundBegan(round=name, version=version, attempt=1, engines=tuple(engines)))
    turn.say(f"rollback {name} begins: {version} to {', '.join(engines)}: {why}", "warning", event="round begins")
    phases.enter(turn, current, Phase.DECIDING)
    current.times.clear()  # as in ``begin``
