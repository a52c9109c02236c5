"""Errors by whose fault they are. A reader learns from the type what to do: fix, wait, or file a bug."""

from typing import ClassVar

from weightsync.orchestrator.protocol.messages import Fault


class WeightsyncError(Exception):
    """Base. ``fault`` names the side that must change something; ``retry`` whether the same attempt may succeed."""

    fault: ClassVar[Fault] = ""
    retry: ClassVar[bool] = False


class InvariantViolation(WeightsyncError):
    """One of S1-S6 does not hold. Our bug: the daemon ends at once and the journal is what the next one believes."""

    fault: ClassVar[Fault] = "daemon"


class ImpossibleTransition(WeightsyncError):
    """The transition table has no entry for what happened. Our bug; the message carries the round's story."""

    fault: ClassVar[Fault] = "daemon"


class JournalUnreadable(WeightsyncError):
    """The journal holds a record that this version cannot read. Restore it or start with a new state directory."""

    fault: ClassVar[Fault] = "config"
