"""How rounds and versions end: COMMITTED, another attempt, or FAILED."""

from weightsync.orchestrator.core.commands import WriteMarker
from weightsync.orchestrator.core.records import Committed, RoundEnded, VersionFailed
from weightsync.orchestrator.core.state import Round
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.messages import Outcome
from weightsync.orchestrator.protocol.names import RoundName, Version

MAX_BACKOFF_DOUBLINGS = 6
"""A catch-up round is tried for ever; its pauses stop growing at 64 times the first."""


def record(turn: Turn, current: Round) -> None:
    """Entry of RECORDING: COMMITTED becomes durable before anybody hears of it."""
    memory = turn.fleet.memory
    for name in current.remaining():
        turn.fleet.engines[name].ours_paused = False
    sequence = memory.sequence if current.catch_up else memory.sequence + 1
    # In this order: a round that has ended is not looked at again, so whoever finds it ended finds its commit.
    turn.append_and_wait(Committed(round=current.name, version=current.version, sequence=sequence))
    turn.append(_summary(turn, current, "committed"))


def committed(turn: Turn, current: Round) -> None:
    """The record is durable: tell the world."""
    fleet = turn.fleet
    fleet.round = None
    fleet.waiting_since.pop(current.version, None)
    fleet.attempts.pop(current.version, None)
    fleet.retry_at.clear()
    if not current.catch_up:
        mark_committed(turn, current.name, current.version, tuple(current.remaining()))
    tell_trainers(turn, current.version)


def mark_committed(turn: Turn, name: RoundName, version: Version, engines: tuple[str, ...]) -> None:
    """The COMMITTED marker, derived from the journal."""
    facts: dict[str, str | int | float] = {
        "round": str(name),
        "sequence": turn.fleet.memory.sequence,
        "engines": ", ".join(engines),
    }
    turn.fleet.marked.add(version)
    turn.do(WriteMarker("COMMITTED", version, facts))


def tell_trainers(turn: Turn, version: Version) -> None:
    """The fate of ``version`` to every trainer rank; again after a reconnect, so that no publish waits for nothing."""
    memory = turn.fleet.memory
    if version in memory.done:
        outcome = Outcome(version=version, committed=True, sequence=memory.sequence)
    elif version in memory.failed:
        outcome = Outcome(version=version, committed=False, reason=memory.failed[version])
    else:
        return
    for agent in turn.fleet.trainers():
        turn.send(agent.member, outcome)


def failed(turn: Turn, current: Round) -> None:
    """The attempt failed: another one after a while, or the version is FAILED."""
    fleet = turn.fleet
    fleet.round = None
    turn.append(_summary(turn, current, "failed"))
    fleet.attempts[current.version] = current.attempt
    wait = fleet.policy.backoff * 2 ** min(current.attempt - 1, MAX_BACKOFF_DOUBLINGS)
    fleet.retry_at[current.version] = turn.now + wait
    if current.attempt >= fleet.policy.attempts and not current.catch_up:
        fail_version(turn, current.version, f"{current.attempt} attempts failed; the last one: {current.reason}")


def fail_version(turn: Turn, version: Version, reason: str) -> None:
    """FAILED: durable, as a marker, and to the trainer."""
    turn.fleet.waiting_since.pop(version, None)
    turn.append(VersionFailed(version=version, reason=reason))
    turn.fleet.marked.add(version)
    turn.do(WriteMarker("FAILED", version, {"reason": reason}))
    turn.say(f"{version} failed: {reason}", "error")
    tell_trainers(turn, version)


def _summary(turn: Turn, current: Round, outcome: str) -> RoundEnded:
    times = dict(current.times)
    times[current.phase.value] = times.get(current.phase.value, 0.0) + turn.now - current.phase_began
    resumed = [p.resumed_at for p in current.engines.values() if p.resumed]
    if resumed:
        times["stall"] = max(resumed) - current.began
    waits = max((p.http_seconds for p in current.engines.values()), default=0.0)
    times["http"] = waits + times.get("quiescing", 0.0) + times.get("applying", 0.0)
    times["total"] = turn.now - current.began
    peers = [peer for closed in current.closed.values() for peer in closed.peers]
    verified = current.verified.values()
    times["wire"] = max((peer.seconds for peer in peers), default=0.0)
    times["apply"] = max((v.apply_seconds for v in verified), default=0.0)
    times["digest"] = max((v.digest_seconds for v in verified), default=0.0)
    staged = [agent.staged for agent in turn.fleet.trainers() if agent.staged is not None]
    times["convert"] = max((s.convert_seconds for s in staged), default=0.0)
    times["slot_digest"] = max((s.digest_seconds for s in staged), default=0.0)
    return RoundEnded(
        round=current.name,
        version=current.version,
        attempt=current.attempt,
        engines=tuple(current.engines),
        evicted=tuple(name for name, progress in current.engines.items() if progress.evicted),
        outcome=outcome,
        reason=current.reason,
        bytes=sum(peer.bytes for peer in peers),
        descriptors=sum(peer.descriptors for peer in peers),
        times={name: round(seconds, 6) for name, seconds in times.items()},
    )


def mark_again(turn: Turn) -> None:
    """Outcomes that the journal knows and a daemon did not live to put beside STABLE."""
    fleet = turn.fleet
    for seen in fleet.stable:
        generation = fleet.generation if seen.generation is None else seen.generation
        version = Version(generation, seen.step) if generation is not None else None
        if version is None or version in fleet.marked or (fleet.round is not None and fleet.round.version == version):
            continue
        fleet.marked.add(version)
        if version in fleet.memory.done:
            turn.do(WriteMarker("COMMITTED", version, {}))
        elif version in fleet.memory.failed:
            turn.do(WriteMarker("FAILED", version, {"reason": fleet.memory.failed[version]}))
        else:
            fleet.marked.discard(version)
