"""Engines outside of a round: what each should be, what it was last seen to be, and the call that makes up for it."""

from enum import Enum

from weightsync.orchestrator.core import standby
from weightsync.orchestrator.core.events import Call, CallDone, CallFailed
from weightsync.orchestrator.core.round import blame
from weightsync.orchestrator.core.round.progress import Round
from weightsync.orchestrator.core.state import EngineState, Fleet
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.messages import Hold
from weightsync.orchestrator.protocol.names import RoundName


class Wish(Enum):
    """What an engine should be. Nothing else is kept: it follows from the fleet, after every event anew."""

    SERVE = "serve"
    PAUSE = "pause"
    AS_IT_IS = "as it is"


def wish(fleet: Fleet, engine: str) -> tuple[Wish, str]:
    """What an engine that is in no round should be, and why. The engines of a pair want the same."""
    own = _alone(fleet, engine)
    if own[0] is Wish.AS_IT_IS:
        return own
    wishes = [_alone(fleet, name) for name in fleet.unit(engine)]
    for want in (Wish.PAUSE, Wish.AS_IT_IS):
        found = next((each for each in wishes if each[0] is want), None)
        if found is not None:
            return found
    return own


def _alone(fleet: Fleet, name: str) -> tuple[Wish, str]:
    memory, current = fleet.memory, fleet.round
    if name in memory.holds:
        return Wish.PAUSE, f"the operator holds it: {memory.holds[name]}"
    if fleet.torn(name):
        return Wish.PAUSE, "its memory may be torn"
    version = fleet.version_of(name)
    if version is None and fleet.mixed(name):
        return Wish.PAUSE, "its ranks hold different versions"
    if version is None:
        return Wish.AS_IT_IS, "not every rank of it holds a version"  # a vLLM is held from its start by itself
    if current is not None and current.decided and not current.catch_up:
        if version != current.version:
            return Wish.PAUSE, f"{current.version} is decided"
        return Wish.AS_IT_IS, f"{current.version} is being committed"
    if version != memory.committed:
        return Wish.PAUSE, f"it holds {version}, not {memory.committed}"
    if current is not None and name in current.engines and not current.engines[name].shadow:
        return Wish.AS_IT_IS, f"it was left out of {current.version}, which may be decided yet"
    return Wish.SERVE, f"it holds {version}"


def tend_engines(turn: Turn) -> None:
    """Look at each engine that something happened to, or whose time has come, and that is in no round.

    One that serves on in a round is looked after like any other until the decision.
    """
    fleet = turn.fleet
    for name, engine in fleet.engines.items():
        if fleet.round is not None and fleet.round.has(name) and not _serves_on(fleet.round, name):
            continue
        if engine.touched:
            engine.touched, engine.unseen = False, True
            _hold_ranks(turn, name)  # whether or not its server answers
        due = turn.now >= engine.probe_at
        # One whose last call failed is asked again when its time comes, not at once.
        if _busy(turn, engine) or not (due or (engine.unseen and not engine.error)):
            continue
        engine.unseen = False
        if not _act(turn, name) and due:
            _look(turn, name)


def _busy(turn: Turn, engine: EngineState) -> bool:
    """A call to it is under way. One that does not answer to a switch may serve meanwhile, but not for long."""
    if not engine.calls:
        return False
    late = turn.now >= engine.switch_again_at
    return bool(engine.calls.keys() - ({Call.SWITCH} if late else set()))


def _serves_on(current: Round, name: str) -> bool:
    return current.engines[name].serves_on and not current.decided


def _act(turn: Turn, name: str) -> bool:
    """The call that the difference between wish and observation asks for, if there is one."""
    fleet, engine = turn.fleet, turn.fleet.engines[name]
    want, why = wish(fleet, name)
    if _may_switch(turn, name) and standby.owed(fleet, name):
        engine.probe_at = turn.now + fleet.policy.probe_interval
        turn.say(
            f"{name} has {fleet.memory.committed} in its standby and switches to it",
            event="standby switch",
            engine=name,
        )
        # Not earlier than any round that its workers have heard of: what they are told of an earlier one they refuse.
        newest = RoundName(fleet.epoch, fleet.memory.round_number)
        turn.call(name, Call.SWITCH, fleet.policy.finish, newest, fleet.memory.committed, _processes(fleet, name))
        return True
    waits = _has_switched(turn, name) or _has_yet_to_announce(turn, name)
    if want is Wish.PAUSE and engine.paused is False and not waits:
        engine.probe_at = turn.now + fleet.policy.probe_interval
        turn.say(f"{name} is paused: {why}", "warning", event="engine paused", engine=name)
        turn.call(name, Call.PAUSE, fleet.policy.pause)
        return True
    if want is Wish.SERVE and engine.paused and fleet.attached(name) and not _held_ranks(fleet, name):
        engine.probe_at = turn.now + fleet.policy.probe_interval
        turn.say(f"{name} is resumed: {why}", event="engine resumed", engine=name)
        turn.call(name, Call.RESUME, fleet.policy.finish, None, fleet.memory.committed, _processes(fleet, name))
        return True
    if want is Wish.SERVE and engine.switch_again_at and Call.SWITCH not in engine.calls:
        engine.switch_again_at = 0.0
        blame.clear(turn, name)  # whatever kept it from there in a round is over
    return False


