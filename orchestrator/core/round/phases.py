"""The phases of a round: what entering one commands, when it is complete, what is missing when it is late."""

from weightsync.orchestrator.core.commands import WriteMarker
from weightsync.orchestrator.core.events import Call
from weightsync.orchestrator.core.records import Decided, LiveDirty
from weightsync.orchestrator.core.round import endings
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.state import Fleet, Round, Unclosed
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.messages import Abort, Closed, Commit, Grant, Verified, Verify
from weightsync.orchestrator.protocol.names import NO_BYTES, Digest, Member, add_digests

_NEXT = {
    Phase.PAUSING: Phase.QUIESCING,
    Phase.QUIESCING: Phase.MARKING,
    Phase.MARKING: Phase.WRITING,
    Phase.WRITING: Phase.VERIFYING,
    Phase.VERIFYING: Phase.DECIDING,
    Phase.DECIDING: Phase.APPLYING,
    Phase.APPLYING: Phase.FINISHING,
    Phase.FINISHING: Phase.RESUMING,
    Phase.RESUMING: Phase.RECORDING,
}


def enter(turn: Turn, current: Round, phase: Phase) -> None:
    """Begin a phase: book the time of the last one, set the deadline, command what the phase is for."""
    current.times[current.phase.value] = current.times.get(current.phase.value, 0.0) + turn.now - current.phase_began
    current.phase, current.phase_began = phase, turn.now
    policy = turn.fleet.policy
    seconds = {
        Phase.PAUSING: policy.pause,
        Phase.QUIESCING: policy.quiesce,
        Phase.MARKING: policy.finish,
        Phase.WRITING: policy.transfer,
        Phase.VERIFYING: policy.verify,
        Phase.CANCELLING: policy.quiesce + policy.pause,
        Phase.TEARING: policy.transfer + policy.finish,
    }.get(phase, policy.finish)
    current.deadline = turn.now + seconds
    _ENTRY[phase](turn, current)


def advance(turn: Turn, current: Round) -> None:
    """Leave a complete phase."""
    if current.phase in _NEXT:
        enter(turn, current, _NEXT[current.phase])
    elif current.phase is Phase.RECORDING:
        endings.committed(turn, current)
    else:
        end_failed(turn, current)


# ------------------------------------------------------------------------------------------------------- entering
def _pause(turn: Turn, current: Round) -> None:
    for name in current.engines:
        turn.fleet.engines[name].ours_paused = True
        turn.call(name, Call.PAUSE, turn.fleet.policy.pause, current.name, current.version)


def _quiesce(turn: Turn, current: Round) -> None:
    for name in current.engines:
        turn.call(name, Call.SWITCH, turn.fleet.policy.window, current.name, current.version)


def _mark(turn: Turn, current: Round) -> None:
    current.dirty = True
    incarnations = {str(w): turn.fleet.agents[w].hello.incarnation for w in current.writers}
    reach = {str(member): incarnation for member, incarnation in current.ranks.items()}
    turn.append_and_wait(LiveDirty(round=current.name, writers=incarnations, ranks=reach))


def _write(turn: Turn, current: Round) -> None:
    fleet = turn.fleet
    assert fleet.plan is not None
    for writer, targets in current.writers.items():
        agent = fleet.agents[writer]
        reach = {target: current.ranks[target] for target in targets}
        fleet.unclosed[writer] = Unclosed(current.name, agent.hello.incarnation, reach)
        grant = Grant(
            round=current.name,
            version=current.version,
            fingerprint=agent.fingerprint,
            members=targets,
            deadline_seconds=fleet.policy.transfer * 0.9,  # the agent's deadline is the shorter one
        )
        turn.send(writer, grant)
    facts: dict[str, str | int | float] = {"round": str(current.name), "plan": fleet.plan.root}
    turn.do(WriteMarker(turn.cause, "TRANSFER_READY", current.version, facts))


def _verify(turn: Turn, current: Round) -> None:
    sums: dict[Member, tuple[Digest, int]] = dict.fromkeys(current.ranks, (NO_BYTES, 0))
    for closed in current.closed.values():
        for sent in closed.peers:
            digest, size = sums[sent.peer]
            sums[sent.peer] = (add_digests(digest, sent.digest), size + sent.bytes)
    current.expected = sums
    for member in current.ranks:
        turn.send(member, Verify(round=current.name, deadline_seconds=turn.fleet.policy.verify * 0.9))


