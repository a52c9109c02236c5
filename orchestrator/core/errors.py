"""The daemon's errors in one tree, by whose fault they are. A reader learns from the type what to do.

    WeightsyncError                fault, retry: read by the core, the runner and the command line
    ├── InvariantViolation         daemon   one of S1-S6 is broken: the process ends (exit code 70)
    ├── ImpossibleTransition       daemon   the table of phases has no entry: the process ends
    ├── RecordUnwritable           daemon   a record that could not be read back: the process ends
    ├── PeerMisbehaved             -        a message that cannot be true: it costs its agent the connection
    ├── JournalUnreadable          config   a record of another release, or damage: the process does not start
    ├── JournalError, JournalLost  config   no journal, a locked one, a disk that failed (daemon.journal)
    ├── PlanError                  config   the layouts make no plan (planner.errors; ProofFailed: daemon)
    ├── TcpStoreError              network  the group's child process (daemon.group.child)
    └── EngineError                engine   a call to an engine failed (daemon.engines.errors)
        ├── EngineUnreachable      network
        ├── EngineTimeout          engine
        ├── EngineGarbled          engine   a 200 that is not the engine's
        ├── EngineRefused          engine   ``retry`` by the answer's status
        └── EngineMisconfigured       config   ``retry`` false: the server was started without something

What is wrong with one frame, one marker or one line of the configuration ends only that frame, marker or start, and is
a ValueError of its own (ProtocolError, MarkerError, ConfigError); nobody decides about rounds by it.

The core itself raises only where the process must end. What agents and engines report becomes a ``Trouble``, a value
that carries the same two facts: ``fault`` goes into the round's row of history, and without ``retry`` a version is not
tried a second time.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

from weightsync.orchestrator.protocol.messages import Fault
from weightsync.orchestrator.protocol.names import Member


class WeightsyncError(Exception):
    """Base. ``fault`` names the side that must change something; ``retry`` whether the same attempt may succeed."""

    fault: ClassVar[Fault] = ""
    retry: bool = False


class InvariantViolation(WeightsyncError):
    """One of S1-S6 does not hold. Our bug: the daemon ends at once and the journal is what the next one believes."""

    fault: ClassVar[Fault] = "daemon"


class ImpossibleTransition(WeightsyncError):
    """The transition table has no entry for what happened. Our bug; the message carries the round's story."""

    fault: ClassVar[Fault] = "daemon"


class RecordUnwritable(WeightsyncError):
    """A record would not be read back as it is, and is not written. Our bug; the daemon's memory is ahead of the
    journal by it, so the process ends and the journal is what the next one believes."""

    fault: ClassVar[Fault] = "daemon"


class PeerMisbehaved(WeightsyncError):
    """What an agent said cannot be true. It costs that agent its ``connection`` and nobody else anything.

    Raised by ``machine.step`` before it has changed any state; the runner leaves out what came on that connection and
    decides the rest.
    """

    def __init__(self, member: Member, connection: int, reason: str) -> None:
        super().__init__(f"{member}: {reason}")
        self.member, self.connection, self.reason = member, connection, reason


class JournalUnreadable(WeightsyncError):
    """The journal holds a record that this version cannot read, or that is not what was written."""

    fault: ClassVar[Fault] = "config"


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why an attempt goes wrong: one sentence, whose fault it is, and whether another attempt may succeed."""

    reason: str
    fault: Fault = ""
    retry: bool = True


NO_TROUBLE: Final = Trouble("")
"""Of a round that goes well."""
