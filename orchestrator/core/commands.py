"""What the core wants done. Only the daemon's outbox performs them; each carries the event that caused it."""

from dataclasses import dataclass, field
from typing import Literal

from weightsync.orchestrator.core.events import Call
from weightsync.orchestrator.core.records import Record
from weightsync.orchestrator.protocol.messages import (
    Announce,
    Connect,
    FromDaemon,
    Refused,
    TcpStoreRendezvous,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Member, RoundName, Version


@dataclass(frozen=True, slots=True)
class Command:
    """Base. ``cause`` is the id of the event that led to it; ``Turn.do`` fills it in."""

    cause: int = field(default=0, kw_only=True)


@dataclass(frozen=True, slots=True)
class Accept(Command):
    member: Member
    connection: int
    welcome: Welcome


@dataclass(frozen=True, slots=True)
class Refuse(Command):
    member: Member
    connection: int
    refused: Refused


@dataclass(frozen=True, slots=True)
class Drop(Command):
    """Close an accepted connection: its agent broke the protocol."""

    member: Member
    connection: int
    reason: str


@dataclass(frozen=True, slots=True)
class Send(Command):
    member: Member
    message: FromDaemon


@dataclass(frozen=True, slots=True)
class OpenGroup(Command):
    """Start the child that joins vLLM's StatelessProcessGroup as rank 0; the members as 1, 2, …, in this order."""

    group: TcpStoreRendezvous
    connections: tuple[tuple[Member, int], ...]


@dataclass(frozen=True, slots=True)
class Announced:
    """One agent of a plan, with what it announced."""

    member: Member
    incarnation: int
    announce: Announce


@dataclass(frozen=True, slots=True)
class MakePlan(Command):
    """``lends``: the sources are engines' ranks, which write what they serve; the trainer's plan stays as it is."""

    number: int
    sources: tuple[Announced, ...]
    targets: tuple[Announced, ...]
    lends: bool = False


@dataclass(frozen=True, slots=True)
class MakeNeeds(Command):
    """The union of what these inference ranks need; engines in the configuration's order."""

    number: int
    targets: tuple[Announced, ...]


@dataclass(frozen=True, slots=True)
class SendPlan(Command):
    """Rendezvous round 2 for one member, over whichever rendezvous is configured."""

    member: Member
    connect: Connect


@dataclass(frozen=True, slots=True)
class CallEngine(Command):
    """``number`` comes back in CallDone or CallFailed; ``round`` and ``version`` for those calls that belong to one.

    ``ranks``: of a resume or a switch, the processes that it means, as rank → incarnation; no other may serve by it.
    """

    engine: str
    call: Call
    number: int
    deadline: float
    round: RoundName | None = None
    version: Version | None = None
    ranks: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Append(Command):
    """Make a record durable. With ``answer``, the core waits for Appended before it goes on."""

    record: Record
    answer: bool = False


@dataclass(frozen=True, slots=True)
class LookForStable(Command):
    """Look for STABLE of ``step`` after so many seconds, and post MarkersSeen whatever is found."""

    after_seconds: float
    step: int


@dataclass(frozen=True, slots=True)
class WriteMarker(Command):
    kind: Literal["TRANSFER_READY", "COMMITTED", "FAILED"]
    version: Version
    facts: dict[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Say(Command):
    """One sentence for people: what and why."""

    level: Literal["info", "warning", "error"]
    sentence: str
