"""One edge, from a trainer rank to a peer: where the peer is, what one grant moved to it, why it cannot be used, and by
which transport bytes move."""

from typing import Annotated

import msgspec
from weightsync.orchestrator.protocol.fields import Count, Endpoint, Name, Nonce, Path, Reason, Seconds, Spoken
from weightsync.orchestrator.protocol.landing import Berth
from weightsync.orchestrator.protocol.layout import Region
from weightsync.orchestrator.protocol.limits import MAX_NET_DEVICES, MAX_SECONDS, MAX_TENSORS
from weightsync.orchestrator.protocol.names import Digest, Member


class Peer(msgspec.Struct, frozen=True):
    """The other end of an edge; ``berth``: where the edge's cargo lands, None without one."""

    member: Member
    incarnation: Nonce
    endpoint_name: Name
    endpoint: Endpoint
    regions: Annotated[tuple[Region, ...], msgspec.Meta(max_length=MAX_TENSORS)]
    berth: Berth | None = None


class PeerTransfer(Spoken, frozen=True):
    """What one grant moved to one peer; ``seconds`` from the first post to the last DONE, ``digest`` of those bytes.

    With ``error`` the peer did not get all of it, and no handle of the grant to it is pending any more.
    """

    peer: Member
    bytes: Count
    descriptors: Count
    seconds: Seconds
    digest: Digest
    error: Reason = ""
    spoken = ("error",)


class EdgeFailure(Spoken, frozen=True):
    """An edge that cannot be used now, and why."""

    peer: Member
    error: Reason
    spoken = ("error",)


class NixlSettings(msgspec.Struct, frozen=True, tag="nixl"):
    """How agents move bytes over NIXL.

    ``in_flight_per_peer``: handles in flight per peer: a sliding window; nothing is drained. ``rails``: ports that one
    rank may use at once. ``max_gb_per_second``: what no link to a peer can exceed, in 10^9 bytes per second; None:
    rates are not judged. ``stall_seconds``: how long nothing of an edge may end although something is on its way; then
    its path counts as gone. ``net_devices``: UCX's network devices that agents may use; empty: UCX's choice, and the
    ports nearest to a GPU.
    """

    backends: Annotated[tuple[Name, ...], msgspec.Meta(min_length=1, max_length=8)] = ("UCX",)
    in_flight_per_peer: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 100
    rails: Annotated[int, msgspec.Meta(ge=1, le=16)] = 2
    max_gb_per_second: Annotated[float, msgspec.Meta(gt=0, le=1e9)] | None = None
    stall_seconds: Annotated[float, msgspec.Meta(gt=0, le=MAX_SECONDS)] = 30.0
    net_devices: Annotated[tuple[Name, ...], msgspec.Meta(max_length=MAX_NET_DEVICES)] = ()


class FilesystemSettings(msgspec.Struct, frozen=True, tag="filesystem"):
    """The engine reloads what the trainer saved in ``broadcasts/step_<N>/`` below ``directory``, the run directory.

    Trainer and inference ranks see it under the same path as the daemon.
    """

    directory: Path
