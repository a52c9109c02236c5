"""One turn of the machine: the state, the time, the cause, and the commands collected so far."""

from dataclasses import dataclass, field
from typing import Literal

import msgspec
from weightsync.orchestrator.core import invariants
from weightsync.orchestrator.core.commands import Append, CallEngine, Command, Say, Send
from weightsync.orchestrator.core.events import Call
from weightsync.orchestrator.core.memory import replay
from weightsync.orchestrator.core.records import Committed, Decided, LiveDirty, Record
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.protocol.messages import FromDaemon
from weightsync.orchestrator.protocol.names import Member, RoundName, Version


@dataclass(slots=True)
class Turn:
    """Collects what one event leads to. ``now``: seconds of the daemon's monotonic clock."""

    fleet: Fleet
    now: float
    cause: int
    commands: list[Command] = field(default_factory=list)

    def do(self, command: Command) -> None:
        """Have ``command`` performed, with the present event as its cause.

        Raises:
            InvariantViolation: it gives a right that nobody has now.
        """
        invariants.commanded(self.fleet, command)
        self.commands.append(msgspec.structs.replace(command, cause=self.cause))

    def say(
        self,
        sentence: str,
        level: Literal["info", "warning", "error"] = "info",
        *,
        event: str = "note",
        engine: str = "",
    ) -> None:
        """One sentence for people, which the log has under the name of an ``event``, and with the round under way."""
        current = self.fleet.round
        about = (current.version, current.name) if current is not None else (None, None)
        self.do(Say(level, sentence, event, engine, *about))

    def send(self, member: Member, message: FromDaemon) -> None:
        """To a connected agent; a lost one learns the state when it says Hello again."""
        if member in self.fleet.agents:
            self.do(Send(member, message))

    def append(self, record: Record) -> None:
        """Into the journal, and into our memory of it.

        At once, so that whatever this event leads to sees one state. It is safe before the record is durable, because
        the outbox performs no later command until it is.
        """
        replay(self.fleet.memory, record)
        self.do(Append(record))

    def append_and_wait(self, record: LiveDirty | Decided | Committed) -> None:
        """As ``append``; the round goes on when the record is durable."""
        replay(self.fleet.memory, record)
        self.fleet.awaited = (type(record).__name__, record.round)
        self.do(Append(record, answer=True))

    def call(
        self,
        engine: str,
        call: Call,
        deadline: float,
        round_name: RoundName | None = None,
        version: Version | None = None,
        ranks: tuple[tuple[int, int], ...] = (),
    ) -> None:
        """One call of a kind at a time per engine; the newest number is the one whose answer counts."""
        self.fleet.call_number += 1
        # An older call of this kind may still answer; its number tells that it was replaced.
        self.fleet.engines[engine].calls[call] = self.fleet.call_number
        if call is Call.SWITCH:
            self.fleet.engines[engine].switch_again_at = self.now + self.fleet.policy.patience
        current = self.fleet.round
        trace = current.trace if current is not None and current.name == round_name else ""
        self.do(CallEngine(engine, call, self.fleet.call_number, deadline, round_name, version, ranks, trace))
