"""What a plan does, per edge and per tensor, and what it will take: numbers for people and for programs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from weightsync.orchestrator.forecast.transfers import Transfers, transfers_of
from weightsync.orchestrator.planner.arrays import Flags, Ints
from weightsync.orchestrator.planner.coalesce import pack_below
from weightsync.orchestrator.planner.decode import Decoded
from weightsync.orchestrator.planner.inputs import CostModel
from weightsync.orchestrator.planner.plan import Plan
from weightsync.orchestrator.protocol.edges import RATES
from weightsync.orchestrator.protocol.landing import Berth, landing_length
from weightsync.orchestrator.protocol.layout import Layout

LINKS: Final[Mapping[str, CostModel]] = {
    link: CostModel(rate.alpha_seconds, rate.bytes_per_second) for link, rate in RATES.items()
}
"""What to predict for, where nothing was measured."""

_rank = re.compile(r"\brank \d+")
_number = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Moved:
    """What moves: ``packed_bytes`` are gathered first, ``direct_bytes`` are not; descriptors that carry both."""

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
    """One (source, target). ``chunks``: descriptors that carry what is packed; ``straight``: the others. ``landing``:
    how what lands does so; empty if nothing does. ``seconds``: by kind of link, alone on it."""

    source: str
    target: str
    moved: Moved
    chunks: int
    straight: int
    landing: str
    seconds: dict[str, float]


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
class LandingReport:
    """How versions land in an engine, and why: ``live``, ``copy`` or ``flip``. ``bytes``: of landing, in all ranks."""

    engine: str
    mode: str
    ranks: int
    bytes: int
    because: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """A plan in numbers. By kind of link: ``gb_per_s`` of an end, ``seconds`` until the slowest end is done,
    ``bottleneck`` names it and why."""

    root: str
    moved: Moved
    sources: int
    targets: int
    gb_per_s: dict[str, float]
    seconds: dict[str, float]
    bottleneck: dict[str, str]
    edges: tuple[EdgeReport, ...]
    tensors: tuple[TensorReport, ...]
    senders: tuple[EndReport, ...]
    receivers: tuple[EndReport, ...]
    unneeded: tuple[str, ...]
    landings: tuple[LandingReport, ...]


_AnyReport = TypeVar("_AnyReport", EdgeReport, TensorReport, EndReport)


def explain(plan: Plan, links: Mapping[str, CostModel] = LINKS, *, every_tensor: bool = False) -> Explanation:
    """Sum a plan up; largest first throughout.

    Args:
        plan: the plan.
        links: what to predict for, as if all went by it; seconds are ``descriptors * alpha + bytes / rate``.
        every_tensor: one report per tensor, and not per family of tensors.
    """
    transfers, sources = transfers_of(plan), plan.catalogue.sources
    edges = _edges(plan, transfers, links)
    senders = _ends(transfers, transfers.source, transfers.target, sources, links)
    receivers = _ends(transfers, transfers.target, transfers.source, transfers.targets, links)
    seconds: dict[str, float] = {}
    bottleneck: dict[str, str] = {}
    for name, cost in links.items():
        slowest = max([*senders, *receivers], key=lambda end: end.seconds[name], default=None)
        seconds[name] = slowest.seconds[name] if slowest else 0.0
        bottleneck[name] = _bottleneck(slowest, cost, slowest in senders) if slowest else "nothing moves"
    return Explanation(
        plan.root, _total(transfers), len(sources), len(transfers.targets),
        {name: cost.bytes_per_second / 1e9 for name, cost in links.items()}, seconds, bottleneck, _largest(edges),
        _largest(_tensors(plan, transfers, every_tensor)), _largest(senders), _largest(receivers), plan.unneeded,
        _landings(transfers.targets),
    )  # fmt: skip


def family(name: str) -> str:
    """A tensor's name with its numbers (layer, expert) replaced by ``*``."""
    return _number.sub("*", name)


