"""What a plan does, per edge and per tensor, and what it will take: numbers for people and for programs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from weightsync.orchestrator.planner.arrays import Flags, Ids, Ints
from weightsync.orchestrator.planner.decode import Decoded
from weightsync.orchestrator.planner.inputs import CostModel
from weightsync.orchestrator.planner.plan import Plan

TRANSPORTS: Final = {
    "rdma": CostModel(13e-6, 44.3e9),
    "cuda_ipc": CostModel(13e-6, 1947e9),
    "shm": CostModel(13e-6, 5.5e9),
}
"""One 400 Gb/s port at its best published rate; UCX between two processes of one H200; UCX from host to host memory.
The latter two, and the cost of a descriptor, are measured (see docs/performance)."""

_rank = re.compile(r"\brank \d+")
_number = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Moved:
    """What moves: ``direct_bytes`` to their place, ``packed_bytes`` by way of staging; descriptors that carry both."""

    direct_bytes: int
    packed_bytes: int
    pieces: int
    packed_pieces: int
    descriptors: int

    @property
    def bytes(self) -> int:
        """Direct and packed."""
        return self.direct_bytes + self.packed_bytes


@dataclass(frozen=True, slots=True)
class EdgeReport:
    """One (source, target)."""

    source: str
    target: str
    moved: Moved
    seconds: dict[str, float]
    """By transport, alone on it."""


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One tensor, or all that differ only in the numbers of their names (``*``)."""

    name: str
    tensors: int
    dtype: str
    shape: tuple[int, ...]
    moved: Moved
    sources: int
    targets: int
    slot: str
    reason: str
    how: str
    """Why it goes straight, packed, or both."""


@dataclass(frozen=True, slots=True)
class EndReport:
    """One member: what it sends, or what it receives."""

    member: str
    peers: int
    moved: Moved
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class Explanation:
    """``seconds`` by transport: until the slowest end is done; ``bottleneck`` by transport: which, and why."""

    root: str
    moved: Moved
    sources: int
    targets: int
    seconds: dict[str, float]
    bottleneck: dict[str, str]
    edges: tuple[EdgeReport, ...]
    tensors: tuple[TensorReport, ...]
    senders: tuple[EndReport, ...]
    receivers: tuple[EndReport, ...]
    unneeded: tuple[str, ...]


Report = TypeVar("Report", EdgeReport, TensorReport, EndReport)


