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
from weightsync.orchestrator.core.plan.arrays import Ints
from weightsync.orchestrator.core.plan.geometry import (
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
from weightsync.orchestrator.core.plan.inputs import Party
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
"""A smaller tensor is gathered; the trainer agents' default."""

ALIGNMENT: Final = 256
"""Of every slot."""

Pair = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TrainerFleet:
    """``replicas`` of ``expert_parallel * fsdp`` ranks. ``expert_shards``: along which dimension FSDP splits the experts
    of an expert-parallel rank; experts that do not divide are held whole by its FSDP ranks in turn."""

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
    """A layout under construction."""

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
    routed, (slot, reason) = _experts(g, fleet), _expert_rule(g, fleet)
    experts = _expert_blocks(g, fleet, routed, rank % fleet.world)
    turn = 0
    for layer in range(-1, depth):
        weights = other_weights(g) if layer < 0 else layer_weights(g, layer)
        tensors = names.other if layer < 0 else names.layers[layer]
        for weight, own in zip(weights, tensors, strict=True):
            _hold(place, weight, own, fleet.world, rank % fleet.world, turn)
            turn += 1
        if layer >= g.dense_layers:
            for nth, (first, count, block) in enumerate(experts):
                if slot == "expert" or (layer * len(experts) + nth) % fleet.fsdp == _fsdp_rank(fleet, rank):
                    held = names.experts[layer][first : first + count]
                    place.add(block, [t for e in held for t in e[routed[nth]]], slot, reason)
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
    size = prod(weight.shape) * ITEMSIZE[weight.dtype]
    if size // world < MIN_SHARDED_BYTES:
        return f"{size // world} bytes per rank are fewer than {MIN_SHARDED_BYTES}"
    return ""
