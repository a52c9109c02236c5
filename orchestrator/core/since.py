"""What engines and trainer ranks are, in one word, and since when: for people, nothing is decided by it."""

from weightsync.orchestrator.core.state import ConnectedAgent, Fleet
from weightsync.orchestrator.core.turn import Turn


def engine_word(fleet: Fleet, name: str) -> str:
    """What an engine is: serving, paused, torn, held, joining, unreachable or updating."""
    engine = fleet.engines[name]
    # The order decides: a torn engine that is unreachable, too, is to be seen as torn.
    current = fleet.round
    if current is not None and current.has(name) and (current.decided or not current.engines[name].serves_on):
        return "updating"
    if fleet.torn(name):
        return "torn"
    if not engine.reachable:
        return "unreachable" if engine.error else "joining"  # one that nobody has looked at yet is none of the two
    if not fleet.attached(name):
        return "joining"
    if fleet.version_of(name) is None:
        return "held"
    return "serving" if engine.paused is False else "paused"


def trainer_word(fleet: Fleet, agent: ConnectedAgent) -> str:
    """What a trainer rank is: writing, staged or connected."""
    if any(writer == agent.member for writer, _ in fleet.unclosed):
        return "writing"
    return "staged" if agent.staged else "connected"


def note(turn: Turn) -> None:
    """Remember when a word became another. Called with every tick, so a time is a quarter of a second late at most."""
    fleet = turn.fleet
    now = {name: engine_word(fleet, name) for name in fleet.engines}
    now |= {str(agent.member): trainer_word(fleet, agent) for agent in fleet.trainer_ranks.values()}
    same = fleet.words
    fleet.words = {
        who: same[who] if who in same and same[who][0] == word else (word, turn.now) for who, word in now.items()
    }


def since(fleet: Fleet, who: str, word: str, now: float) -> float:
    """Since when the engine or trainer rank ``who`` is ``word``, which it is ``now``."""
    before, at = fleet.words.get(who, ("", now))
    return at if before == word else now
