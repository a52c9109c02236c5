"""Layouts for tests: built box by box, of whole tensors, or as random fleets."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise, product

import numpy as np
from hypothesis import strategies as st
from weightsync.orchestrator.planner import Party, Plan
from weightsync.orchestrator.planner.arrays import Ints
from weightsync.orchestrator.protocol.landing import arena_bytes
from weightsync.orchestrator.protocol.layout import (
    COPY_COLUMNS,
    ITEMSIZE,
    ROW_COLUMNS,
    Lands,
    Layout,
    Region,
    Tensor,
    as_matrix,
    row,
)
from weightsync.orchestrator.protocol.names import Member

Box = tuple[tuple[int, ...], tuple[int, ...]]
Shard = tuple[Tensor, Box]
SIZE = 64
"""Rows and columns of most matrices in tests."""


@dataclass
class Builder:
    """Makes one rank's layout, box by box."""

    member: Member
    staging: int = -1
    lands: Lands = "live"
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
        layout = Layout(tuple(self.tensors), tuple(regions), rows, staging)
        if self.lands != "live":
            staging = len(self.regions)
            room = arena_bytes(layout) if self.lands == "copy" else 4096
            regions = [*(Region(0, size) for size in self.regions), Region(0, max(self.staging, room))]
            layout = Layout(layout.tensors, tuple(regions), rows, staging, lands=self.lands)
        return Party(self.member, incarnation, layout)


# ------------------------------------------------------------------------------------------------ whole tensors
def trainer(rank: int) -> Member:
    return Member("trainer", "", rank)


def engine_rank(engine: str, rank: int = 0) -> Member:
    return Member("inference", engine, rank)


def matrices(count: int, shape: tuple[int, ...] = (SIZE, SIZE), dtype: str = "bfloat16") -> list[Tensor]:
    """One weight in each of ``count`` layers."""
    return [Tensor(f"model.layers.{i}.w.weight", dtype, shape) for i in range(count)]


def whole(tensor: Tensor) -> Shard:
    return tensor, ((0,) * len(tensor.shape), tensor.shape)


def party_of(member: Member, tensors: Sequence[Tensor], *, staging: int = -1, incarnation: int = 1) -> Party:
    """A party that holds, or needs, whole tensors one behind the other; staging of -1 bytes is none."""
    builder = Builder(member, staging)
    for tensor in tensors:
        builder.dense(whole(tensor))
    return builder.party(incarnation)


def copies_of(plan: Plan, member: Member) -> Ints:
    """The table of a member as the matrix ``[n, COPY_COLUMNS]``."""
    return as_matrix(plan.part(member).copies, COPY_COLUMNS)


# ------------------------------------------------------------------------------------------------ random fleets
DTYPES = ("float8_e4m3fn", "bfloat16", "float32")
BLOCK = 4
"""Rows and columns per scale in random fleets; real ones have 128."""

# Drawing is most of what these fleets cost, and half of that is making strategies anew: they are made once.
FLAGS = st.booleans()
GAPS = st.integers(0, 2)
WAYS = st.sampled_from(["rows", "columns", "interleaved"])
STAGING = st.sampled_from([-1, 0, 600, 1 << 20])
LANDS: st.SearchStrategy[Lands] = st.sampled_from(["live", "live", "copy", "flip"])
WIRE_DTYPES = st.sampled_from(DTYPES)
up_to = cache(lambda most: st.integers(1, most))
cuts_below = cache(lambda most: st.sets(st.integers(1, most), max_size=2))
some_of = cache(lambda count: st.sets(st.integers(0, count - 1), min_size=1))
shapes = cache(lambda rank: st.lists(up_to(9 if rank < 3 else 5), min_size=rank, max_size=rank))
ordered_choice = cache(lambda count: st.lists(st.integers(0, count - 1), unique=True))
RANKS = st.integers(0, 4)


def cells(cuts: Sequence[Sequence[int]]) -> list[Box]:
    """Boxes of the grid with these cut points (ends included) per dimension."""
    spans = [[(a, b - a) for a, b in pairwise(c)] for c in cuts]
    return [(tuple(a for a, _ in cell), tuple(n for _, n in cell)) for cell in product(*spans)]


@st.composite
def grids(draw: st.DrawFn, shape: tuple[int, ...], unit: int = 1) -> list[Box]:
    """A random uneven mesh over a tensor, cut only at multiples of ``unit``."""
    cuts = []
    for extent in shape:
        inner = draw(cuts_below(max(1, (extent - 1) // unit)))
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
    count = draw(up_to(4))
    found = []
    for i in range(count):
        shape = tuple(draw(shapes(draw(RANKS))))
        layer = f"model.layers.{i % 2}." if draw(FLAGS) else "model."
        found.append(Tensor(f"{layer}t{i}.weight", draw(WIRE_DTYPES), shape))
    return found


def quantised(tensor: Tensor) -> bool:
    return tensor.dtype == "float8_e4m3fn" and len(tensor.shape) in (2, 3)


@st.composite
def fleets(draw: st.DrawFn) -> tuple[list[Party], list[Party]]:
    """Sources that together hold a random model (with replicas, some sharded otherwise), and targets that need it."""
    model = draw(models())
    senders = [Builder(trainer(r), draw(STAGING)) for r in range(draw(up_to(5)))]
    for tensor in model:
        for _ in range(draw(up_to(2))):
            for box in draw(grids(tensor.shape, BLOCK if quantised(tensor) else 1)):
                for holder in draw(some_of(len(senders))):
                    place(draw, senders[holder], tensor, box)
    targets = []
    for engine in range(draw(up_to(3))):
        for rank in range(draw(up_to(3))):
            target = Builder(engine_rank(f"e{engine}", rank), draw(STAGING), draw(LANDS))
            for tensor in model:
                mesh = draw(grids(tensor.shape, BLOCK if quantised(tensor) else 1))
                for nth in draw(ordered_choice(len(mesh))):
                    place(draw, target, tensor, mesh[nth])
            targets.append(target)
    return [s.party() for s in senders], [t.party() for t in targets]


def place(draw: st.DrawFn, where: Builder, tensor: Tensor, box: Box) -> None:
    """Put a box (and its scales) into a rank's memory in one of several ways."""
    if draw(FLAGS):
        where.regions.append(0)
    how = draw(WAYS)
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
        where.dense((tensor, box), draw(GAPS), order[::-1] if how == "columns" else order)
    if quantised(tensor):
        where.dense((scales_of(tensor), scaled(box)))
