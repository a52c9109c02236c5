"""Fleets that one does not have at hand, as layouts.

They follow the agents' rules: the trainer holds FSDP shards where they stand alone, else a tensor whole at one rank in
turn, and experts by expert-parallel and FSDP rank; an engine is expert-parallel ranks with data-parallel attention and
fuses q_a + kv_a, gate + up and w1 + w3.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Final, Literal

import numpy as np
from weightsync.orchestrator.forecast.published_models import (
    BLOCK,
    FP8,
    FP32,
    Geometry,
    Weight,
    expert_weights,
    layer_weights,
    other_weights,
    scale_shape,
)
from weightsync.orchestrator.planner.arrays import Ints
from weightsync.orchestrator.planner.inputs import Party
from weightsync.orchestrator.protocol.layout import (
    ITEMSIZE,
    ROW_COLUMNS,
    ROW_OFFSET,
    ROW_REGION,
    ROW_TENSOR,
    Layout,
    Note,
    Region,
    Tensor,
    row,
)
from weightsync.orchestrator.protocol.names import Member

MIN_SHARDED_BYTES: Final = 2 << 20
"""Of a rank's share; smaller ones are gathered. A sharded tensor costs as many writes as shards times engine ranks."""

ALIGNMENT: Final = 256
"""Of every slot."""

Pair = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TrainerFleet:
    """``replicas`` of ``expert_parallel * fsdp`` ranks. ``expert_shards``: along which dimension FSDP splits the
    experts of an expert-parallel rank; experts that do not divide are held whole by its FSDP ranks in turn."""

    expert_parallel: int
    fsdp: int
    replicas: int = 1
    expert_shards: Literal["experts", "rows"] = "experts"
    staging: int = 256 << 20

    @property
    def world(self) -> int:
        """Ranks of one replica."""
        return self.expert_parallel * self.fsdp


@dataclass(frozen=True, slots=True)
class EngineFleet:
    """``engines`` of ``expert_parallel`` ranks each."""

    engines: int
    expert_parallel: int
    staging: int = 256 << 20


class _Names:
    """The tensors of every layer and expert, made once and shared by all ranks."""

    def __init__(self, g: Geometry, layers: int) -> None:
        self.other = [list(w.tensors("model.")) for w in other_weights(g)]
        self.layers = [[list(w.tensors(f"model.layers.{i}.")) for w in layer_weights(g, i)] for i in range(layers)]
        routed = expert_weights(g)
        self.experts = [
            [
                [t for w in routed for t in w.tensors(f"model.layers.{i}.mlp.experts.{e}.")]
                for e in range(g.experts if i >= g.dense_layers else 0)
            ]
            for i in range(layers)
        ]


