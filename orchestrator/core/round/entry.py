"""What each phase commands: once when the round enters it and, backward, again after every event."""

from weightsync.orchestrator.core import engines
from weightsync.orchestrator.core.commands import WriteMarker
from weightsync.orchestrator.core.events import Call
from weightsync.orchestrator.core.records import Committed, Decided, LiveDirty
from weightsync.orchestrator.core.round import waits
from weightsync.orchestrator.core.round.summary import summary
from weightsync.orchestrator.core.state import Round, Unclosed
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.messages import Abort, Commit, Grant, Verify
from weightsync.orchestrator.protocol.names import NO_BYTES, Digest, Member, Version, add_digests


# ------------------------------------------------------------------------------------------------ before the decision
def pause(turn: Turn, current: Round) -> None:
    """Pause every engine of the round."""
    for name in current.engines:
        turn.fleet.engines[name].ours_paused = True
        turn.call(name, Call.PAUSE, turn.fleet.policy.pause, current.name, current.version)


def quiesce(turn: Turn, current: Round) -> None:
    """Start the update call, in which every worker waits until the round lets it out."""
    for name in current.engines:
        turn.call(name, Call.SWITCH, turn.fleet.policy.update, current.name, current.version)


def mark_dirty(turn: Turn, current: Round) -> None:
    """Make durable who may write where, before anybody may: a daemon that finds this record treats them as torn."""
    current.dirty = True
    incarnations = {str(w): turn.fleet.agents[w].hello.incarnation for w in current.writers}
    reach = {str(member): incarnation for member, incarnation in current.ranks.items()}
    turn.append_and_wait(LiveDirty(round=current.name, writers=incarnations, ranks=reach))


def grant(turn: Turn, current: Round) -> None:
    """Give every writer the right to write, once."""
    fleet = turn.fleet
    assert fleet.plan is not None
    for writer, targets in current.writers.items():
        agent = fleet.agents[writer]
        reach = {target: current.ranks[target] for target in targets}
        fleet.unclosed[writer] = Unclosed(current.name, agent.hello.incarnation, reach)
        message = Grant(
            round=current.name,
            version=current.version,
            fingerprint=agent.fingerprint,
            members=targets,
            deadline_seconds=fleet.policy.agent_deadline(fleet.policy.transfer),
        )
        turn.send(writer, message)
    facts: dict[str, str | int | float] = {"round": str(current.name), "plan": fleet.plan.root}
    turn.do(WriteMarker("TRANSFER_READY", current.version, facts))


def verify(turn: Turn, current: Round) -> None:
    """Add up what each worker should hold, and ask each for what it does hold."""
    sums: dict[Member, tuple[Digest, int]] = dict.fromkeys(current.ranks, (NO_BYTES, 0))
    for closed in current.closed.values():
        for sent in closed.peers:
            digest, size = sums[sent.peer]
            sums[sent.peer] = (add_digests(digest, sent.digest), size + sent.bytes)
    current.expected = sums
    policy = turn.fleet.policy
    for member in current.ranks:
        turn.send(member, Verify(round=current.name, deadline_seconds=policy.agent_deadline(policy.verify)))


def decide(turn: Turn, current: Round) -> None:
    """Make the decision durable; from here it only goes forward."""
    current.decided = True
    digests = {str(m): f"{v.digest[0]:016x}{v.digest[1]:016x}" for m, v in sorted(current.verified.items())}
    _note_same_bytes(turn, current.version, digests)
    turn.append_and_wait(Decided(round=current.name, version=current.version, digests=digests))


def _note_same_bytes(turn: Turn, version: Version, digests: dict[str, str]) -> None:
    """Say it if every member holds what it held before: a trainer that trains changes its weights."""
    held = turn.fleet.memory.held
    before = {held[member][0] for member, digest in digests.items() if member in held and held[member][1] == digest}
    known = [member for member in digests if member in held]
    same = all(held[member][1] == digests[member] for member in known)
    if same and len(before) == 1 and version not in before:
        sentence = f"step {version.step} holds the same bytes as step {before.pop().step}"
        turn.say(f"{sentence}; does the trainer publish what it trains?", "warning")


# ------------------------------------------------------------------------------------------------- after the decision
def apply(turn: Turn, current: Round) -> None:
    """Let the workers out with the version, also those of engines that were left out: their bytes are verified, too."""
    for member in current.ranks:
        turn.send(member, Commit(round=current.name, version=current.version))


def finish(turn: Turn, current: Round) -> None:
    """Tell the engines which version they hold."""
    for name in current.remaining():
        turn.call(name, Call.FINISH, turn.fleet.policy.finish, current.name, current.version)


def resume(turn: Turn, current: Round) -> None:
    """Let the engines serve."""
    for name in current.remaining():
        turn.call(name, Call.RESUME, turn.fleet.policy.finish, current.name, current.version)


def record(turn: Turn, current: Round) -> None:
    """Make COMMITTED durable before anybody hears of it."""
    memory = turn.fleet.memory
    for name in current.remaining():
        turn.fleet.engines[name].ours_paused = False
    sequence = memory.sequence if current.catch_up else memory.sequence + 1
    # In this order: a round that has ended is not looked at again, so whoever finds it ended finds its commit.
    turn.append_and_wait(Committed(round=current.name, version=current.version, sequence=sequence))
    turn.append(summary(turn, current, "committed"))


# ------------------------------------------------------------------------------------------------------------ backward
def cancel(turn: Turn, current: Round) -> None:
    """Let the workers out as they came in."""
    turn.say(f"round {current.name} for {current.version} is given up before anything was written: {current.reason}")
    for member in current.ranks:
        turn.send(member, Abort(round=current.name, torn=False, reason=current.reason))


def resume_cancelled(turn: Turn, current: Round) -> None:
    """Resume each engine with what it had, as soon as no worker of it or of its pair is inside the update call."""
    fleet = turn.fleet
    for name, progress in current.engines.items():
        waiting = any(waits.inside(fleet, current, other) for other in fleet.unit(name))
        if waiting or progress.resume_tried or not engines.unit_may_serve(fleet, name):
            continue
        progress.resume_tried = True  # once here; ``engines.tend_engines`` goes on trying after the round
        turn.call(name, Call.RESUME, fleet.policy.finish, current.name, fleet.version_of(name))


def tear(turn: Turn, current: Round) -> None:
    """Tell the writers to stop. The workers stay inside: their memory may still be written to."""
    torn = f"round {current.name} for {current.version} failed after the first grant: {current.reason}"
    turn.say(f"{torn}; {', '.join(current.engines)} stay paused until repaired", "error")
    for writer in current.writers:
        turn.send(writer, Abort(round=current.name, torn=True, reason=current.reason))


def let_out_torn(turn: Turn, current: Round) -> None:
    """Once nobody writes any more, tell each worker inside, once, to leave as torn."""
    if waits.writing(turn.fleet, current):
        return
    for member in waits.workers_inside(turn.fleet, current):
        if member not in current.aborted:
            current.aborted.add(member)
            turn.send(member, Abort(round=current.name, torn=True, reason=current.reason))