def _decide(turn: Turn, current: Round) -> None:
    current.decided = True
    digests = {str(m): f"{v.digest[0]:016x}{v.digest[1]:016x}" for m, v in sorted(current.verified.items())}
    turn.append_and_wait(Decided(round=current.name, version=current.version, digests=digests))


def _apply(turn: Turn, current: Round) -> None:
    for member in current.ranks:  # also of engines that were left out meanwhile: their bytes are verified, too
        turn.send(member, Commit(round=current.name, version=current.version))


def _finish(turn: Turn, current: Round) -> None:
    for name in current.going():
        turn.call(name, Call.FINISH, turn.fleet.policy.finish, current.name, current.version)


def _resume(turn: Turn, current: Round) -> None:
    for name in current.going():
        turn.call(name, Call.RESUME, turn.fleet.policy.finish, current.name, current.version)


def _cancel(turn: Turn, current: Round) -> None:
    turn.say(f"round {current.name} for {current.version} is given up before anything was written: {current.reason}")
    for member in current.ranks:
        turn.send(member, Abort(round=current.name, torn=False, reason=current.reason))
    advance_cancel(turn, current)


def _tear(turn: Turn, current: Round) -> None:
    torn = f"round {current.name} for {current.version} failed after the first grant: {current.reason}"
    turn.say(f"{torn}; {', '.join(current.engines)} stay paused until repaired", "error")
    for writer in current.writers:
        turn.send(writer, Abort(round=current.name, torn=True, reason=current.reason))


_ENTRY = {
    Phase.PAUSING: _pause,
    Phase.QUIESCING: _quiesce,
    Phase.MARKING: _mark,
    Phase.WRITING: _write,
    Phase.VERIFYING: _verify,
    Phase.DECIDING: _decide,
    Phase.APPLYING: _apply,
    Phase.FINISHING: _finish,
    Phase.RESUMING: _resume,
    Phase.RECORDING: endings.record,
    Phase.CANCELLING: _cancel,
    Phase.TEARING: _tear,
}


# ------------------------------------------------------------------------------------------------------- complete
def complete(turn: Turn, current: Round) -> bool:
    """Everything that the phase waits for is here."""
    match current.phase:
        case Phase.MARKING | Phase.DECIDING | Phase.RECORDING:
            return turn.fleet.awaited is None
        case Phase.CANCELLING:
            return advance_cancel(turn, current)
        case Phase.TEARING:
            return _torn_and_left(turn, current)
        case Phase.APPLYING | Phase.FINISHING | Phase.RESUMING if not current.going():
            return True
        case Phase.QUIESCING:
            return len(current.quiesced) == len(current.ranks)
        case Phase.WRITING:
            return len(current.closed) == len(current.writers)
        case Phase.VERIFYING:
            return len(current.verified) == len(current.ranks)
        case _:
            return not missing(turn, current)


def missing(turn: Turn, current: Round) -> list[str]:
    """Who has not done what the phase waits for."""
    match current.phase:
        case Phase.PAUSING:
            return [name for name, progress in current.engines.items() if not progress.paused]
        case Phase.QUIESCING:
            return [str(member) for member in current.ranks if member not in current.quiesced]
        case Phase.WRITING:
            return [str(member) for member in current.writers if member not in current.closed]
        case Phase.VERIFYING:
            return [str(member) for member in current.ranks if member not in current.verified]
        case Phase.APPLYING | Phase.FINISHING | Phase.RESUMING:
            return missing_engines(turn, current)
        case _:
            return []


def missing_engines(turn: Turn, current: Round) -> list[str]:
    """Engines that have not done what the phase waits for; only for phases after the decision."""
    late = []
    for name in current.going():
        progress = current.engines[name]
        ranks = [m for m in current.ranks if m.engine == name]
        done = {
            Phase.APPLYING: progress.update_over
            and all(m in current.left and current.left[m].applied == current.version for m in ranks),
            Phase.FINISHING: progress.finished,
            Phase.RESUMING: progress.resumed,
        }.get(current.phase, True)
        if not done:
            late.append(name)
    return late