def _has_switched(turn: Turn, name: str) -> bool:
    """It says that it has, and its workers, who look at what they hold now, have yet to say so."""
    engine = turn.fleet.engines[name]
    return turn.now < engine.switch_again_at and not engine.error and standby.owed(turn.fleet, name)


def _has_yet_to_announce(turn: Turn, name: str) -> bool:
    """Its workers hold what is committed, live or beside that, and have yet to say that they switch by themselves.

    A Hello comes before the layout, so a daemon that has just started waits as long as it takes to start an agent.
    """
    fleet = turn.fleet
    ranks, committed = fleet.ranks_of(name), fleet.memory.committed
    if committed is None or turn.now >= fleet.started + fleet.policy.attach:
        return False
    return any(a.announce is None for a in ranks) and all(standby.has(fleet, a, committed) for a in ranks)


def _may_switch(turn: Turn, name: str) -> bool:
    """It is paused, or serves one whole version and changes by itself; no earlier switch may still show its effect."""
    fleet, engine = turn.fleet, turn.fleet.engines[name]
    if Call.SWITCH in engine.calls or turn.now < engine.switch_again_at:
        return False
    return engine.paused is True or (standby.by_itself(fleet, name) and fleet.version_of(name) is not None)


def _processes(fleet: Fleet, name: str) -> tuple[tuple[int, int], ...]:
    return tuple((agent.member.rank, agent.hello.incarnation) for agent in fleet.ranks_of(name))


def _look(turn: Turn, name: str) -> None:
    """Start its agents, or see whether it is there and paused."""
    fleet, engine = turn.fleet, turn.fleet.engines[name]
    engine.probe_at = turn.now + fleet.policy.probe_interval
    if engine.reachable and not engine.ranks:
        turn.call(name, Call.ATTACH, fleet.policy.attach)
    else:
        turn.call(name, Call.PROBE, fleet.policy.probe)


def _hold_ranks(turn: Turn, name: str) -> None:
    """Tell the workers themselves, over their own connections: it holds where the engine's server does not answer."""
    want, why = wish(turn.fleet, name)
    if want is Wish.AS_IT_IS or _has_yet_to_announce(turn, name):
        return
    held = want is Wish.PAUSE
    for agent in turn.fleet.ranks_of(name):
        if agent.status.held != held and agent.told_hold != held:
            agent.told_hold = held
            turn.send(agent.member, Hold(held=held, reason=why if held else ""))


def _held_ranks(fleet: Fleet, name: str) -> bool:
    return any(agent.status.held for agent in fleet.ranks_of(name))


def engine_answered(turn: Turn, event: CallDone | CallFailed, engine: EngineState) -> None:
    """Book what an answer says about the engine itself."""
    turn.fleet.touch(engine.name)
    if isinstance(event, CallFailed):
        if event.reason != engine.error:
            turn.say(
                f"{engine.name}: {event.call} failed: {event.reason}",
                "warning",
                event="engine call failed",
                engine=engine.name,
            )
        engine.error, engine.fault = event.reason, event.fault
        if event.call is Call.SWITCH:  # if it runs, it is to be paused at once: it may hold what it must not serve
            engine.probe_at = turn.now
            engine.switch_again_at = turn.now + turn.fleet.policy.probe_interval
        else:
            engine.paused = None  # whether it had its effect is to be seen
        if event.call in (Call.PROBE, Call.ATTACH):
            engine.reachable = False  # another server may stand there when it answers again
        return
    if event.paused is not None:
        engine.paused = event.paused
    if event.call is Call.PROBE:
        if not engine.reachable:
            engine.probe_at = turn.now  # its agents are started at once
        engine.reachable = True
    if event.call is not Call.PROBE or engine.ranks:  # without agents, why ATTACH failed is what people must read
        engine.error = ""


def started_anew(turn: Turn, engine: str) -> None:
    """Another process stands there: what the one before did is not its fault."""
    blame.clear(turn, engine)
    state = turn.fleet.engines[engine]
    state.torn_by, state.switch_again_at = None, 0.0
    passed_over = turn.fleet.passed_over
    turn.fleet.passed_over = {pair: told for pair, told in passed_over.items() if engine not in pair}
