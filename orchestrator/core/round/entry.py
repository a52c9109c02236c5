"""What each phase commands when the round enters it, and what is said to those who leave the round."""

from collections.abc import Iterable

from weightsync.orchestrator.core.commands import WriteMarker
from weightsync.orchestrator.core.errors import Trouble
from weightsync.orchestrator.core.events import Call
from weightsync.orchestrator.core.records import Committed, Decided, LiveDirty, Taint
from weightsync.orchestrator.core.round import blame, judge, waits
from weightsync.orchestrator.core.round.progress import KeptStandby, Round
from weightsync.orchestrator.core.round.summary import summary
from weightsync.orchestrator.core.standby import hex_digest
from weightsync.orchestrator.core.state import Unclosed
from weightsync.orchestrator.core.turn import Turn
from weightsync.orchestrator.protocol.messages import Abort, Commit, Expose, Grant, Verify
from weightsync.orchestrator.protocol.names import NO_BYTES, Digest, Member, Version, add_digests


# ------------------------------------------------------------------------------------------------ before the decision
def pause(turn: Turn, current: Round) -> None:
    """Pause every engine of the round that may not serve while its bytes arrive."""
    for name, progress in current.engines.items():
        if not progress.serves_on:
            _pause(turn, current, name)


def _pause(turn: Turn, current: Round, name: str) -> None:
    progress = current.engines[name]
    progress.pausing, progress.paused_at = True, turn.now
    turn.call(name, Call.PAUSE, turn.fleet.policy.pause, current.name, current.version)


def quiesce(turn: Turn, current: Round) -> None:
    """Start the update call of those that land live, in which every worker waits until the round lets it out."""
    for name in current.remaining():
        progress = current.engines[name]
        if not progress.shadow:
            progress.switching = True
            turn.call(name, Call.UPDATE, turn.fleet.policy.update, current.name, current.version)


def mark_dirty(turn: Turn, current: Round) -> None:
    """Make durable who may write where, and tell the workers, before anybody may.

    A daemon that finds this record treats live ones as torn; a worker that never heard of it knows that it is whole.
    """
    current.writers = {
        writer: going
        for writer, targets in current.writers.items()
        if (going := tuple(target for target in targets if current.has(target.engine)))
    }
    taints = {str(writer): _taint(turn, current, writer) for writer in current.writers}
    for member in current.remaining_ranks():
        expose(turn, current, member)  # first, so that they answer while the disk works
    turn.append_and_wait(LiveDirty(round=current.name, writers=taints))


def expose(turn: Turn, current: Round, member: Member) -> None:
    """Tell a worker that it may be written to, and by which of its edges. Said twice, it is answered twice; to one that
    has all of the version, it would be the end of that."""
    if not current.engines[member.engine].kept:
        turn.send(member, Expose(round=current.name, relays=current.relays_to(member.engine)))


def nothing(turn: Turn, current: Round) -> None:
    """What this phase waits for was asked for by the one before."""


def _taint(turn: Turn, current: Round, writer: Member) -> Taint:
    hello = turn.fleet.known(writer).hello
    reach = {str(target): current.ranks[target] for target in current.writers[writer]}
    return Taint(hello.incarnation, hello.host, hello.boot, reach, writer.engine)


def grant(turn: Turn, current: Round) -> None:
    """Give every writer of this wave the right to write, once."""
    fleet = turn.fleet
    current.granted = True
    for name in current.remaining():
        fleet.engines[name].torn_by = current.version
    if current.wave:
        taking = (member for member in current.remaining_ranks() if current.relays_to(member.engine))
        current.lent = {member: current.verified[_lender(current, member)].digest for member in taking}
    turns = {name for name in current.remaining() if current.in_wave(name)}
    going = {w: tuple(target for target in to if target.engine in turns) for w, to in current.writers.items()}
    current.writing = {writer: targets for writer, targets in going.items() if targets}
    for writer, targets in current.writing.items():
        hello = fleet.known(writer).hello
        reach = {target: current.ranks[target] for target in targets}
        fleet.unclosed[writer, current.name] = Unclosed(hello.incarnation, hello.host, hello.boot, reach)
        grant_to(turn, current, writer)
    if not current.wave and not current.ahead:
        mark_granted(turn, current)


