"""What a plan would take on hardware that one does not have: NICs shared by GPUs, and many senders to one port."""

from dataclasses import dataclass

import numpy as np
from weightsync.orchestrator.forecast.transfers import Transfers, transfers_of
from weightsync.orchestrator.planner.arrays import Flags, Floats, Ints
from weightsync.orchestrator.planner.plan import Plan
from weightsync.orchestrator.protocol.edges import RATES


@dataclass(frozen=True, slots=True)
class Hardware:
    """Nodes alike: the trainer's ranks fill theirs in order, each engine's ranks begin on a node of their own, or, if
    ``colocated``, where the trainer's do.

    ``nic_gbps`` is line rate in Gb/s and ``efficiency`` what of it is reached (0.88 is the best published); a GPU
    uses NIC ``local rank * nics // gpus`` only. ``nvlink_bytes_per_second`` is for both ends on one node,
    ``gpu_bytes_per_second`` for both on one GPU. ``alpha_seconds`` per descriptor is the sender's.
    """

    nic_gbps: float = 400.0
    nics_per_node: int = 8
    gpus_per_node: int = 8
    efficiency: float = 0.88
    nvlink_bytes_per_second: float = RATES["nvlink"].bytes_per_second
    gpu_bytes_per_second: float = RATES["same_gpu"].bytes_per_second
    alpha_seconds: float = RATES["nic"].alpha_seconds
    colocated: bool = False

    @property
    def nic_bytes_per_second(self) -> float:
        """What a NIC carries in one direction."""
        return self.nic_gbps * 1e9 / 8 * self.efficiency


@dataclass(frozen=True, slots=True)
class Limit:
    """The slowest of one kind of resource: which, for how long, with how many bytes from or to how many peers."""

    what: str
    where: str
    seconds: float
    bytes: int
    peers: int


@dataclass(frozen=True, slots=True)
class Simulation:
    """``best_seconds``: the slowest resource is never idle. ``worst_seconds``: no group begins before all have ended
    the one before. A real transfer lies between."""

    fleet: Hardware
    sources: int
    targets: int
    bytes: int
    wire_bytes: int
    descriptors: int
    groups: int
    best_seconds: float
    worst_seconds: float
    bottleneck: str
    limits: tuple[Limit, ...]


def simulate(plan: Plan, hardware: Hardware) -> Simulation:
    """Predict the transfer of ``plan`` on ``hardware``.

    Every resource (NIC out, NIC in, a GPU's posting of descriptors, NVLink out and in) needs the time of its own
    load; a port that many send to is shared by them, so that its load is the sum of theirs (incast).
    """
    transfers = transfers_of(plan)
    ends = _ends(plan, transfers, hardware)
    loads = _loads(transfers, ends, hardware)
    limits = tuple(load.limit() for load in loads)
    slowest = max(limits, key=lambda limit: limit.seconds)
    groups = int(transfers.group.max(initial=0)) + 1
    per_group = np.max([load.per_group(transfers.group, groups) for load in loads], axis=0)
    incast = f", from {slowest.peers} senders" if slowest.what.endswith("in") else ""
    return Simulation(
        hardware, len(plan.catalogue.sources), len(transfers.targets), int(transfers.size.sum()),
        int(transfers.size[ends.wire].sum()), int(transfers.descriptors.sum()), groups, slowest.seconds,
        float(per_group.sum()),
        f"{slowest.what} of {slowest.where}: {slowest.bytes / 1e9:.2f} GB{incast}", limits,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Load:
    """What each transfer costs one kind of resource, in columns ``[n]``.

    ``place`` is the number of the resource that the transfer uses, ``peer`` the GPU at its other end; ``named`` is
    what people call such a resource.
    """

    what: str
    place: Ints
    seconds: Floats
    size: Ints
    peer: Ints
    named: str

    def limit(self) -> Limit:
        if len(self.place) == 0:
            return Limit(self.what, "-", 0.0, 0, 0)
        total = np.bincount(self.place, weights=self.seconds)
        worst = int(np.argmax(total))
        # Only what takes time here: a transfer between nodes passes NVLink by, and the other way round.
        mine = self.place == worst
        peers = len(np.unique(self.peer[mine & (self.seconds > 0)]))
        used = int(self.size[mine & (self.seconds > 0)].sum())
        return Limit(self.what, f"{self.named} {worst}", float(total[worst]), used, peers)

    def per_group(self, group: Ints, groups: int) -> Floats:
        """Seconds of the slowest resource in each group."""
        if len(self.place) == 0:
            return np.zeros(groups)
        count = int(self.place.max()) + 1
        # (group, resource) as one number; resources without load in a group get 0 and are never the slowest.
        total = np.bincount(group * count + self.place, weights=self.seconds, minlength=groups * count)
        slowest: Floats = total.reshape(groups, count).max(axis=1)
        return slowest


@dataclass(frozen=True, slots=True)
class _Ends:
    """Where transfers begin and end, in columns ``[n]``: GPUs are numbered over all nodes; ``wire``: between nodes,
    ``own``: within one GPU."""

    source_gpu: Ints
    target_gpu: Ints
    wire: Flags
    own: Flags


def _ends(plan: Plan, transfers: Transfers, hardware: Hardware) -> _Ends:
    """Put ranks on GPUs: the trainer's from node 0 on, and those of each engine on nodes of its own after them."""
    per_node = hardware.gpus_per_node
    # Rounded up: a node that the trainer fills in part is not shared with engines.
    node = 0 if hardware.colocated else -(-len(plan.catalogue.sources) // per_node)
    gpus: list[int] = []
    for engine in plan.engines:
        gpus += [node * per_node + rank for rank in range(len(engine.targets))]
        node += -(-len(engine.targets) // per_node)
    target_gpu = np.array(gpus, np.int64)[transfers.target]
    wire = transfers.source // per_node != target_gpu // per_node
    return _Ends(transfers.source, target_gpu, wire, transfers.source == target_gpu)


def _loads(transfers: Transfers, ends: _Ends, hardware: Hardware) -> list[_Load]:
    """What every kind of resource has to do."""
    size, source, target = transfers.size, ends.source_gpu, ends.target_gpu
    wire = np.where(ends.wire, size / hardware.nic_bytes_per_second, 0.0)
    local = np.where(ends.wire | ends.own, 0.0, size / hardware.nvlink_bytes_per_second)
    own = np.where(ends.own, size / hardware.gpu_bytes_per_second, 0.0)
    posts = transfers.descriptors.astype(np.float64) * hardware.alpha_seconds
    return [
        _Load("NIC out", _nic(source, hardware), wire, size, target, "NIC"),
        _Load("NIC in", _nic(target, hardware), wire, size, source, "NIC"),
        _Load("descriptors out", source, posts, size, target, "GPU"),
        _Load("NVLink out", source, local, size, target, "GPU"),
        _Load("NVLink in", target, local, size, source, "GPU"),
        _Load("same GPU", target, own, size, source, "GPU"),
    ]


def _nic(gpu: Ints, hardware: Hardware) -> Ints:
    """The NIC of each GPU ``[n]``; a node's GPUs share its NICs out evenly."""
    node, local = gpu // hardware.gpus_per_node, gpu % hardware.gpus_per_node
    return node * hardware.nics_per_node + local * hardware.nics_per_node // hardware.gpus_per_node
