"""What can go wrong on the data plane, each with whose fault it is and whether to try again."""

from weightsync.agents.errors import AgentError
from weightsync.orchestrator.protocol.messages import Fault


class NixlError(AgentError):
    """Base of the data plane's errors. ``fault`` and ``retry`` travel to the daemon with CLOSED."""


class NixlMissingError(NixlError):
    """No NIXL package can be imported. The installation's fault."""


class RegionError(NixlError):
    """A range that must not be registered: empty, overlapping another, or not mapped. The caller's fault."""


class MetadataError(NixlError):
    """A peer's card that is torn, of another schema, or of another name. Only another card helps."""

    fault: Fault = "network"


class ConnectError(NixlError):
    """NIXL does not take a peer's metadata: the peer is gone or out of reach, or speaks another backend."""

    fault: Fault = "network"
    retry = True


class EdgeError(NixlError):
    """Runs that do not fit the regions of their two ends. The plan's fault."""

    fault: Fault = "daemon"


class TransferError(NixlError):
    """A write to one peer did not finish.

    Attributes:
        rank: the writer.
        peer: the endpoint name of the other side.
        tensor: logical tensor at which the first unfinished descriptor begins (empty: none had been posted).
        bytes_done: bytes whose completion was confirmed.
        fault: whose fault it is, for the daemon's report.
        retry: whether the same write may succeed later.
    """

    def __init__(
        self, reason: str, *, rank: str, peer: str, tensor: str, bytes_done: int, fault: Fault, retry: bool
    ) -> None:
        at = f" at {tensor}" if tensor else ""
        super().__init__(f"{rank} → {peer}{at}: {reason} ({bytes_done} bytes done)")
        self.reason = reason
        self.rank = rank
        self.peer = peer
        self.tensor = tensor
        self.bytes_done = bytes_done
        self.fault = fault
        self.retry = retry


class DeadlineError(TransferError):
    """The write's total deadline passed. NIXL cannot cancel it, so the peer's memory is tainted until DONE."""


class StalledError(TransferError):
    """Nothing of the write has ended for so long that its path must be gone. As for DeadlineError, it is tainted."""


class StoppedError(TransferError):
    """The daemon took the write to this peer back before it had ended."""


class DisconnectedError(TransferError):
    """The peer's process is gone, or its connection is. A lost connection alone proves no death."""


class ImplausibleRateError(TransferError):
    """Everything reported DONE faster than the link can carry it, so probably nothing moved."""