def explain(plan: Plan, transports: Mapping[str, CostModel] = TRANSPORTS, *, every_tensor: bool = False) -> Explanation:
    """Sum a plan up; largest first throughout.

    Args:
        plan: the plan.
        transports: what to predict for; seconds are ``descriptors * alpha + bytes / rate``.
        every_tensor: one report per tensor, and not per family of tensors.
    """
    flow = _Flow(plan)
    edge, targets = flow.source * len(flow.targets) + flow.target, flow.targets
    edges = []
    for key, moved in flow.sums(edge):
        source, target = plan.catalogue.sources[key // len(targets)].party, targets[key % len(targets)].party
        edges.append(EdgeReport(str(source.member), str(target.member), moved, _seconds(moved, transports)))
    senders = flow.ends(flow.source, flow.target, plan.catalogue.sources, transports)
    receivers = flow.ends(flow.target, flow.source, targets, transports)
    seconds, bottleneck = {}, {}
    for name, cost in transports.items():
        slowest = max([*senders, *receivers], key=lambda end: end.seconds[name], default=None)
        seconds[name] = slowest.seconds[name] if slowest else 0.0
        bottleneck[name] = _bottleneck(slowest, cost, slowest in senders) if slowest else "nothing moves"
    return Explanation(
        plan.root, flow.total(), len(plan.catalogue.sources), len(targets), seconds, bottleneck, _largest(edges),
        _largest(flow.tensors(plan, every_tensor)), _largest(senders), _largest(receivers), plan.unneeded,
    )  # fmt: skip


def family(name: str) -> str:
    """A tensor's name with its numbers (layer, expert) replaced by ``*``."""
    return _number.sub("*", name)


class _Flow:
    """The transfers of all units in columns."""

    def __init__(self, plan: Plan) -> None:
        units = plan.units
        self.targets: list[Decoded] = [t for unit in units for t in unit.targets]
        first = np.cumsum([0, *(len(unit.targets) for unit in units)])
        self.source = _joined([u.source for u in units])
        self.target = _joined([u.target + first[i] for i, u in enumerate(units)])
        self.tensor = _joined([u.tensor for u in units])
        self.source_row = _joined([u.source_row for u in units])
        self.size = _joined([u.shapes.bytes[u.shape] for u in units])
        self.runs = _joined([u.shapes.runs[u.shape] for u in units])
        self.packed = _joined([u.staged_source for u in units]) >= 0
        self.descriptors = _joined([u.descriptors() for u in units])

    def sums(self, key: Ints) -> list[tuple[int, Moved]]:
        """Per distinct key, in ascending order."""
        keys, index = np.unique(key, return_inverse=True)
        direct = _sum(index, np.where(self.packed, 0, self.size), len(keys))
        packed = _sum(index, np.where(self.packed, self.size, 0), len(keys))
        pieces, packed_pieces = np.bincount(index, minlength=len(keys)), _sum(index, self.packed, len(keys))
        rows = zip(
            direct, packed, pieces.tolist(), packed_pieces, _sum(index, self.descriptors, len(keys)), strict=True
        )
        return [(key, Moved(*row)) for key, row in zip(keys.tolist(), rows, strict=True)]

    def total(self) -> Moved:
        """Of the whole plan."""
        found = self.sums(np.zeros_like(self.source))
        return found[0][1] if found else Moved(0, 0, 0, 0, 0)

    def ends(
        self, end: Ints, other: Ints, members: Sequence[Decoded], transports: Mapping[str, CostModel]
    ) -> list[EndReport]:
        """Per member at ``end`` of the edges that has any."""
        pairs = np.unique(end * (int(other.max(initial=0)) + 1) + other) // (int(other.max(initial=0)) + 1)
        peers = np.bincount(pairs, minlength=len(members)).tolist()
        return [
            EndReport(str(members[key].party.member), peers[key], moved, _seconds(moved, transports))
            for key, moved in self.sums(end)
        ]

    def tensors(self, plan: Plan, every: bool) -> list[TensorReport]:
        """Per tensor or family of tensors."""
        names = plan.catalogue.decoder.names.tensors
        keys: dict[tuple[str, str, tuple[int, ...]], int] = {}
        used, index = np.unique(self.tensor, return_inverse=True)
        numbers = [
            keys.setdefault((t.name if every else family(t.name), t.dtype, t.shape), len(keys))
            for t in (names[i] for i in used.tolist())
        ]
        number = np.array(numbers, np.int64)
        count = np.bincount(number, minlength=len(keys)).tolist()
        of_piece = number[index]
        first = np.full(len(keys), len(of_piece), np.int64)
        np.minimum.at(first, of_piece, np.arange(len(of_piece)))
        sources, targets = _distinct(of_piece, self.source, len(keys)), _distinct(of_piece, self.target, len(keys))
        reports = []
        for (name, dtype, shape), (key, moved) in zip(keys, self.sums(of_piece), strict=True):
            slot, reason = _note(plan.catalogue.sources[self.source[first[key]]], int(self.source_row[first[key]]))
            if not every:
                reason = _rank.sub("a rank", reason)
            how = _how(moved, self.size[first[key]], self.runs[first[key]], plan.cost)
            reports.append(
                TensorReport(name, count[key], dtype, shape, moved, sources[key], targets[key], slot, reason, how)
            )
        return reports


def _joined(columns: Sequence[Ints | Ids]) -> Ints:
    return np.concatenate([np.zeros(0, np.int64), *columns])


def _sum(index: Ints, values: Ints | Flags, count: int) -> list[int]:
    """Exact: float64 sums are, below 2^53."""
    found: list[int] = np.bincount(index, weights=values, minlength=count).astype(np.int64).tolist()
    return found


def _distinct(group: Ints, values: Ints, count: int) -> list[int]:
    """How many different values each group has."""
    width = int(values.max(initial=0)) + 1
    found: list[int] = np.bincount(np.unique(group * width + values) // width, minlength=count).tolist()
    return found


def _seconds(moved: Moved, transports: Mapping[str, CostModel]) -> dict[str, float]:
    return {name: cost.seconds(moved.descriptors, moved.bytes) for name, cost in transports.items()}


def _bottleneck(end: EndReport, cost: CostModel, sends: bool) -> str:
    does, peers = ("sends", "targets") if sends else ("receives", "sources")
    wire, posts = end.moved.bytes / cost.bytes_per_second, end.moved.descriptors * cost.alpha_seconds
    cause = "the wire" if wire >= posts else "descriptors"
    return (
        f"{end.member} {does} {end.moved.bytes / 1e9:.2f} GB in {end.moved.descriptors} descriptors"
        f" ({end.peers} {peers}): {cause}, {wire:.3f} s of bytes and {posts:.3f} s of descriptors"
    )


def _note(source: Decoded, row: int) -> tuple[str, str]:
    for note in source.party.layout.notes:
        if note.first_row <= row < note.end_row:
            return note.slot, note.reason
    return "", ""


def _how(moved: Moved, size: int, runs: int, cost: CostModel) -> str:
    """Of the first piece, which stands for the others."""
    shape = f"{int(size)} bytes in {int(runs)} run{'s' if runs > 1 else ''}"
    limit = int(cost.pack_below_bytes)
    if moved.packed_pieces == moved.pieces:
        return f"packed: {shape}; below {limit} bytes a run is worth packing"
    if moved.packed_pieces:
        return f"packed in {moved.packed_pieces} of {moved.pieces} pieces: {shape}; elsewhere no room or no company"
    if size < runs * cost.pack_below_bytes:
        return f"direct: {shape}; no staging, or nothing else on the edge to share a descriptor with"
    return f"direct: {shape}; a run of {limit} bytes or more is worth a descriptor"


def _largest(reports: list[Report]) -> tuple[Report, ...]:
    return tuple(sorted(reports, key=lambda report: -report.moved.bytes))
