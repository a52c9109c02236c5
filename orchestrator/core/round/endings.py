"""How rounds and versions end: COMMITTED, another attempt, or FAILED."""

from weightsync.orchestrator.core.commands import WriteMarker
from weightsync.orchestrator.core.memory import REMEMBERED_VERSIONS, keep_newest
from weightsync.orchestrator.core.records import StagedAgain, VersionFailed
from weightsync.orchestrator.core.round.blame import backoff
from weightsync.orchestrator.core.round.progress import Round
from weightsync.orchestrator.core.round.summary import summary
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.messages import Outcome, Staged
from weightsync.orchestrator.protocol.names import RoundName, Version


def committed(turn: Turn, current: Round) -> None:
    """The record is durable: tell the world."""
    fleet = turn.fleet
    _over(turn, current)
    fleet.waiting_since.pop(current.version, None)
    fleet.first_attempt.pop(current.version, None)
    fleet.attempts = {version: n for version, n in fleet.attempts.items() if version in fleet.waiting_since}
    fleet.retry_at.clear()  # what kept other versions from succeeding may be gone, too
    if not current.catch_up:
        mark_committed(turn, current.name, current.version, current.live)
    if not current.rollback:
        tell_trainers(turn, current.version)


def mark_committed(turn: Turn, name: RoundName, version: Version, engines: tuple[str, ...]) -> None:
    """The COMMITTED marker, derived from the journal."""
    facts: dict[str, str | int | float] = {
        "round": str(name),
        "sequence": turn.fleet.memory.sequence,
        "engines": ", ".join(engines),
        **_restaged(turn, version),
    }
    _note_marked(turn, version)
    turn.do(WriteMarker("COMMITTED", version, facts))


def tell_trainers(turn: Turn, version: Version) -> None:
    """The result of ``version`` to every trainer rank; again after a reconnect, so that no publish waits for ever."""
    memory = turn.fleet.memory
    restaged = memory.restaged.get(version, 0)
    if version in memory.done:
        outcome = Outcome(version=version, committed=True, sequence=memory.done[version], restaged=restaged)
    elif version in memory.failed:
        outcome = Outcome(version=version, committed=False, reason=memory.failed[version], restaged=restaged)
    else:
        return
    for agent in turn.fleet.trainers():
        staged = agent.staged
        if outcome.committed and staged is not None and staged.version == version and staged.restaged > restaged:
            turn.send(agent.member, _refusal(staged))
        else:
            turn.send(agent.member, outcome)


def _refusal(staged: Staged) -> Outcome:
    """Of a version that another daemon has called FAILED, and that is staged again though this one has committed it.

    The engines hold the bytes of the staging before, which need not be those in the slots now.
    """
    why = "an earlier staging of it is committed; publish another step"
    return Outcome(version=staged.version, committed=False, reason=why, restaged=staged.restaged)


def failed(turn: Turn, current: Round) -> None:
    """The attempt failed: another one after a while, or the version is FAILED.

    A version is not tried again after a ``Trouble`` without ``retry``, or when its time is over; unless some engine is
    torn by it, which only another attempt can repair, perhaps the one that finds the cause gone.
    """
    fleet = turn.fleet
    turn.append(summary(turn, current, "failed"))
    _over(turn, current)
    fleet.attempts[current.version] = current.attempt
    fleet.retry_at[current.version] = turn.now + backoff(fleet.policy.backoff, current.attempt)
    if current.catch_up:
        return  # the version is committed; what failed is one more attempt to bring an engine to it
    tears = current.granted and any(not progress.shadow for progress in current.engines.values())
    if tears or fleet.torn_by(current.version):
        return
    if not current.trouble.retry:
        fail_version(turn, current.version, f"{current.reason}; another attempt would fail in the same way")
    elif current.ahead:
        del fleet.first_attempt[current.version]  # its time begins when it is published
    elif turn.now >= fleet.first_attempt[current.version] + fleet.policy.retry:
        fail_version(turn, current.version, f"{current.attempt} attempts failed; the last one: {current.reason}")


def _over(turn: Turn, current: Round) -> None:
    """There is no round any more; its engines are looked after one by one, its open grants outlive it."""
    fleet = turn.fleet
    fleet.round = fleet.awaited = None
    fleet.ended_at = turn.now
    for engine in fleet.engines.values():
        engine.touched = True
    for (_, name), pending in fleet.unclosed.items():
        pending.outlived = pending.outlived or name == current.name


def fail_version(turn: Turn, version: Version, reason: str) -> None:
    """FAILED: durable, as a marker, and to the trainer."""
    turn.fleet.waiting_since.pop(version, None)
    turn.fleet.first_attempt.pop(version, None)
    turn.append(VersionFailed(version=version, reason=reason))
    _note_marked(turn, version)
    turn.do(WriteMarker("FAILED", version, {"reason": reason, **_restaged(turn, version)}))
    turn.say(f"{version} failed: {reason}", "error", event="version failed")
    tell_trainers(turn, version)


def staged_again(turn: Turn, version: Version, restaged: int) -> None:
    """A trainer rank has staged ``version``; if this is a later staging than we know of, it begins anew.

    It had FAILED, by our word or by another daemon's of a copied state directory.
    """
    fleet = turn.fleet
    if version in fleet.memory.done or restaged <= fleet.memory.restaged.get(version, 0):
        return  # the staging that failed: its other ranks may say STAGED only now
    turn.append(StagedAgain(version=version, restaged=restaged))
    fleet.marked.pop(version, None)
    fleet.attempts.pop(version, None)
    fleet.retry_at.pop(version, None)
    turn.say(f"{version}, which had failed, is staged again", event="version staged again")


def mark_again(turn: Turn) -> None:
    """Write markers for outcomes that an earlier daemon recorded but crashed before marking."""
    fleet = turn.fleet
    for seen in fleet.stable:
        generation = fleet.generation if seen.generation is None else seen.generation
        version = Version(generation, seen.step) if generation is not None else None
        if version is None or version in fleet.marked or (fleet.round is not None and fleet.round.version == version):
            continue
        if version in fleet.memory.done:
            turn.do(WriteMarker("COMMITTED", version, _restaged(turn, version)))
        elif version in fleet.memory.failed:
            facts = {"reason": fleet.memory.failed[version], **_restaged(turn, version)}
            turn.do(WriteMarker("FAILED", version, facts))
        else:
            continue
        _note_marked(turn, version)  # once for each daemon, whether or not the file can be written


def _note_marked(turn: Turn, version: Version) -> None:
    keep_newest(turn.fleet.marked, version, None, REMEMBERED_VERSIONS)


def _restaged(turn: Turn, version: Version) -> dict[str, str | int | float]:
    """What a marker says of a version that was staged again: an outcome of an earlier staging is not this one's."""
    again = turn.fleet.memory.restaged.get(version, 0)
    return {"restaged": again} if again else {}
