"""What the core wants done. Only the daemon's outbox performs them; each carries the event that caused it."""

from dataclasses import dataclass
from typing import Literal

import msgspec
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


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """Base. ``cause`` is the id of the event that led to it; ``Turn.do`` fills it in."""

    cause: int = 0


class Accept(Command, frozen=True):
    member: Member
    connection: int
    welcome: Welcome


class Refuse(Command, frozen=True):
    member: Member
    connection: int
    refused: Refused


class Drop(Command, frozen=True):
    """Close an accepted connection: its agent broke the protocol."""

    member: Member
    connection: int
    reason: str


class Send(Command, frozen=True):
    member: Member
    message: FromDaemon


class OpenGroup(Command, frozen=True):
    """Start the child that joins vLLM's StatelessProcessGroup as rank 0; the members as 1, 2, …, in this order."""

    group: TcpStoreRendezvous
    connections: tuple[tuple[Member, int], ...]


@dataclass(frozen=True, slots=True)
class Announced:
    """One agent of a plan, with what it announced."""

    member: Member
    incarnation: int
    announce: Announce


class MakePlan(Command, frozen=True):
    """``lends``: the sources are engines' ranks, which write what they serve; the trainer's plan stays as it is.

    ``standby``: they write their standby instead, which lands by this Connect of each.
    """

    number: int
    sources: tuple[Announced, ...]
    targets: tuple[Announced, ...]
    lends: bool = False
    standby: dict[Member, Connect] = {}


class MakeNeeds(Command, frozen=True):
    """The union of what these inference ranks need; engines in the configuration's order."""

    number: int
    targets: tuple[Announced, ...]


class SendPlan(Command, frozen=True):
    """Rendezvous round 2 for one member, over whichever rendezvous is configured."""

    member: Member
    connect: Connect


class CallEngine(Command, frozen=True):
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
    trace: str = ""
    """Context of the round that it belongs to."""


class Append(Command, frozen=True):
    """Make a record durable. With ``answer``, the core waits for Appended before it goes on."""

    record: Record
    answer: bool = False


class LookForStable(Command, frozen=True):
    """Look for STABLE of ``step`` after so many seconds, and post MarkersSeen whatever is found."""

    after_seconds: float
    step: int


class WriteMarker(Command, frozen=True):
    kind: Literal["TRANSFER_READY", "COMMITTED", "FAILED"]
    version: Version
    facts: dict[str, str | int | float]


class Say(Command, frozen=True):
    """One sentence for people: what and why.

    ``event``: its name in the log, see ``daemon.admin.log_events``; ``engine``, ``version`` and ``round``: what it is
    about, as far as it is about one.
    """

    level: Literal["info", "warning", "error"]
    sentence: str
    event: str = "note"
    engine: str = ""
    version: Version | None = None
    round: RoundName | None = None
