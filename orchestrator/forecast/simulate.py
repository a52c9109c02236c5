"""What a plan would take on hardware that one does not have: NICs shared by GPUs, and many senders to one port."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from weightsync.orchestrator.planner.arrays import Floats, Ids, Ints
from weightsync.orchestrator.planner.plan import Plan


@dataclass(frozen=True, slots=True)
class Hardware:
    """Nodes alike: the trainer's ranks fill theirs in order, each engine's ranks begin on a node of their own.

    ``nic_gbps`` is line rate in Gb/s and ``efficiency`` what of it is reached (0.88 is the best published); a GPU
    uses NIC ``local rank * nics // gpus`` only. ``nvlink_bytes_per_second`` is for both ends on one node.
    ``alpha_seconds`` per descriptor is the sender's.
    """

    nic_gbps: float = 400.0
    nics_per_node: int = 8
    gpus_per_node: int = 8
    efficiency: float = 0.88
    nvlink_bytes_per_second: float = 350e9
    alpha_seconds: float = 13e-6

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
    flow = _Flow(plan, hardware)
    loads = flow.loads(hardware)
    limits = tuple(load.limit() for load in loads)
    slowest = max(limits, key=lambda limit: limit.seconds)
    groups = int(flow.group.max(initial=0)) + 1
    per_group = np.max([load.per_group(flow.group, groups) for load in loads], axis=0)
    incast = f", from {slowest.peers} senders" if slowest.what.endswith("in") else ""
    return Simulation(
        hardware, len(plan.catalogue.sources), flow.targets, int(flow.size.sum()), int(flow.size[flow.wire].sum()),
        int(flow.descriptors.sum()), groups, slowest.seconds, float(per_group.sum()),
        f"{slowest.what} of {slowest.where}: {slowest.bytes / 1e9:.2f} GB{incast}", limits,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Load:
    """What each transfer costs one of a kind of resources; ``named`` says how they are called."""

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
        mine = self.place == worst
        peers = len(np.unique(self.peer[mine & (self.seconds > 0)]))
        used = int(self.size[mine & (self.seconds > 0)].sum())
        return Limit(self.what, f"{self.named} {worst}", float(total[worst]), used, peers)

    def per_group(self, group: Ints, groups: int) -> Floats:
        """Seconds of the slowest resource in each group."""
        if len(self.place) == 0:
            return np.zeros(groups)
        count = int(self.place.max()) + 1
        total = np.bincount(group * count + self.place, weights=self.seconds, minlength=groups * count)
        slowest: Floats = total.reshape(groups, count).max(axis=1)
        return slowest


class _Flow:
    """Transfers in columns, with the node, GPU and NIC of both ends; engines' nodes follow the trainer's."""

    def __init__(self, plan: Plan, hardware: Hardware) -> None:
        per_node = hardware.gpus_per_node
        self.source = _joined([u.source for u in plan.units])
        node = -(-len(plan.catalogue.sources) // per_node)
        gpus: list[int] = []
        targets = []
        for unit in plan.units:
            targets.append(unit.target + len(gpus))
            gpus += [node * per_node + rank for rank in range(len(unit.targets))]
            node += -(-len(unit.targets) // per_node)
        self.targets = len(gpus)
        self.target = np.array([*gpus, 0], np.int64)[_joined(targets)]
        self.group = _joined([u.group for u in plan.units])
        self.size = _joined([u.shapes.bytes[u.shape] for u in plan.units])
        self.descriptors = _joined([u.descriptors() for u in plan.units])
        self.wire = self.source // per_node != self.target // per_node

    def loads(self, hardware: Hardware) -> list[_Load]:
        """Every kind of resource."""
        wire = np.where(self.wire, self.size / hardware.nic_bytes_per_second, 0.0)
        local = np.where(self.wire, 0.0, self.size / hardware.nvlink_bytes_per_second)
        posts = self.descriptors.astype(np.float64) * hardware.alpha_seconds
        out, into = _nic(self.source, hardware), _nic(self.target, hardware)
        return [
            _Load("NIC out", out, wire, self.size, self.target, "NIC"),
            _Load("NIC in", into, wire, self.size, self.source, "NIC"),
            _Load("descriptors out", self.source, posts, self.size, self.target, "GPU"),
            _Load("NVLink out", self.source, local, self.size, self.target, "GPU"),
            _Load("NVLink in", self.target, local, self.size, self.source, "GPU"),
        ]


def _nic(gpu: Ints, hardware: Hardware) -> Ints:
    node, local = gpu // hardware.gpus_per_node, gpu % hardware.gpus_per_node
    return node * hardware.nics_per_node + local * hardware.nics_per_node // hardware.gpus_per_node


def _joined(columns: Sequence[Ints | Ids]) -> Ints:
    return np.concatenate([np.zeros(0, np.int64), *columns])