@dataclass(slots=True)
class _Block:
    """Rows whose tensors, regions and offsets count from the block's beginning, so that layers can share it."""

    rows: list[list[int]] = field(default_factory=list)
    regions: list[int] = field(default_factory=list)
    size: int = 0

    def slot(self, tensor: int, dtype: str, low: Pair, extent: Pair) -> None:
        """A box in the arena, dense."""
        self.rows.append(row(tensor, 0, self.size, low, extent, _dense(extent, dtype)))
        size = prod(extent) * ITEMSIZE[dtype]
        self.size += -(-size // ALIGNMENT) * ALIGNMENT

    def slots(self, tensor: int, weight: Weight, low: Pair, extent: Pair) -> None:
        """A box in the arena, and its scales."""
        self.slot(tensor, weight.dtype, low, extent)
        if weight.dtype == FP8:
            self.slot(tensor + 1, FP32, tuple(at // BLOCK for at in low), scale_shape(extent))

    def part(self, tensor: int, dtype: str, shape: Pair, region: int) -> None:
        """A whole tensor at the end of a region, which may be new."""
        if region == len(self.regions):
            self.regions.append(0)
        self.rows.append(row(tensor, region, self.regions[region], (0,) * len(shape), shape, _dense(shape, dtype)))
        self.regions[region] += prod(shape) * ITEMSIZE[dtype]


@dataclass(slots=True)
class _Rank:
    """A layout under construction; ``arena``: one region for everything, which grows."""

    member: Member
    staging: int
    regions: list[int]
    arena: bool
    tensors: list[Tensor] = field(default_factory=list)
    rows: list[Ints] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    count: int = 0

    def add(self, block: _Block, tensors: Sequence[Tensor], slot: str = "", reason: str = "") -> None:
        matrix = np.array(block.rows, np.int64).reshape(-1, ROW_COLUMNS)
        matrix[:, ROW_TENSOR] += len(self.tensors)
        # A trainer has one region that slots are cut from; an engine's parameters are regions of their own.
        if self.arena:
            matrix[:, ROW_OFFSET] += self.regions[0]
            self.regions[0] += block.size
        else:
            matrix[:, ROW_REGION] += len(self.regions)
            self.regions.extend(block.regions)
        if slot:
            self.notes.append(Note(self.count, self.count + len(matrix), slot, reason))
        self.count += len(matrix)
        self.tensors.extend(tensors)
        self.rows.append(matrix)

    def party(self) -> Party:
        regions = [Region(0, size, "VRAM") for size in (*self.regions, self.staging)]
        rows = np.concatenate(self.rows).astype("<i8").tobytes()
        layout = Layout(tuple(self.tensors), tuple(regions), rows, len(regions) - 1, notes=tuple(self.notes))
        return Party(self.member, 1, layout)


def _dense(extent: Pair, dtype: str) -> Pair:
    strides, size = [], ITEMSIZE[dtype]
    for n in reversed(extent):
        strides.append(size)
        size *= n
    return tuple(reversed(strides))


# ----------------------------------------------------------------------------------------------------- the trainer
def trainer_parties(g: Geometry, fleet: TrainerFleet, layers: int | None = None) -> list[Party]:
    """What the trainer ranks hold; ``layers`` below the model's makes a shallower model of the same kinds.

    Rank = (replica * fsdp + FSDP rank) * expert_parallel + expert-parallel rank.
    """
    depth = g.all_layers if layers is None else layers
    names = _Names(g, depth)
    return [_trainer_rank(g, fleet, names, depth, rank) for rank in range(fleet.world * fleet.replicas)]


def _trainer_rank(g: Geometry, fleet: TrainerFleet, names: _Names, depth: int, rank: int) -> Party:
    place = _Rank(Member("trainer", "", rank), fleet.staging, [0], arena=True)
    experts = _expert_slots(g, fleet, rank % fleet.world)
    fsdp_rank = rank % fleet.world // fleet.expert_parallel
    turn = 0
    # -1 stands for what is in no layer.
    for layer in range(-1, depth):
        weights = other_weights(g) if layer < 0 else layer_weights(g, layer)
        tensors = names.other if layer < 0 else names.layers[layer]
        for weight, own in zip(weights, tensors, strict=True):
            _hold(place, weight, own, fleet.world, rank % fleet.world, turn)
            turn += 1
        if layer >= g.dense_layers:
            for nth, share in enumerate(experts):
                # Gathered matrices go round the FSDP ranks that could each hold the whole of them.
                if share.slot == "expert" or (layer * len(experts) + nth) % fleet.fsdp == fsdp_rank:
                    held = names.experts[layer][share.first : share.first + share.count]
                    place.add(
                        share.block, [t for e in held for t in e[2 * nth : 2 * nth + 2]], share.slot, share.reason
                    )
    return place.party()


def _hold(place: _Rank, weight: Weight, tensors: list[Tensor], world: int, rank: int, turn: int) -> None:
    """The rank's share of a weight that all ranks shard, or all of it if it is gathered and this is the rank's turn."""
    block = _Block()
    obstacle = sharding_obstacle(weight, world)
    if not obstacle:
        share = weight.shape[0] // world
        rest = weight.shape[1:]
        block.slots(0, weight, (rank * share, *(0 for _ in rest)), (share, *rest))
        place.add(block, tensors, "sharded", "each rank's share stands alone")
    elif turn % world == rank:
        block.slots(0, weight, (0,) * len(weight.shape), weight.shape)
        place.add(block, tensors, "gathered", f"{obstacle}; rank {rank} has it")


def sharding_obstacle(weight: Weight, world: int) -> str:
    """Why the shares of ``world`` ranks cannot stand alone; empty if they can."""
    rows = weight.shape[0]
    if rows % world:
        return f"{rows} rows are not divisible by {world} ranks"
    if weight.dtype == FP8 and rows // world % BLOCK:
        return f"{rows // world} rows per rank cut a block of {BLOCK}"
    size = prod(weight.shape) * ITEMSIZE[weight.dtype] // world
    if size < MIN_SHARDED_BYTES:
        return f"{size} bytes per rank are fewer than {MIN_SHARDED_BYTES}"
    return ""


@dataclass(frozen=True, slots=True)
class _ExpertShare:
    """What one rank may hold of one of the matrices of experts ``[first, first + count)``, in every layer."""

    first: int
    count: int
    block: _Block
    slot: str
    reason: str


def _expert_slots(g: Geometry, fleet: TrainerFleet, rank: int) -> list[_ExpertShare]:
    """Per matrix of an expert; a gathered share is held only when it is the rank's turn."""
    expert_rank, fsdp_rank = rank % fleet.expert_parallel, rank // fleet.expert_parallel
    if g.experts % fleet.expert_parallel:
        raise ValueError(f"{g.experts} experts are not divisible by {fleet.expert_parallel} expert-parallel ranks")
    local = g.experts // fleet.expert_parallel
    shares = []
    for weight in expert_weights(g):
        first, count, (low, rows), slot = expert_rank * local, local, (0, weight.shape[0]), "expert"
        reason = "routed by global expert id"
        if fleet.expert_shards == "rows" and rows % (fleet.fsdp * BLOCK) == 0:
            rows //= fleet.fsdp
            low = fsdp_rank * rows
        elif fleet.expert_shards == "experts" and local % fleet.fsdp == 0:
            count //= fleet.fsdp
            first += fsdp_rank * count
        elif fleet.fsdp > 1:
            slot, reason = "gathered", f"{local} experts are not divisible by {fleet.fsdp} FSDP ranks"
            if fleet.expert_shards == "rows":
                reason = f"{rows} rows do not divide into blocks of {BLOCK} over {fleet.fsdp} FSDP ranks"
        # Tensors of an expert alternate, weight and scales; in the arena all weights come before all scales.
        block = _Block()
        for nth in range(count):
            block.slot(2 * nth, weight.dtype, (low, 0), (rows, weight.shape[1]))
        for nth in range(count):
            block.slot(2 * nth + 1, FP32, (low // BLOCK, 0), scale_shape((rows, weight.shape[1])))
        shares.append(_ExpertShare(first, count, block, slot, reason))
    return shares


# ----------------------------------------------------------------------------------------------------- the engines
def engine_parties(g: Geometry, fleet: EngineFleet, layers: int | None = None) -> list[Party]:
    """What the ranks of the engines need; ``layers`` as for the trainer."""
    depth = g.all_layers if layers is None else layers
    if g.experts % fleet.expert_parallel:
        raise ValueError(f"{g.experts} experts are not divisible by {fleet.expert_parallel} expert-parallel ranks")
    names = _Names(g, depth)
    return [
        _engine_rank(g, fleet, names, depth, f"engine-{engine}", rank)
        for engine in range(fleet.engines)
        for rank in range(fleet.expert_parallel)
    ]


def _engine_rank(g: Geometry, fleet: EngineFleet, names: _Names, depth: int, engine: str, rank: int) -> Party:
    place = _Rank(Member("inference", engine, rank), fleet.staging, [], arena=False)
    local = g.experts // fleet.expert_parallel
    experts = _fused_experts(g, local)
    blocks: dict[int, _Block] = {}
    for layer in range(-1, depth):
        weights = other_weights(g) if layer < 0 else layer_weights(g, layer)
        tensors = names.other if layer < 0 else names.layers[layer]
        # Layers of one kind (dense, with experts, further tokens) have equally many weights, and share one block.
        key = len(weights)
        if key not in blocks:
            blocks[key] = _fused(weights)
        place.add(blocks[key], [t for own in tensors for t in own])
        if layer >= g.dense_layers:
            place.add(experts, [t for e in names.experts[layer][rank * local : (rank + 1) * local] for t in e])
    return place.party()


def _fused(weights: Sequence[Weight]) -> _Block:
    """Whole weights, those of one parameter below each other; their scales likewise in a parameter of their own."""
    block = _Block()
    regions: dict[str, int] = {}
    tensor = 0
    for weight in weights:
        into = weight.into or weight.name
        block.part(tensor, weight.dtype, weight.shape, regions.setdefault(into, len(block.regions)))
        tensor += 1
        if weight.dtype == FP8:
            place = regions.setdefault(into + "_scale_inv", len(block.regions))
            block.part(tensor, FP32, scale_shape(weight.shape), place)
            tensor += 1
    return block


def _fused_experts(g: Geometry, local: int) -> _Block:
    """w13, its scales, w2, its scales; in each one expert after the other."""
    block = _Block()
    for nth in range(local):
        for i, weight in enumerate(expert_weights(g)):
            # gate and up (0 and 1) are w13, in regions 0 and 1 with its scales; down is w2, in 2 and 3.
            tensor, region = 2 * (3 * nth + i), 0 if i < 2 else 2
            if region == len(block.regions):
                block.regions += [0, 0]
            block.part(tensor, weight.dtype, weight.shape, region)
            block.part(tensor + 1, FP32, scale_shape(weight.shape), region + 1)
    return block
