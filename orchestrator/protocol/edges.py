"""One edge, from a trainer rank to a peer: where the peer is, by what kind of link, what one grant moved to it, why it
cannot be used; by which transport bytes move, and by which way both rounds of the rendezvous travel.

Plans are explained and simulated by the table of rates here, and an edge's measured rate is judged by it as long as
nothing better is known.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import msgspec
from weightsync.orchestrator.protocol.fields import Count, Endpoint, Name, Nonce, Path, Port, Reason, Seconds, Spoken
from weightsync.orchestrator.protocol.landing import Berth
from weightsync.orchestrator.protocol.layout import Region
from weightsync.orchestrator.protocol.limits import MAX_NET_DEVICES, MAX_SECONDS, MAX_TENSORS, MAX_WORLD
from weightsync.orchestrator.protocol.names import Digest, Member

LinkKind = Literal["same_gpu", "nvlink", "nic", "tcp", "shm", "files", "unknown"]
"""``nvlink``: CUDA's IPC between two GPUs of a host, which is PCIe where they have no NVLink; ``nic``: RDMA; ``shm``:
memory of one host; ``files``: by way of a file system; ``unknown``: the transport does not tell."""

FINGERPRINT_CHARS: Final = 32
"""128 bits: no two edge sets of a fleet's life share one."""

_encoder = msgspec.msgpack.Encoder()


@dataclass(frozen=True, slots=True)
class LinkRate:
    """Of one end, a GPU or a port, in one direction. A write costs ``descriptors * alpha_seconds`` to post, and
    ``bytes / bytes_per_second``.

    ``bytes_per_second``: reached by good hardware, as ``source`` says; ``least``: what the slowest hardware of the kind
    carries, in bytes per second: less is a fault, whatever the hardware.
    """

    bytes_per_second: float
    alpha_seconds: float
    least: float
    source: str


RATES: Final[dict[LinkKind, LinkRate]] = {
    "same_gpu": LinkRate(1947e9, 13e-6, 100e9, "measured: 1 GiB in 1 to 4096 descriptors, two processes of an H200"),
    "nvlink": LinkRate(366e9, 4.8e-6, 10e9, "measured: 7.5 GB between two H100s, in few and in 559,818 descriptors"),
    "nic": LinkRate(44e9, 13e-6, 1e9, "published: prime-rl, 88 % of a 400 Gb/s port; descriptors as same_gpu"),
    "tcp": LinkRate(1.7e9, 13e-6, 0.1e9, "measured: between namespaces, as iperf3 there; descriptors as same_gpu"),
    "shm": LinkRate(5.5e9, 13e-6, 1e9, "measured: process_vm_writev, as fast as that call; descriptors as same_gpu"),
}


class Peer(msgspec.Struct, frozen=True):
    """The other end of an edge; ``berth``: where the edge's cargo lands, None without one."""

    member: Member
    incarnation: Nonce
    endpoint_name: Name
    endpoint: Endpoint
    regions: Annotated[tuple[Region, ...], msgspec.Meta(max_length=MAX_TENSORS)]
    berth: Berth | None = None


def reached_fingerprint(part: str, peers: Iterable[Peer]) -> str:
    """Of one member's edge set as it is told: of its ``part`` of a plan, and of where its peers are reached now, who
    may change their endpoints. Equal ones mean that there is nothing new to tell."""
    places = [(peer.member, peer.incarnation, peer.endpoint_name) for peer in peers]
    return hashlib.sha256(_encoder.encode((part, places))).hexdigest()[:FINGERPRINT_CHARS]


class PeerTransfer(Spoken, frozen=True):
    """What one grant moved to one peer; ``seconds`` from the first post to the last DONE, ``digest`` of those bytes.

    With ``error`` the peer did not get all of it, and no handle of the grant to it is pending any more. ``link``: what
    kind of link it went by, and ``by`` the transport's own name of it: ``cuda_ipc/cuda``, ``rc_mlx5/mlx5_0:1``.
    """

    peer: Member
    bytes: Count
    descriptors: Count
    seconds: Seconds
    digest: Digest
    error: Reason = ""
    link: LinkKind = "unknown"
    by: Name = ""
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


class HubRendezvous(msgspec.Struct, frozen=True, tag="hub"):
    """Both rounds travel over this connection."""


class TcpStoreRendezvous(msgspec.Struct, frozen=True, tag="tcpstore"):
    """Both rounds travel over vLLM's StatelessProcessGroup; this agent joins as ``rank`` of ``world``."""

    host: Name
    port: Port
    rank: Annotated[int, msgspec.Meta(ge=0, lt=2 * MAX_WORLD)]
    world: Annotated[int, msgspec.Meta(ge=1, le=2 * MAX_WORLD)]
    timeout_seconds: Seconds
