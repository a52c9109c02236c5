"""What happened. The daemon turns the outside into these; failures are events like any other."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from weightsync.orchestrator.core.policy import Policy
from weightsync.orchestrator.protocol.application import Application
from weightsync.orchestrator.protocol.messages import Connect, Fault, FromAgent, Hello, Needs
from weightsync.orchestrator.protocol.names import Member, RoundName


class Call(StrEnum):
    """A call to an engine's server, named as the methods of ``daemon.engines.interface.EngineClient``."""

    PROBE = "probe"
    ATTACH = "attach"
    PAUSE = "pause"
    UPDATE = "update"
    SWITCH = "switch"
    FINISH = "finish"
    RESUME = "resume"


@dataclass(frozen=True, slots=True)
class Event:
    """``id`` grows by one with every event; commands and log lines carry it as their cause."""

    id: int


@dataclass(frozen=True, slots=True)
class AgentConnected(Event):
    """A Hello arrived on a new connection; the agent waits for Accept or Refuse."""

    member: Member
    connection: int
    hello: Hello


@dataclass(frozen=True, slots=True)
class AgentSaid(Event):
    """A message from an accepted agent."""

    member: Member
    connection: int
    message: FromAgent


@dataclass(frozen=True, slots=True)
class AgentLost(Event):
    """A connection ended or fell silent. It proves nothing about the process behind it."""

    member: Member
    connection: int
    reason: str


@dataclass(frozen=True, slots=True)
class PlanFacts:
    """What the core needs to know about a plan: who connects to whom and how many bytes go where."""

    root: str
    connects: dict[Member, Connect]
    flows: dict[tuple[Member, Member], int]
    """(writer, target) → bytes."""
    proved: bool
    """Coverage of every destination byte was checked by the independent algorithm."""
    seconds: float = 0.0
    unneeded: tuple[str, ...] = ()
    """Tensors that the trainer has and no engine needs."""

    def writers_of(self, targets: frozenset[Member]) -> dict[Member, tuple[Member, ...]]:
        """Each source that has bytes to write to some of ``targets``, and to which."""
        found: dict[Member, list[Member]] = {}
        for writer, target in sorted(self.flows):
            if target in targets:
                found.setdefault(writer, []).append(target)
        return {writer: tuple(to) for writer, to in found.items()}


NO_PLAN: Final = PlanFacts("", {}, {}, False)


@dataclass(frozen=True, slots=True)
class PlanReady(Event):
    """``lends``: of a feed, here and in PlanRejected."""

    number: int
    facts: PlanFacts
    lends: bool = False


@dataclass(frozen=True, slots=True)
class PlanRejected(Event):
    """The layouts do not fit. ``engine`` names the one to leave out, when it is one engine's."""

    number: int
    reason: str
    engine: str = ""
    fault: Fault = "config"
    lends: bool = False


@dataclass(frozen=True, slots=True)
class NeedsReady(Event):
    """What engines need together; ``misfits`` says of each one that contradicts an earlier one, by name, how."""

    number: int
    needs: Needs
    misfits: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class CallDone(Event):
    """An engine answered. ``paused``: whether it is paused now, None where the call leaves that unknown.

    ``switch_seconds``: of a switch, how long the engine took no step for it, as it says itself.
    """

    engine: str
    call: Call
    number: int
    seconds: float
    paused: bool | None = None
    switch_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class CallFailed(Event):
    """A call ended without its effect being known. ``retry``: whether the same call may succeed later."""

    engine: str
    call: Call
    number: int
    reason: str
    fault: Fault = "engine"
    retry: bool = True


@dataclass(frozen=True, slots=True)
class StableSeen:
    """A STABLE marker: its step and, when it carries a manifest, the trainer generation that wrote it."""

    step: int
    generation: int | None = None


@dataclass(frozen=True, slots=True)
class MarkersSeen(Event):
    """A rescan of the run directory: the STABLE markers without COMMITTED or FAILED beside them."""

    stable: tuple[StableSeen, ...]


@dataclass(frozen=True, slots=True)
class Appended(Event):
    """A record is durable."""

    kind: str
    round: RoundName | None


@dataclass(frozen=True, slots=True)
class EngineApplied(Event):
    """An engine says over HTTP that it wants to be a member, or that it is still there."""

    application: Application


@dataclass(frozen=True, slots=True)
class Asked(Event):
    """Base of what an operator asks for. ``by``: who, for the log; ``reason``: in the operator's words."""

    by: str
    reason: str


@dataclass(frozen=True, slots=True)
class HoldAsked(Asked):
    """The engine is not to serve (``held``), or may again: no hold, no drain, and it is forgotten no longer."""

    engine: str
    held: bool


@dataclass(frozen=True, slots=True)
class DrainAsked(Asked):
    """The engine, and its pair, is to be in no round until it is released."""

    engine: str


@dataclass(frozen=True, slots=True)
class ForgetAsked(Asked):
    """The engine, and its pair, is no member any more."""

    engine: str


@dataclass(frozen=True, slots=True)
class MaintenanceAsked(Asked):
    """No round is to begin (``on``), or they may again."""

    on: bool


@dataclass(frozen=True, slots=True)
class AbortAsked(Asked):
    """The round under way is to be given up, if nothing is decided yet."""


@dataclass(frozen=True, slots=True)
class RetryAsked(Asked):
    """No engine and no version is to wait for its next attempt any longer."""


@dataclass(frozen=True, slots=True)
class RollbackAsked(Asked):
    """Engines are to serve again what they have in their standby: the version of ``step``, None: the one before."""

    step: int | None


@dataclass(frozen=True, slots=True)
class DeadDeclared(Asked):
    """The processes of this writer that may still hold a grant are dead: the operator has seen to it."""

    writer: Member


@dataclass(frozen=True, slots=True)
class StopAsked(Event):
    """The daemon is to end: the round under way may, and no other begins."""


@dataclass(frozen=True, slots=True)
class PolicyChanged(Event):
    """The configuration was read again. Run, transport and group are as before; what is under way keeps the deadlines
    that it began with. For every engine of it there is a client."""

    policy: Policy


@dataclass(frozen=True, slots=True)
class Tick(Event):
    """Time passed; some deadline may have."""
