"""Whether requests should go to an engine: what a load balancer or a readiness probe asks."""

from weightsync.orchestrator.core.since import engine_word
from weightsync.orchestrator.core.state import Fleet


def readiness(fleet: Fleet, engine: str) -> tuple[bool, str] | None:
    """Whether it serves the committed version, and what it is in a few words, that any stranger may read; None: no
    such engine.

    In a round that brings the next version, an engine stays ready: requests wait for its end, and if all engines were
    taken out together, nobody would be left.
    """
    if engine not in fleet.engines:
        return None
    if engine in fleet.memory.drains:
        return False, "drained"
    word, committed, current = engine_word(fleet, engine), fleet.memory.committed, fleet.round
    if word == "serving":
        version = fleet.version_of(engine)
        return version == committed, f"serving {version}"
    if word == "updating" and current is not None and not current.catch_up and not fleet.torn(engine):
        held = {agent.status.applied for agent in fleet.ranks_of(engine)}
        whole = bool(held) and held <= {committed, *([current.version] if current.decided else [])} - {None}
        return whole, "updating" if whole else "updating: it has served nothing yet"
    if engine in fleet.memory.holds:
        return False, "held by the operator"
    return False, word
