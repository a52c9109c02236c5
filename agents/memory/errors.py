"""What can be wrong with memory that is to be registered, or that lies in pages of ours."""

from weightsync.agents.errors import AgentError
from weightsync.orchestrator.protocol.messages import Fault


class MemoryPlacementError(AgentError):
    """Memory that a NIC or another process cannot reach, or that cannot be had. The caller's fault; no retry: the
    message says what to change."""


class PagesUnavailable(MemoryPlacementError):
    """Weights cannot lie in pages of ours in this process. Nothing was moved; the message says what to change."""


class StandbyMissing(MemoryPlacementError):
    """Weights were moved into pages, and then there was no memory for a second set. The engine cannot start so."""


class FlipFailed(AgentError):
    """The driver refused a flip; both sets of pages are where they were, and what is served is whole."""

    fault: Fault = "engine"
    retry: bool = True


class StandbyLost(FlipFailed):
    """After a flip the driver refused memory for the other set: nothing can land there, nor be flipped to. Restart the
    engine when that suits; what it serves is whole."""

    retry: bool = False


class PagesTorn(AgentError):
    """The driver refused a flip and the way back, so that served addresses have no memory. Restart the engine."""

    fault: Fault = "engine"
