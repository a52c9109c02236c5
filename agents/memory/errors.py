"""What can be wrong with memory that is to be registered."""

from weightsync.orchestrator.protocol.messages import Fault


class MemoryPlacementError(RuntimeError):
    """Memory that a NIC or another process cannot reach, or that cannot be had. The caller's fault; no retry: the
    message says what to change."""

    fault: Fault = "config"
    retry = False
