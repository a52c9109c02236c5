"""A planner's test bench: random fleets, and an executor that moves bytes as the tables say.

The executor shares no code with the planner: it works on one byte address per element and byte.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from weightsync.orchestrator.planner import Party, Plan
from weightsync.orchestrator.protocol.layout import (
    COPY_BOX,
    COPY_COLUMNS,
    COPY_PEER,
    COPY_REMOTE,
    COPY_ROW,
    COPY_STAGED,
    ITEMSIZE,
    ROW_BOX,
    ROW_COLUMNS,
    Layout,
    Region,
    Tensor,
    as_matrix,
    row,
)
from weightsync.orchestrator.protocol.limits import MAX_RANK
from weightsync.orchestrator.protocol.names import Member

Bytes = npt.NDArray[np.uint8]
Box = tuple[tuple[int, ...], tuple[int, ...]]
Shard = tuple[Tensor, Box]


@dataclass
class Builder:
    """Makes one rank's layout, box by box."""

    member: Member
    staging: int = -1
    tensors: list[Tensor] = field(default_factory=list)
    regions: list[int] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)

    def hold(self, shard: Shard, region: int, offset: int, strides: Sequence[int]) -> None:
        tensor, (low, extent) = shard
        if tensor not in self.tensors:
            self.tensors.append(tensor)
        self.rows.append(row(self.tensors.index(tensor), region, offset, low, extent, tuple(strides)))

    def dense(self, shard: Shard, gap: int = 0, order: Sequence[int] = ()) -> None:
        """Put a box into the last region, contiguous in dimension order ``order``."""
        tensor, (_, extent) = shard
        if not self.regions:
            self.regions.append(0)
        strides, size = [0] * len(extent), ITEMSIZE[tensor.dtype]
        for dim in reversed(order or range(len(extent))):
            strides[dim] = size
            size *= extent[dim]
        self.hold(shard, len(self.regions) - 1, self.regions[-1] + gap, strides)
        self.regions[-1] += gap + size

    def side_by_side(self, shards: Sequence[Shard]) -> None:
        """Concatenate 2-D boxes of equal height and dtype along their columns, in a region of their own."""
        item = ITEMSIZE[shards[0][0].dtype]
        height = shards[0][1][1][0]
        width = sum(box[1][1] for _, box in shards)
        self.regions.append(height * width * item)
        at = 0
        for shard in shards:
            self.hold(shard, len(self.regions) - 1, at * item, (width * item, item))
            at += shard[1][1][1]

    def party(self, incarnation: int = 1) -> Party:
        regions = [Region(0, size) for size in self.regions]
        staging = -1
        if self.staging >= 0:
            staging = len(regions)
            regions.append(Region(0, self.staging))
        rows = np.array(self.rows, "<i8").reshape(-1, ROW_COLUMNS).tobytes()
        return Party(self.member, incarnation, Layout(tuple(self.tensors), tuple(regions), rows, staging))


def addresses(offset: int, extent: Sequence[int], stride: Sequence[int], item: int) -> npt.NDArray[np.int64]:
    """Byte addresses ``[elements, item]`` of a box in row-major order."""
    place = np.array([offset], np.int64)
    for n, step in zip(extent, stride, strict=True):
        place = (place[:, None] + np.arange(n) * step).reshape(-1)
    return place[:, None] + np.arange(item)


def slice_of(full: Bytes, low: Sequence[int], extent: Sequence[int]) -> Bytes:
    """The bytes ``[elements, item]`` of a box of a tensor ``[*padded shape, item]``."""
    index = tuple(slice(a, a + n) for a, n in zip(low, extent, strict=True))
    return full[index].reshape(-1, full.shape[-1])


@dataclass
class Memory:
    """The regions of every member."""

    regions: dict[Member, list[Bytes]]
    written: dict[Member, list[npt.NDArray[np.int64]]]


def full_tensors(parties: Sequence[Party], seed: int) -> dict[str, Bytes]:
    rng = np.random.default_rng(seed)
    full = {}
    for tensor in dict.fromkeys(t for p in parties for t in p.layout.tensors):
        shape = (1,) * (MAX_RANK - len(tensor.shape)) + tensor.shape
        full[tensor.name] = rng.integers(0, 256, (*shape, ITEMSIZE[tensor.dtype]), np.uint8)
    return full


def row_bytes(party: Party, index: int) -> tuple[Tensor, int, npt.NDArray[np.int64], list[int], list[int]]:
    """Of one row: tensor, region, byte addresses, box offset and extent."""
    values = party.layout.matrix()[index].tolist()
    tensor = party.layout.tensors[values[0]]
    low, extent, stride = values[ROW_BOX::3], values[ROW_BOX + 1 :: 3], values[ROW_BOX + 2 :: 3]
    return tensor, values[1], addresses(values[2], extent, stride, ITEMSIZE[tensor.dtype]), low, extent


