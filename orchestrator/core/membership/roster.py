"""Which engines are members: those of the configuration, which may change, and those that were admitted; but not those
that were forgotten."""

from weightsync.orchestrator.core.commands import Drop
from weightsync.orchestrator.core.memory import Memory
from weightsync.orchestrator.core.policy import EngineConfig, Policy
from weightsync.orchestrator.core.records import EngineForgotten
from weightsync.orchestrator.core.round import reports
from weightsync.orchestrator.core.state import EngineState, Fleet
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.application import Applicant
from weightsync.orchestrator.protocol.text import clean


def members(policy: Policy, memory: Memory) -> dict[str, EngineConfig]:
    """Every engine that is to be a member, by name: in the configuration's order, then in that of coming."""
    return {name: config for name, config in known(policy, memory).items() if name not in memory.forgotten_engines}


def known(policy: Policy, memory: Memory) -> dict[str, EngineConfig]:
    """Those and the forgotten ones."""
    admitted = (EngineConfig(each.name, each.pair, each.urls) for each in memory.admitted.values())
    return {config.name: config for config in (*policy.engines, *admitted)}


def evaluate(turn: Turn) -> None:
    """Take in the engines that are to be members and let go those that are not; of a round under way, at its end."""
    fleet = turn.fleet
    if _lists(fleet) == fleet.lists:
        return
    _end_of_lists(turn)
    wanted = members(fleet.policy, fleet.memory)
    for name, config in wanted.items():
        engine = fleet.engines.get(name)
        if engine is None:
            fleet.engines[name] = EngineState(name, config.pair, heard=turn.now, probe_at=turn.now)
            turn.say(f"{name} is a member", event="engine joins", engine=name)
        elif engine.pair != config.pair:
            engine.pair = config.pair
            fleet.touch(name)
    for name in [name for name in fleet.engines if name not in wanted]:
        if fleet.round is not None and fleet.round.has(name):
            there = fleet.policy.quorum(len(wanted.keys() - fleet.memory.drains.keys()))
            fleet.round.quorum = min(fleet.round.quorum, there)  # a commit does not need who is not there to be
            reports.leaves(turn, name, f"{name} is no member any more")
        if fleet.round is None or not fleet.round.concerns(name):
            let_go(turn, name)
    if list(fleet.engines) != list(wanted):
        # In the order of the lists, which decides whose layout counts where two contradict each other.
        order = {name: fleet.engines[name] for name in wanted}
        fleet.engines = {**order, **fleet.engines}
    if len(fleet.engines) == len(wanted):
        fleet.lists = _lists(fleet)  # nobody is to be let go at the end of a round


def _lists(fleet: Fleet) -> tuple[Policy, list[Applicant], list[str], list[str]]:
    """All that decides who is to be a member, and who is one."""
    memory = fleet.memory
    return fleet.policy, [*memory.admitted.values()], [*memory.forgotten_engines], [*fleet.engines]


def _end_of_lists(turn: Turn) -> None:
    """A forgotten engine that nobody names any more is a member when the configuration names it again."""
    fleet = turn.fleet
    if not fleet.memory.forgotten_engines:
        return
    names = known(fleet.policy, fleet.memory).keys()
    for name in [name for name in fleet.memory.forgotten_engines if name not in names]:
        gone = "the configuration does not name it any more"
        turn.append(EngineForgotten(engine=name, forgotten=False, reason=gone))


def let_go(turn: Turn, name: str) -> None:
    """End its agents' connections, and know nothing of it any more."""
    fleet = turn.fleet
    for agent in fleet.ranks_of(name):
        turn.do(Drop(agent.member, agent.connection, f"{name} is no member of this fleet any more"))
        fleet.leave(agent.member)
    for member in [member for member in fleet.gone if member.role == "inference" and member.engine == name]:
        del fleet.gone[member]
    del fleet.engines[name]
    fleet.planned_for = frozenset()  # the trainer is not to keep edges to it
    turn.say(f"{name} is no member any more", "warning", event="engine leaves", engine=name)


def forget(turn: Turn, engine: str, reason: str) -> None:
    """Let an engine and its pair go: nobody waits for them, and their agents are refused."""
    fleet = turn.fleet
    for name in fleet.unit(engine):
        turn.append(EngineForgotten(engine=name, forgotten=True, reason=reason))
        turn.say(
            clean(f"{name} is forgotten: {'; '.join([reason, *dangers(fleet, name)])}"),
            "warning",
            event="engine forgotten",
            engine=name,
        )


def dangers(fleet: Fleet, name: str) -> list[str]:
    """What is not over with an engine that is forgotten, for whoever forgets it."""
    found = []
    if fleet.torn(name):
        found.append("its memory may be torn: it stays paused, end it")
    elif fleet.version_of(name) is not None and not fleet.engines[name].paused:
        found.append(f"it goes on serving {fleet.version_of(name)} unwatched: end it, or take it out of balancing")
    found += [f"{writer} of round {name} may still write into it" for writer, name in fleet.tainted(name)]
    return found


def call_back(turn: Turn, engine: str, reason: str) -> None:
    """A forgotten engine is a member again, and its pair."""
    fleet = turn.fleet
    engines = known(fleet.policy, fleet.memory)
    pair = engines[engine].pair if engine in engines else ""
    unit = [config.name for config in engines.values() if config.pair == pair] if pair else [engine]
    for name in unit:
        if name in fleet.memory.forgotten_engines:
            turn.append(EngineForgotten(engine=name, forgotten=False, reason=reason))