def overdue(turn: Turn, current: Round) -> str:
    """One sentence about a missed deadline."""
    seconds = turn.now - current.phase_began
    return f"{current.phase} took longer than {seconds:.0f} s; missing: {', '.join(missing(turn, current)) or 'nobody'}"


def trouble(turn: Turn, current: Round, member: Member | None) -> str:
    """What is wrong with the latest report of ``member``; empty when nothing is."""
    if member in current.verified:
        return _wrong_digest(member, current.verified[member], *current.expected[member])
    if member in current.closed:
        closed = current.closed[member]
        strangers = {sent.peer for sent in closed.peers} - set(current.writers[member])
        if closed.error:
            return f"{member} could not write: {closed.error}"
        if strangers:
            return f"{member} reports writes to {sorted(map(str, strangers))}, which it was not granted"
        rate = _impossible_rate(closed, turn.fleet.policy.max_bytes_per_second)
        return f"{member} reports {rate}" if rate else ""
    return ""


def _wrong_digest(member: Member, verified: Verified, digest: Digest, size: int) -> str:
    if verified.error:
        return f"{member} could not verify: {verified.error}"
    if verified.digest != digest or verified.bytes != size:
        return (
            f"{member}: digest of live memory {_hex(verified.digest)} over {verified.bytes} bytes differs from "
            f"the slots' {_hex(digest)} over {size} bytes"
        )
    return ""


def _impossible_rate(closed: Closed, ceiling: float | None) -> str:
    for peer in closed.peers:
        if ceiling is not None and peer.bytes > ceiling * peer.seconds:
            return f"{peer.bytes} bytes in {peer.seconds:.6f} s to {peer.peer}, above the link's {ceiling:.3g} bytes/s"
    return ""


def _hex(digest: Digest) -> str:
    return f"{digest[0]:016x}{digest[1]:016x}"


# ------------------------------------------------------------------------------------------------ backward, aside
def advance_cancel(turn: Turn, current: Round) -> bool:
    """Resume each engine as soon as its workers are out of the window; true when there is nothing left to wait for."""
    fleet, waiting = turn.fleet, False
    for name in current.engines:
        engine, progress = fleet.engines[name], current.engines[name]
        inside = any(agent.status.window == current.name for agent in fleet.ranks_of(name))
        if inside or engine.calls.keys() & {Call.PAUSE, Call.SWITCH, Call.RESUME}:
            waiting = True
        elif not progress.resume_tried and endings.may_serve(fleet, name):
            progress.resume_tried = True  # once here; ``fleet`` goes on trying after the round
            turn.call(name, Call.RESUME, fleet.policy.finish, current.name, fleet.version_of(name))
            waiting = True
    return not waiting


def _torn_and_left(turn: Turn, current: Round) -> bool:
    fleet = turn.fleet
    if any(_may_still_write(fleet, writer) for writer in current.writers):
        return False
    inside = [m for m in current.ranks if m in fleet.agents and m not in current.left]
    for member in inside:
        if member not in current.told:
            current.told.add(member)
            turn.send(member, Abort(round=current.name, torn=True, reason=current.reason))
    return not inside and not any(fleet.engines[name].calls.get(Call.SWITCH) for name in current.engines)


def _may_still_write(fleet: Fleet, writer: Member) -> bool:
    """A writer to wait for: it is here, and so is some target of its. What is left open keeps the next round back."""
    pending = fleet.unclosed.get(writer)
    return pending is not None and writer in fleet.agents and not pending.targets.keys().isdisjoint(fleet.agents)


def evict(turn: Turn, current: Round, engine: str, why: str) -> None:
    """Go on without an engine (and its pair): it stays paused until a round of its own brings it back."""
    pairs = {config.name: config.pair for config in turn.fleet.policy.engines}
    for name in current.going():
        if name == engine or (pairs[engine] and pairs[name] == pairs[engine]):
            current.engines[name].evicted = why
            turn.say(f"{name} is left out of {current.version}: {why}; it stays paused until it catches up", "error")
    if not current.going():
        current.reason = why
        endings.failed(turn, current)


def end_failed(turn: Turn, current: Round) -> None:
    """End the round as failed; tell whoever is still inside the window."""
    for member in current.ranks:
        if member not in current.left and current.phase is Phase.TEARING:
            turn.send(member, Abort(round=current.name, torn=True, reason=current.reason))
    endings.failed(turn, current)
