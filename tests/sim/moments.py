"""Points of a round, by what passes between the daemon and the rest, whatever the core calls its phases."""

from collections.abc import Callable, Mapping
from typing import Final

from weightsync.orchestrator.core.commands import CallEngine, Send
from weightsync.orchestrator.core.events import Call
from weightsync.orchestrator.core.records import Committed, Decided, LiveDirty
from weightsync.orchestrator.protocol.messages import Commit, Grant, Left, Verify

Moment = Callable[[object], bool]


def call(kind: Call, engine: str = "") -> Moment:
    """A call is made, to this engine or to any."""
    return lambda what: isinstance(what, CallEngine) and what.call is kind and engine in ("", what.engine)


def sent(kind: type) -> Moment:
    """A message of this kind is sent to an agent."""
    return lambda what: isinstance(what, Send) and isinstance(what.message, kind)


def is_a(kind: type) -> Moment:
    """A record of this kind is about to be journaled, or a message of this kind arrives."""
    return lambda what: isinstance(what, kind)


PHASES: Final[Mapping[str, Moment]] = {
    "pausing": call(Call.PAUSE),
    "quiescing": call(Call.UPDATE),
    "marking": is_a(LiveDirty),
    "writing": sent(Grant),
    "verifying": sent(Verify),
    "deciding": is_a(Decided),
    "applying": sent(Commit),
    "finishing": call(Call.FINISH),
    "resuming": call(Call.RESUME),
    "recording": is_a(Committed),
}
"""Where each phase of a round begins, of engines that land live."""

SHADOW_PHASES: Final[Mapping[str, Moment]] = {
    **{name: PHASES[name] for name in ("marking", "writing", "verifying", "deciding", "recording")},
    "switching": call(Call.SWITCH),
    "left": is_a(Left),
}
"""Likewise of those that land beside what they serve."""

CASES: Final = (
    *(("live", name) for name in PHASES),
    *((mode, name) for mode in ("copy", "flip") for name in SHADOW_PHASES),
)
"""A mode, and a phase of its rounds."""


def begins(mode: str, phase: str) -> Moment:
    """Where ``phase`` of a round begins, of engines that land in ``mode``."""
    return (PHASES if mode == "live" else SHADOW_PHASES)[phase]