def execute(plan: Plan, sources: Sequence[Party], targets: Sequence[Party], full: Mapping[str, Bytes]) -> Memory:
    """Fill the sources from ``full``, do every copy of every table, scatter what arrived packed."""
    parties = {p.member: p for p in (*sources, *targets)}
    memory = Memory(
        {m: [np.zeros(r.length, np.uint8) for r in p.layout.regions] for m, p in parties.items()},
        {m: [np.zeros(r.length, np.int64) for r in p.layout.regions] for m, p in parties.items()},
    )
    for source in sources:
        for index in range(len(source.layout.matrix())):
            tensor, region, place, low, extent = row_bytes(source, index)
            memory.regions[source.member][region][place] = slice_of(full[tensor.name], low, extent)
    for source in sources:
        send(plan, source, parties, memory)
    for target in targets:
        scatter(plan, target, memory)
    return memory


def send(plan: Plan, source: Party, parties: Mapping[Member, Party], memory: Memory) -> None:
    part = plan.part(source.member)
    table = as_matrix(part.copies, COPY_COLUMNS)
    own = memory.regions[source.member]
    packed: dict[Member, list[tuple[int, int, int, int]]] = {}
    for copy in table.tolist():
        peer = part.peers[copy[COPY_PEER]]
        low, extent = copy[COPY_BOX:COPY_REMOTE:2], copy[COPY_BOX + 1 : COPY_REMOTE : 2]
        values = source.layout.matrix()[copy[COPY_ROW]].tolist()
        strides = values[ROW_BOX + 2 :: 3]
        item = ITEMSIZE[source.layout.tensors[values[0]].dtype]
        corner = values[2] + sum((a - b) * s for a, b, s in zip(low, values[ROW_BOX::3], strides, strict=True))
        data = own[values[1]][addresses(corner, extent, strides, item)]
        region, offset = copy[COPY_REMOTE], copy[COPY_REMOTE + 1]
        if copy[COPY_STAGED] < 0:
            place = addresses(offset, extent, copy[COPY_REMOTE + 2 :], item)
            memory.regions[peer][region][place] = data
            np.add.at(memory.written[peer][region], place.reshape(-1), 1)
        else:
            at = copy[COPY_STAGED]
            own[source.layout.staging][at : at + data.size] = data.reshape(-1)
            assert region == parties[peer].layout.staging
            packed.setdefault(peer, []).append((at, offset, data.size, region))
    for peer, pieces in packed.items():
        pieces.sort()
        assert all(a + size == b for (a, _, size, _), (b, *_) in pairwise(pieces)), "an edge's packed bytes are one run"
        assert len({a - b for a, b, _, _ in pieces}) == 1
        start, remote, region = pieces[0][0], pieces[0][1], pieces[0][3]
        length = sum(size for _, _, size, _ in pieces)
        memory.regions[peer][region][remote : remote + length] = own[source.layout.staging][start : start + length]
        memory.written[peer][region][remote : remote + length] += 1


def scatter(plan: Plan, target: Party, memory: Memory) -> None:
    part = plan.part(target.member)
    own = memory.regions[target.member]
    for copy in as_matrix(part.copies, COPY_COLUMNS).tolist():
        assert 0 <= copy[COPY_PEER] < len(part.peers)
        low, extent = copy[COPY_BOX:COPY_REMOTE:2], copy[COPY_BOX + 1 : COPY_REMOTE : 2]
        values = target.layout.matrix()[copy[COPY_ROW]].tolist()
        strides = values[ROW_BOX + 2 :: 3]
        item = ITEMSIZE[target.layout.tensors[values[0]].dtype]
        corner = values[2] + sum((a - b) * s for a, b, s in zip(low, values[ROW_BOX::3], strides, strict=True))
        place = addresses(corner, extent, strides, item)
        at = copy[COPY_STAGED]
        own[values[1]][place] = own[target.layout.staging][at : at + place.size].reshape(place.shape)
        np.add.at(memory.written[target.member][values[1]], place.reshape(-1), 1)


def assert_delivered(targets: Sequence[Party], full: Mapping[str, Bytes], memory: Memory) -> None:
    """Every row holds its slice of the full tensor, and each of its bytes was written once, and no other byte."""
    for target in targets:
        due = [np.zeros(r.length, np.int64) for r in target.layout.regions]
        for index in range(len(target.layout.matrix())):
            tensor, region, place, low, extent = row_bytes(target, index)
            np.testing.assert_array_equal(
                memory.regions[target.member][region][place], slice_of(full[tensor.name], low, extent)
            )
            due[region][place] += 1
        for region, expected in enumerate(due):
            if region != target.layout.staging:
                np.testing.assert_array_equal(memory.written[target.member][region], expected)
        if target.layout.staging >= 0:
            assert memory.written[target.member][target.layout.staging].max(initial=0) <= 1