def mark_granted(turn: Turn, current: Round) -> None:
    """The TRANSFER_READY marker, beside the STABLE of what is written."""
    facts: dict[str, str | int | float] = {"round": str(current.name), "plan": current.plan.root}
    turn.do(WriteMarker("TRANSFER_READY", current.version, facts))


def _lender(current: Round, member: Member) -> Member:
    """The rank that holds what ``member`` will hold."""
    return Member("inference", current.lenders[member.engine], member.rank)


def grant_to(turn: Turn, current: Round, writer: Member) -> None:
    """The right to write to the engines that are in the round still. Said twice, it is one grant."""
    policy = turn.fleet.policy
    members = tuple(target for target in current.writers[writer] if current.has(target.engine))
    message = Grant(
        round=current.name,
        version=current.version,
        fingerprint=current.plan_of(writer).connects[writer].fingerprint,
        members=members,
        deadline_seconds=policy.agent_deadline(policy.transfer),
        trace=current.trace,
    )
    if members:
        turn.send(writer, message)


def verify(turn: Turn, current: Round) -> None:
    """Add up what each worker should hold, and ask each for what it does hold."""
    asked = list(filter(current.owes_a_digest, current.remaining_ranks()))
    current.expected |= _owed(current, asked)
    for member in asked:
        ask_to_verify(turn, current, member)


def _owed(current: Round, members: Iterable[Member]) -> dict[Member, tuple[Digest, int]]:
    """Digest and bytes of what these should hold, as their writers have told."""
    sums: dict[Member, tuple[Digest, int]] = dict.fromkeys(members, (NO_BYTES, 0))
    for peers in current.closed.values():
        for target, sent in peers.items():
            if target in sums:
                digest, size = sums[target]
                sums[target] = (add_digests(digest, sent.digest), size + sent.bytes)
    # What a lender says that it sent was compared with that when it said it.
    return {member: (current.lent.get(member, digest), size) for member, (digest, size) in sums.items()}


def ask_to_verify(turn: Turn, current: Round, member: Member) -> None:
    """Ask one worker for the digest of what it holds. Asked twice, it answers twice the same."""
    policy = turn.fleet.policy
    turn.send(
        member,
        Verify(
            round=current.name,
            version=current.version,
            deadline_seconds=policy.agent_deadline(policy.verify),
            trace=current.trace,
        ),
    )


def decide(turn: Turn, current: Round) -> None:
    """Make the decision durable; from here it only goes forward."""
    current.live = tuple(current.remaining())
    verified = {member: current.verified[member] for member in sorted(current.remaining_ranks())}
    digests = {str(member): hex_digest(report.digest) for member, report in verified.items()}
    _note_same_bytes(turn, current.version, digests)
    turn.append_and_wait(Decided(round=current.name, version=current.version, digests=digests))


def _note_same_bytes(turn: Turn, version: Version, digests: dict[str, str]) -> None:
    """Say it if every member holds what it held before: a trainer that trains changes its weights."""
    held = {member: turn.fleet.memory.held[member][0] for member in digests if member in turn.fleet.memory.held}
    before = {of for member, (of, digest) in held.items() if digest == digests[member]}
    same = all(digest == digests[member] for member, (_, digest) in held.items())
    if same and len(before) == 1 and version not in before:
        sentence = f"step {version.step} holds the same bytes as step {before.pop().step}"
        turn.say(f"{sentence}; does the trainer publish what it trains?", "warning", event="same bytes")


# ------------------------------------------------------------------------------------------------- after the decision
def switch(turn: Turn, current: Round) -> None:
    """Have every engine serve the version. Workers of live ones are let out, also of engines that are waited for no
    more: their bytes are verified."""
    current.switched_at = turn.now
    for engine in turn.fleet.engines.values():
        engine.touched = True  # whoever is not in the round must not go on serving the version before
    for name in current.live:
        progress = current.engines[name]
        if progress.shadow:
            move_on(turn, current, name)
            continue
        for member in current.by_engine[name]:
            turn.send(member, Commit(round=current.name, version=current.version, trace=current.trace))