def _sums(transfers: Transfers, key: Ints) -> list[tuple[int, Moved]]:
    """What moves per distinct value of ``key [n]``, in ascending order."""
    keys, index = np.unique(key, return_inverse=True)
    size, packed = transfers.size, transfers.packed
    columns = (
        _sum(index, np.where(packed, 0, size), len(keys)),
        _sum(index, np.where(packed, size, 0), len(keys)),
        np.bincount(index, minlength=len(keys)).tolist(),
        _sum(index, packed, len(keys)),
        _sum(index, transfers.descriptors, len(keys)),
    )
    return [(found, Moved(*row)) for found, row in zip(keys.tolist(), zip(*columns, strict=True), strict=True)]


def _total(transfers: Transfers) -> Moved:
    """What moves in the whole plan."""
    found = _sums(transfers, np.zeros_like(transfers.source))
    return found[0][1] if found else Moved(0, 0, 0, 0, 0)


def _edges(plan: Plan, transfers: Transfers, costs: Mapping[str, CostModel]) -> list[EdgeReport]:
    """One report per (source, target) between which anything moves."""
    targets, sources = transfers.targets, plan.catalogue.sources
    reports = []
    edge = transfers.source * len(targets) + transfers.target
    packed = np.where(transfers.packed, transfers.descriptors, 0)
    chunks = dict(zip(*_summed(edge, packed), strict=True))
    for key, moved in _sums(transfers, edge):
        source, target = (sources[key // len(targets)].party.member, targets[key % len(targets)].party)
        berths = plan.part(source).berths[plan.part(source).peers.index(target.member)]
        landing = _landing(berths, target.layout.lands) if berths is not None else ""
        straight = moved.descriptors - chunks[key]
        names = str(source), str(target.member)
        reports.append(EdgeReport(*names, moved, chunks[key], straight, landing, _seconds(moved, costs)))
    return reports


def _landing(berth: Berth, lands: str) -> str:
    """How an edge's cargo lands at an engine of this mode, for people."""
    if not berth.passes:
        return f"{lands}: {berth.bytes} bytes stay there until all have come"
    laps = -(-berth.chunks // berth.places)
    times = "once" if laps == 1 else f"{laps} times"
    return f"{lands}: {berth.bytes} bytes pass {berth.places} places of {berth.chunk_bytes} {times}"


def _landings(targets: Sequence[Decoded]) -> tuple[LandingReport, ...]:
    """One report per engine, in the plan's order; its ranks land alike, and the first one's reason stands for all."""
    ranks: dict[str, list[Layout]] = {}
    for target in targets:
        ranks.setdefault(target.party.member.engine, []).append(target.party.layout)
    return tuple(
        LandingReport(name, of[0].lands, len(of), sum(map(landing_length, of)), of[0].lands_because)
        for name, of in ranks.items()
    )


def _ends(
    transfers: Transfers, end: Ints, other: Ints, members: Sequence[Decoded], costs: Mapping[str, CostModel]
) -> list[EndReport]:
    """One report per member at the ``end [n]`` of a transfer; ``other [n]`` are those at the other end."""
    peers = _distinct(end, other, len(members))
    return [
        EndReport(str(members[key].party.member), peers[key], moved, _seconds(moved, costs))
        for key, moved in _sums(transfers, end)
    ]


def _tensors(plan: Plan, transfers: Transfers, every: bool) -> list[TensorReport]:
    """One report per tensor, or per family of tensors that have dtype and shape in common."""
    names = plan.catalogue.decoder.names.tensors
    keys: dict[tuple[str, str, tuple[int, ...]], int] = {}
    used, index = np.unique(transfers.tensor, return_inverse=True)
    numbers = [
        keys.setdefault((t.name if every else family(t.name), t.dtype, t.shape), len(keys))
        for t in (names[i] for i in used.tolist())
    ]
    number = np.array(numbers, np.int64)
    count = np.bincount(number, minlength=len(keys)).tolist()
    # The family of each transfer ``[n]``, and the first transfer of each family, which stands for the others.
    of_transfer = number[index]
    first = np.full(len(keys), len(of_transfer), np.int64)
    np.minimum.at(first, of_transfer, np.arange(len(of_transfer)))
    sources = _distinct(of_transfer, transfers.source, len(keys))
    targets = _distinct(of_transfer, transfers.target, len(keys))
    reports = []
    for (name, dtype, shape), (key, moved) in zip(keys, _sums(transfers, of_transfer), strict=True):
        at = first[key]
        slot, reason = _note(plan.catalogue.sources[transfers.source[at]], int(transfers.source_row[at]))
        if not every:
            # A family's members lie at many ranks; the one of the first would mislead.
            reason = _rank.sub("a rank", reason)
        lands = bool(transfers.lands[at])
        below = pack_below(plan.catalogue.sources[transfers.source[at]], plan.cost)
        how = _how(moved, transfers.size[at], transfers.runs[at], below, lands=lands)
        reports.append(
            TensorReport(name, count[key], dtype, shape, moved, sources[key], targets[key], slot, reason, how)
        )
    return reports


def _sum(index: Ints, values: Ints | Flags, count: int) -> list[int]:
    """Sums of ``values [n]`` per ``index [n]``. Exact: bincount adds in float64, which is exact below 2^53."""
    found: list[int] = np.bincount(index, weights=values, minlength=count).astype(np.int64).tolist()
    return found


def _summed(index: Ints, values: Ints) -> tuple[list[int], list[int]]:
    """The distinct values of ``index [n]``, and the sum of ``values [n]`` of each."""
    keys, place = np.unique(index, return_inverse=True)
    return keys.tolist(), _sum(place, values, len(keys))


def _distinct(group: Ints, values: Ints, count: int) -> list[int]:
    """How many different ``values [n]`` each of ``count`` groups has, by ``group [n]``."""
    width = int(values.max(initial=0)) + 1
    found: list[int] = np.bincount(np.unique(group * width + values) // width, minlength=count).tolist()
    return found


def _seconds(moved: Moved, links: Mapping[str, CostModel]) -> dict[str, float]:
    return {name: cost.seconds(moved.descriptors, moved.bytes) for name, cost in links.items()}


def _bottleneck(end: EndReport, cost: CostModel, sends: bool) -> str:
    """Which end is the slowest, and whether bytes or descriptors take longer there."""
    does, peers = ("sends", "targets") if sends else ("receives", "sources")
    wire, posts = end.moved.bytes / cost.bytes_per_second, end.moved.descriptors * cost.alpha_seconds
    cause = "the wire" if wire >= posts else "descriptors"
    return (
        f"{end.member} {does} {end.moved.bytes / 1e9:.2f} GB in {end.moved.descriptors} descriptors"
        f" ({end.peers} {peers}): {cause}, {wire:.3f} s of bytes and {posts:.3f} s of descriptors"
    )


def _note(source: Decoded, row: int) -> tuple[str, str]:
    """Kind of slot, and why, as the trainer notes them for a row; both empty without a note."""
    for note in source.party.layout.notes:
        if note.first_row <= row < note.end_row:
            return note.slot, note.reason
    return "", ""


def _how(moved: Moved, size: int, runs: int, below: float, *, lands: bool) -> str:
    """Why pieces go straight or packed, told by the ``size`` and ``runs`` of the first, which stands for the others."""
    shape = f"{int(size)} bytes in {int(runs)} run{'s' if runs > 1 else ''}"
    limit = int(below)
    if moved.packed_pieces == moved.pieces:
        return f"packed: {shape}; below {limit} bytes a run is worth packing"
    if moved.packed_pieces:
        return f"packed in {moved.packed_pieces} of {moved.pieces} pieces: {shape}; elsewhere no company or long runs"
    way = "to the landing as it lies" if lands else "direct"
    if size < runs * below:
        return f"{way}: {shape}; no ring or landing, or nothing else on the edge to share a descriptor with"
    return f"{way}: {shape}; a run of {limit} bytes or more is worth a descriptor"


def _largest(reports: list[_AnyReport]) -> tuple[_AnyReport, ...]:
    return tuple(sorted(reports, key=lambda report: -report.moved.bytes))
