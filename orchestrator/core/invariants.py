"""S1-S6, checked on the state after every turn, and on each command before it is performed.

What gives a right (a grant, a resume, a switch) is judged by the state in which it was commanded: of events that came
together a later one may end its round, or bring another process, as it might a moment afterwards.
"""

from dataclasses import dataclass

from weightsync.orchestrator.core import standby
from weightsync.orchestrator.core.commands import Append, CallEngine, Command, Send
from weightsync.orchestrator.core.errors import InvariantViolation
from weightsync.orchestrator.core.events import Call
from weightsync.orchestrator.core.records import Committed, Decided, RoundBegan
from weightsync.orchestrator.core.round.progress import Round
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.protocol.messages import Grant
from weightsync.orchestrator.protocol.names import Member, RoundName, Version


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What must not go back."""

    epoch: int
    sequence: int
    round: Round | None


def snapshot(fleet: Fleet) -> Snapshot:
    """Taken before the event is handled."""
    return Snapshot(fleet.epoch, fleet.memory.sequence, fleet.round)


def commanded(fleet: Fleet, command: Command) -> None:
    """Raise if the command gives a right that nobody has now.

    Raises:
        InvariantViolation: names the invariant and what breaks it.
    """
    match command:
        case CallEngine(call=Call.RESUME):
            _resume_is_safe(fleet, command)
        case CallEngine(call=Call.SWITCH):
            _switch_is_safe(fleet, command)
        case Send(message=Grant()):
            _grant_is_safe(fleet, command)
        case _:
            pass


def check(fleet: Fleet, before: Snapshot, commands: list[Command]) -> None:
    """Raise on the first invariant that does not hold at the end of a turn.

    Raises:
        InvariantViolation: names the invariant and what breaks it.
    """
    if fleet.epoch < before.epoch or fleet.memory.sequence < before.sequence:
        raise InvariantViolation(
            f"S3: epoch {before.epoch} → {fleet.epoch}, sequence {before.sequence} → {fleet.memory.sequence}"
        )
    for command in commands:
        match command:
            case Append(record=RoundBegan(round=name)):
                _begin_is_safe(fleet, name)
            case Append(record=Decided(round=name)) if fleet.round is not None and fleet.round.ahead:
                raise InvariantViolation(f"S4: round {name} decides a version that is not published")
            case Append(record=Committed(version=version)):
                _commit_is_verified(fleet, before.round, version)
            case _:
                pass


def _resume_is_safe(fleet: Fleet, command: CallEngine) -> None:
    current = fleet.round
    # Within a round that is decided, its version may serve before COMMITTED is durable: every byte of it is verified.
    decided = current.version if current is not None and current.decided else None
    named = [Member("inference", command.engine, rank) for rank, _ in command.ranks]
    said = [agent for member in named if (agent := fleet.agents.get(member) or fleet.gone.get(member)) is not None]
    processes = tuple((agent.member.rank, agent.hello.incarnation) for agent in said)
    if not said or processes != command.ranks or len(said) != said[0].hello.world:
        raise InvariantViolation(f"S1: resume of {command.engine} means {command.ranks}, known are {processes}")
    versions = {agent.status.whole for agent in said}
    if len(versions) != 1 or not versions <= {fleet.memory.committed, decided} - {None}:
        raise InvariantViolation(
            f"S1: resume of {command.engine}, whose ranks hold {versions} (committed {fleet.memory.committed}, "
            f"decided {decided})"
        )


def _switch_is_safe(fleet: Fleet, command: CallEngine) -> None:
    """To a version that is decided, and that every process which is meant has verified."""
    current, engine = fleet.round, command.engine
    what = f"S1: switch of {engine} to {command.version}"
    if current is not None and current.name == command.round and current.has(engine):
        if current.phase is Phase.DECIDING or engine not in current.live or command.version != current.version:
            raise InvariantViolation(f"{what} in round {current.name}, which has not decided it")
        known = tuple((member.rank, current.ranks[member]) for member in current.by_engine[engine])
        wrong = [str(m) for m in current.by_engine[engine] if not _is_verified(current, m)]
    else:
        if command.version is None or command.version != fleet.memory.committed:
            raise InvariantViolation(f"{what}, but {fleet.memory.committed} is committed")
        ranks, version = fleet.ranks_of(engine), command.version
        known = tuple((agent.member.rank, agent.hello.incarnation) for agent in ranks)
        wrong = [str(agent.member) for agent in ranks if not standby.has(fleet, agent, version)]
    if wrong or known != command.ranks or not known:
        raise InvariantViolation(f"{what} means {command.ranks}, known are {known}, without it are {wrong}")


def _is_verified(current: Round, member: Member) -> bool:
    report = current.verified.get(member)
    return report is not None and (report.digest, report.bytes) == current.expected[member]


def _begin_is_safe(fleet: Fleet, name: RoundName) -> None:
    assert fleet.round is not None
    if fleet.round.rollback:
        return  # nothing is written
    for engine in fleet.round.engines:
        tainted = [f"{writer} ({grant})" for writer, grant in fleet.tainted(engine) if grant != name]
        takes = not fleet.round.relay.connects or fleet.round.relays_to(engine)
        if takes and any(writer.engine == engine for writer in fleet.round.writers):
            raise InvariantViolation(f"S1: round {name} writes to {engine}, which lends in it")
        if fleet.round.engines[engine].kept and standby.kept(fleet, engine, fleet.round.version) is None:
            raise InvariantViolation(f"S4: round {name} takes {engine} for written, which is not known to hold it")
        if tainted:
            raise InvariantViolation(f"S2: round {name} begins with {engine}, within reach of {tainted}")


def _grant_is_safe(fleet: Fleet, command: Send) -> None:
    current, member = fleet.round, command.member
    grant = command.message
    assert isinstance(grant, Grant)
    if current is None or grant.round != current.name or grant.round.epoch != fleet.epoch:
        raise InvariantViolation(f"S2: grant {grant.round} to {member} outside the round of epoch {fleet.epoch}")
    if member.role == "inference" and not standby.may_lend(fleet, fleet.known(member)):
        raise InvariantViolation(f"S1: grant {grant.round} to {member}, which does not hold {grant.version} whole")
    for engine in dict.fromkeys(target.engine for target in grant.members):
        foreign = [str(writer) for writer, name in fleet.tainted(engine) if name != current.name]
        if foreign:
            raise InvariantViolation(f"S2: grant {grant.round} to {engine}, within reach of {sorted(foreign)}")
    plan = current.plan_of(member)
    if not plan.proved:
        raise InvariantViolation(f"S6: grant {grant.round} on a plan whose coverage was not proved")
    for other in (member, *grant.members):
        agent = fleet.agents.get(other) or fleet.gone.get(other)
        known = current.ranks.get(other, current.sources.get(other))
        if agent is None or not fleet.is_confirmed(other, plan) or agent.hello.incarnation != known:
            raise InvariantViolation(f"S5: grant {grant.round} to {member} involves {other}, which is not confirmed")


def _commit_is_verified(fleet: Fleet, current: Round | None, version: Version) -> None:
    if current is None or current.version != version or not current.decided:
        raise InvariantViolation(f"S4: COMMITTED of {version} without a decided round")
    for member in current.remaining_ranks():
        left = current.left.get(member)
        if not _is_verified(current, member):
            raise InvariantViolation(f"S4: COMMITTED of {version}, but {member} is not verified")
        if left is None or left.whole != version:
            raise InvariantViolation(f"S4: COMMITTED of {version}, but {member} has not confirmed it")