def move_on(turn: Turn, current: Round, name: str) -> None:
    """The next step of one engine towards serving the version, if it is due."""
    fleet, progress = turn.fleet, current.engines[name]
    if progress.left_out or progress.resuming or progress.resumed:
        return
    if progress.shadow and not progress.switching:
        _switch(turn, current, name)
        return
    if not progress.finishing:
        if not waits.applied(current, name):
            return
        progress.finishing, progress.applied_at = True, turn.now
        if not progress.shadow:
            turn.call(name, Call.FINISH, fleet.policy.finish, current.name, current.version)
            return
        progress.finished, progress.finished_at = True, turn.now  # the switch has told it the version
    others = together(turn, current, name)
    if all(current.engines[other].finished for other in others):
        for other in others:
            _serve(turn, current, other)


def _switch(turn: Turn, current: Round, name: str) -> None:
    """Its standby becomes what it serves: between two steps, or, with others, once all of them are paused."""
    progress, others = current.engines[name], together(turn, current, name)
    if not progress.paused and not (progress.boundary and others == [name]):
        if not progress.pausing:
            _pause(turn, current, name)
        return
    if all(current.engines[other].paused for other in others if other != name):
        progress.switching = True
        turn.fleet.engines[name].torn_by = current.version
        turn.call(name, Call.SWITCH, turn.fleet.policy.finish, current.name, current.version, _ranks(current, name))


def _serve(turn: Turn, current: Round, name: str) -> None:
    """It may serve the version, and does so if it is not paused."""
    fleet, progress = turn.fleet, current.engines[name]
    if progress.resuming or progress.resumed:
        return
    if progress.paused and not any(other in fleet.memory.holds for other in fleet.unit(name)):
        progress.resuming = True
        turn.call(name, Call.RESUME, fleet.policy.finish, current.name, current.version, _ranks(current, name))
    else:
        serves(turn, current, name)


def serves(turn: Turn, current: Round, name: str) -> None:
    """It serves the version, or would if the operator did not hold it."""
    progress = current.engines[name]
    progress.resumed, progress.resumed_at = True, turn.now
    progress.served_at = progress.served_at or turn.now
    turn.fleet.engines[name].switch_again_at = 0.0
    blame.clear(turn, name)


def _ranks(current: Round, name: str) -> tuple[tuple[int, int], ...]:
    """The processes that the round knows, by rank."""
    return tuple((member.rank, current.ranks[member]) for member in current.by_engine[name])


def together(turn: Turn, current: Round, name: str) -> list[str]:
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
def keep(turn: Turn, current: Round) -> list[str]:
    """Before a round is given up: engines that land beside what they serve keep what they have, if that is all of the
    version and nobody writes there any more, and are asked for its digest. Returns the others.

    Not while the trainer still converts, which may come to other bytes.
    """
    others = []
    for name in current.remaining():
        engine, progress, members = turn.fleet.engines[name], current.engines[name], current.by_engine[name]
        if current.ahead or not progress.shadow or not judge.whole(current, name):
            engine.kept = None
            others.append(name)
        elif not progress.kept:
            plan, owed = current.relay if current.relays_to(name) else current.plan, _owed(current, members)
            landed = {member: plan.connects[member].fingerprint for member in members}
            engine.kept = KeptStandby(current.name, current.version, current.restaged, owed, landed)
            for member in members:
                if member not in current.verified:
                    ask_to_verify(turn, current, member)
    return others


def let_out(turn: Turn, current: Round, names: Iterable[str], why: Trouble) -> None:
    """Tell the workers of these engines to leave without the version, and the writers to write nothing more to them.

    The workers do not wait for the writers: what live ones hold counts as torn, whatever is still written.
    """
    gone = dict.fromkeys(names)
    for name in gone:
        torn = current.granted and not current.engines[name].shadow
        for member in current.by_engine[name]:
            turn.send(member, Abort(round=current.name, torn=torn, reason=why.reason))
    if current.granted:
        for writer, targets in current.writing.items():
            edges = tuple(target for target in targets if target.engine in gone)
            if edges and writer not in current.final:
                torn = writer.role == "trainer"  # what an inference rank lends stays whole
                turn.send(writer, Abort(round=current.name, torn=torn, reason=why.reason, members=edges))
