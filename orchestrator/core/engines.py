"""Engines outside of a round: probed, told where the daemon is, paused again, and resumed when they may serve."""

from weightsync.orchestrator.core.events import Call, CallDone, CallFailed
from weightsync.orchestrator.core.state import EngineState, Fleet
from weightsync.orchestrator.core.turn import Turn


def may_serve(fleet: Fleet, engine: str) -> bool:
    """Every rank holds the fleet's committed version, whole."""
    version = fleet.version_of(engine)
    return version is not None and version == fleet.memory.committed and not fleet.torn(engine)


def unit_may_serve(fleet: Fleet, engine: str) -> bool:
    """So does every rank of its pair: a prefill or decode engine alone has nobody to work with."""
    return all(may_serve(fleet, name) for name in fleet.unit(engine))


def must_not_serve(fleet: Fleet, engine: str) -> bool:
    """Every rank is here, and they hold something else than the fleet's committed version."""
    version, committed = fleet.version_of(engine), fleet.memory.committed
    return fleet.torn(engine) or (version is not None and committed is not None and version != committed)


def tend_engines(turn: Turn) -> None:
    """Probe idle engines, start their agents, and resume engines that we paused and that now hold what they should."""
    fleet = turn.fleet
    busy = fleet.round.engines.keys() if fleet.round is not None else frozenset()
    for name, engine in fleet.engines.items():
        if name in busy or engine.calls or turn.now < engine.probe_at:
            continue
        engine.probe_at = turn.now + fleet.policy.probe_interval
        if engine.ours_paused and fleet.attached(name) and unit_may_serve(fleet, name):
            _release(turn, name)
        elif engine.paused is False and must_not_serve(fleet, name):
            _pause_again(turn, name)
        elif engine.reachable and not fleet.ranks_of(name):
            turn.call(name, Call.ATTACH, fleet.policy.attach)
        else:
            turn.call(name, Call.PROBE, fleet.policy.probe)


def _release(turn: Turn, engine: str) -> None:
    """Resume an engine that we left paused and that holds the committed version (after a restart, or a failed call)."""
    fleet = turn.fleet
    turn.say(f"{engine} holds {fleet.memory.committed} and was left paused: it is resumed")
    turn.call(engine, Call.RESUME, fleet.policy.finish, None, fleet.memory.committed)


def _pause_again(turn: Turn, engine: str) -> None:
    """Pause an engine that was to be paused and says that it is not, or that came back with another version."""
    turn.say(f"{engine} serves another version than {turn.fleet.memory.committed}: it is paused", "warning")
    turn.fleet.engines[engine].ours_paused = True
    turn.call(engine, Call.PAUSE, turn.fleet.policy.pause)


def engine_answered(turn: Turn, event: CallDone | CallFailed, engine: EngineState) -> None:
    """Book what an answer says about the engine itself."""
    if isinstance(event, CallFailed):
        if event.reason != engine.error:
            turn.say(f"{engine.name}: {event.call} failed: {event.reason}", "warning")
        engine.error = event.reason
        engine.fault = event.fault
        if event.call in (Call.PROBE, Call.ATTACH):
            engine.reachable = False
            engine.paused = None  # another server may stand there when it answers again
        return
    if event.paused is not None:
        engine.paused = event.paused
    match event.call:
        case Call.PROBE:
            if not engine.reachable:
                engine.probe_at = turn.now  # its agents are started at once
            engine.reachable = True
            if engine.ranks:  # without agents, why ATTACH failed is what people must read
                engine.error = ""
        case Call.RESUME:
            engine.ours_paused = False
            engine.error = ""
        case _:
            engine.error = ""
