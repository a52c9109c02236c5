"""How a round begins: its members are frozen, and engines that cannot take part stop serving the version before."""

from weightsync.orchestrator.core.events import Call
from weightsync.orchestrator.core.records import RoundBegan
from weightsync.orchestrator.core.round import phases
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.state import Progress, Round
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.names import RoundName, Version


def begin(turn: Turn, version: Version, engines: list[str], catch_up: bool) -> None:
    """Begin a round that brings ``engines`` to ``version``; ``catch_up``: it is committed already, on others."""
    fleet = turn.fleet
    assert fleet.plan is not None
    ranks = {a.member: a.hello.incarnation for name in engines for a in fleet.ranks_of(name)}
    name = RoundName(fleet.epoch, fleet.memory.round_number + 1)
    attempt = fleet.attempts.get(version, 0) + 1
    fleet.round = current = Round(
        name=name,
        version=version,
        attempt=attempt,
        catch_up=catch_up,
        engines={engine: Progress() for engine in engines},
        ranks=ranks,
        writers=fleet.plan.writers_of(frozenset(ranks)),
        phase_began=turn.now,
        began=turn.now,
    )
    # Journaled before anything is paused: a daemon that finds it knows whose engines are its own to resume.
    turn.append(RoundBegan(round=name, version=version, attempt=attempt, engines=tuple(engines)))
    kind = "catch-up round" if catch_up else "round"
    turn.say(f"{kind} {name} begins: {version} to {', '.join(engines)}, attempt {attempt}")
    _pause_the_others(turn, version, engines)
    phases.enter(turn, current, Phase.PAUSING)
    current.times.clear()  # entering the first phase booked a phase before it, which there was none


def _pause_the_others(turn: Turn, version: Version, engines: list[str]) -> None:
    """An engine that cannot take part must not go on serving the version before."""
    for name, engine in turn.fleet.engines.items():
        if (
            name not in engines
            and engine.reachable
            and turn.fleet.version_of(name) != version
            and not engine.ours_paused
        ):
            engine.ours_paused = True
            why = engine.complaint[0] or "some rank of it or of its pair is not ready"
            turn.say(f"{name} does not take part and is paused until it catches up: {why}", "warning")
            turn.call(name, Call.PAUSE, turn.fleet.policy.pause)