# ------------------------------------------------------------------------------------------------ random fleets
DTYPES = ("float8_e4m3fn", "bfloat16", "float32")
BLOCK = 4
"""Rows and columns per scale in random fleets; real ones have 128."""


def cells(cuts: Sequence[Sequence[int]]) -> list[Box]:
    """Boxes of the grid with these cut points (ends included) per dimension."""
    spans = [[(a, b - a) for a, b in pairwise(c)] for c in cuts]
    return [(tuple(a for a, _ in cell), tuple(n for _, n in cell)) for cell in product(*spans)]


@st.composite
def grids(draw: st.DrawFn, shape: tuple[int, ...], unit: int = 1) -> list[Box]:
    """A random uneven mesh over a tensor, cut only at multiples of ``unit``."""
    cuts = []
    for extent in shape:
        inner = draw(st.sets(st.integers(1, max(1, (extent - 1) // unit)), max_size=2))
        cuts.append(sorted({0, extent, *(c * unit for c in inner if c * unit < extent)}))
    return cells(cuts)


def scaled(box: Box) -> Box:
    """The box of scales over a box of weights; 3-D weights are quantised per matrix."""
    blocks = [1] * (len(box[0]) - 2) + [BLOCK, BLOCK]
    low = tuple(a // b for a, b in zip(box[0], blocks, strict=True))
    high = tuple(-(-(a + n) // b) for a, n, b in zip(*box, blocks, strict=True))
    return low, tuple(h - a for a, h in zip(low, high, strict=True))


def scales_of(tensor: Tensor) -> Tensor:
    return Tensor(tensor.name + "_scale_inv", "float32", scaled(((0,) * len(tensor.shape), tensor.shape))[1])


@st.composite
def models(draw: st.DrawFn) -> list[Tensor]:
    count = draw(st.integers(1, 4))
    found = []
    for i in range(count):
        rank = draw(st.integers(0, 4))
        shape = tuple(draw(st.lists(st.integers(1, 9 if rank < 3 else 5), min_size=rank, max_size=rank)))
        layer = draw(st.sampled_from([f"model.layers.{i % 2}.", "model."]))
        found.append(Tensor(f"{layer}t{i}.weight", draw(st.sampled_from(DTYPES)), shape))
    return found


def quantised(tensor: Tensor) -> bool:
    return tensor.dtype == "float8_e4m3fn" and len(tensor.shape) in (2, 3)


@st.composite
def fleets(draw: st.DrawFn) -> tuple[list[Party], list[Party]]:
    """Sources that together hold a random model (with replicas, some sharded otherwise), and targets that need it."""
    model = draw(models())
    staging = st.sampled_from([-1, 0, 600, 1 << 20])
    senders = [Builder(Member("trainer", "", r), draw(staging)) for r in range(draw(st.integers(1, 5)))]
    for tensor in model:
        for _ in range(draw(st.integers(1, 2))):
            for box in draw(grids(tensor.shape, BLOCK if quantised(tensor) else 1)):
                for holder in draw(st.sets(st.sampled_from(range(len(senders))), min_size=1)):
                    place(draw, senders[holder], tensor, box)
    targets = []
    for engine in range(draw(st.integers(1, 3))):
        for rank in range(draw(st.integers(1, 3))):
            target = Builder(Member("inference", f"e{engine}", rank), draw(staging))
            for tensor in model:
                mesh = draw(grids(tensor.shape, BLOCK if quantised(tensor) else 1))
                for box in draw(st.lists(st.sampled_from(mesh), unique=True)):
                    place(draw, target, tensor, box)
            targets.append(target)
    return [s.party() for s in senders], [t.party() for t in targets]


def place(draw: st.DrawFn, where: Builder, tensor: Tensor, box: Box) -> None:
    """Put a box (and its scales) into a rank's memory in one of several ways."""
    if draw(st.booleans()):
        where.regions.append(0)
    how = draw(st.sampled_from(["rows", "columns", "interleaved"]))
    if how == "interleaved" and len(tensor.shape) == 2 and box[1][1] > 1:
        left = box[1][1] // 2
        low, extent = box
        halves = [
            (tensor, ((low[0], low[1] + left), (extent[0], extent[1] - left))),
            (tensor, (low, (extent[0], left))),
        ]
        where.side_by_side(halves)
    else:
        order = list(range(len(tensor.shape)))
        where.dense((tensor, box), draw(st.integers(0, 2)), order[::-1] if how == "columns" else order)
    if quantised(tensor):
        where.dense((scales_of(tensor), scaled(box)))
