"""What each phase commands when the round enters it, and what is said to those who leave the round."""

from collections.abc import Iterable

from weightsync.orchestrator.core.commands import WriteMarker
from weightsync.orchestrator.core.errors import Trouble
from weightsync.orchestrator.core.events import Call
from weightsync.orchestrator.core.records import Committed, Decided, LiveDirty, Taint
from weightsync.orchestrator.core.round import waits
from weightsync.orchestrator.core.round.summary import summary
from weightsync.orchestrator.core.state import Round, Unclosed
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.messages import Abort, Commit, Expose, Grant, Verify
from weightsync.orchestrator.protocol.names import NO_BYTES, Digest, Member, Version, add_digests


# ------------------------------------------------------------------------------------------------ before the decision
def pause(turn: Turn, current: Round) -> None:
    """Pause every engine of the round."""
    for name in current.engines:
        turn.call(name, Call.PAUSE, turn.fleet.policy.pause, current.name, current.version)


def quiesce(turn: Turn, current: Round) -> None:
    """Start the update call, in which every worker waits until the round lets it out."""
    for name in current.remaining():
        turn.call(name, Call.UPDATE, turn.fleet.policy.update, current.name, current.version)


def mark_dirty(turn: Turn, current: Round) -> None:
    """Make durable who may write where, and tell the workers, before anybody may.

    A daemon that finds this record treats them as torn; a worker that never heard of it knows that it is whole.
    """
    current.writers = {
        writer: going
        for writer, targets in current.writers.items()
        if (going := tuple(target for target in targets if current.has(target.engine)))
    }
    taints = {str(writer): _taint(turn, current, writer) for writer in current.writers}
    for member in current.remaining_ranks():
        turn.send(member, Expose(round=current.name))  # first, so that they answer while the disk works
    turn.append_and_wait(LiveDirty(round=current.name, writers=taints))


def nothing(turn: Turn, current: Round) -> None:
    """What this phase waits for was asked for by the one before."""


def _taint(turn: Turn, current: Round, writer: Member) -> Taint:
    hello = turn.fleet.known(writer).hello
    reach = {str(target): current.ranks[target] for target in current.writers[writer]}
    return Taint(hello.incarnation, hello.host, hello.boot, reach)


def grant(turn: Turn, current: Round) -> None:
    """Give every writer the right to write, once."""
    fleet = turn.fleet
    assert fleet.plan is not None
    current.granted = True
    for name in current.remaining():
        fleet.engines[name].torn_by = current.version
    for writer, targets in current.writers.items():
        hello = fleet.known(writer).hello
        reach = {target: current.ranks[target] for target in targets}
        fleet.unclosed[writer, current.name] = Unclosed(hello.incarnation, hello.host, hello.boot, reach)
        grant_to(turn, current, writer)
    facts: dict[str, str | int | float] = {"round": str(current.name), "plan": fleet.plan.root}
    turn.do(WriteMarker("TRANSFER_READY", current.version, facts))


def grant_to(turn: Turn, current: Round, writer: Member) -> None:
    """The right to write to the engines that are in the round still. Said twice, it is one grant."""
    policy = turn.fleet.policy
    members = tuple(target for target in current.writers[writer] if current.has(target.engine))
    message = Grant(
        round=current.name,
        version=current.version,
        fingerprint=turn.fleet.known(writer).fingerprint,
        members=members,
        deadline_seconds=policy.agent_deadline(policy.transfer),
    )
    if members:
        turn.send(writer, message)


def verify(turn: Turn, current: Round) -> None:
    """Add up what each worker should hold, and ask each for what it does hold."""
    sums: dict[Member, tuple[Digest, int]] = dict.fromkeys(current.remaining_ranks(), (NO_BYTES, 0))
    for peers in current.closed.values():
        for target, sent in peers.items():
            if target in sums:
                digest, size = sums[target]
                sums[target] = (add_digests(digest, sent.digest), size + sent.bytes)
    current.expected = sums
    for member in sums:
        ask_to_verify(turn, current, member)


def ask_to_verify(turn: Turn, current: Round, member: Member) -> None:
    """Ask one worker for the digest of what it holds. Asked twice, it answers twice the same."""
    policy = turn.fleet.policy
    turn.send(
        member,
        Verify(round=current.name, version=current.version, deadline_seconds=policy.agent_deadline(policy.verify)),
    )


def decide(turn: Turn, current: Round) -> None:
    """Make the decision durable; from here it only goes forward."""
    current.live = tuple(current.remaining())
    verified = {member: current.verified[member] for member in sorted(current.remaining_ranks())}
    digests = {str(member): f"{v.digest[0]:016x}{v.digest[1]:016x}" for member, v in verified.items()}
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
def switch(turn: Turn, current: Round) -> None:
    """Let the workers out with the version, also of engines that are waited for no more: their bytes are verified."""
    current.switched_at = turn.now
    for engine in turn.fleet.engines.values():
        engine.touched = True  # whoever is not in the round must not go on serving the version before
    for name in current.live:
        for member in current.by_engine[name]:
            turn.send(member, Commit(round=current.name, version=current.version))


def move_on(turn: Turn, current: Round, name: str) -> None:
    """The next step of one engine towards serving the version, if it is due."""
    fleet, progress = turn.fleet, current.engines[name]
    if progress.left_out or progress.resuming:
        return
    if not progress.finishing:
        if waits.applied(current, name):
            progress.finishing, progress.applied_at = True, turn.now
            turn.call(name, Call.FINISH, fleet.policy.finish, current.name, current.version)
    elif all(current.engines[other].finished for other in _together(turn, current, name)):
        progress.resuming = True
        ranks = tuple((member.rank, current.ranks[member]) for member in current.by_engine[name])
        turn.call(name, Call.RESUME, fleet.policy.finish, current.name, current.version, ranks)


def _together(turn: Turn, current: Round, name: str) -> list[str]:
    """Engines that begin to serve at once: the whole round's, or those of a pair."""
    unit = current.remaining() if turn.fleet.policy.together else turn.fleet.unit(name)
    return [other for other in unit if current.has(other)]


def record(turn: Turn, current: Round) -> None:
    """Make COMMITTED durable before anybody hears of it."""
    memory = turn.fleet.memory
    sequence = memory.sequence if current.catch_up else memory.sequence + 1
    # In this order: a round that has ended is not looked at again, so whoever finds it ended finds its commit.
    turn.append_and_wait(Committed(round=current.name, version=current.version, sequence=sequence))
    turn.append(summary(turn, current, "committed"))


# -------------------------------------------------------------------------------------------------------- out of turn
def let_out(turn: Turn, current: Round, names: Iterable[str], why: Trouble) -> None:
    """Tell the workers of these engines to leave without the version, and the writers to write nothing more to them.

    The workers do not wait for the writers: what they hold counts as torn, whatever is still written.
    """
    gone = set(names)
    for name in gone:
        for member in current.by_engine[name]:
            turn.send(member, Abort(round=current.name, torn=current.granted, reason=why.reason))
    if current.granted:
        for writer, targets in current.writers.items():
            edges = tuple(target for target in targets if target.engine in gone)
            if edges and writer not in current.final:
                turn.send(writer, Abort(round=current.name, torn=True, reason=why.reason, members=edges))
