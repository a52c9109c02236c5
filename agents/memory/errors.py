"""What can be wrong with memory that is to be registered."""

from weightsync.agents.errors import AgentError


class MemoryPlacementError(AgentError):
    """Memory that a NIC or another process cannot reach, or that cannot be had. The caller's fault; no retry: the
    message says what to change."""
