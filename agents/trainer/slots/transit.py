"""Shards of one mesh on their way to the owners of gathered tensors: their places in a buffer, and the collectives."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from weightsync.agents.trainer.slots.boxes import Cut, Grid, HeldBox, LocalShare
from weightsync.agents.trainer.slots.conversion import Source
from weightsync.agents.trainer.slots.journeys import Blob, Coordinate, Journey, exchanges
from weightsync.agents.trainer.slots.reading import Picks, Taken
from weightsync.agents.trainer.slots.routing import part_of
from weightsync.agents.trainer.slots.slot import Slot
from weightsync.agents.trainer.slots.whole import group_order

_UNIT: Final = 16
"""Bytes that every piece in a buffer is aligned to: any dtype can be viewed there, and copies use wide accesses."""


@dataclass(frozen=True, slots=True)
class Item:
    """One source of one gathered slot. ``number``: of its reading. ``offset``: of its part along ``cat_dim``.

    ``parts``: which boxes of the source's part each coordinate has, 0 in the dimensions that do not cut it.
    """

    slot: Slot
    number: int
    mesh: DeviceMesh | None
    here: Coordinate
    local_shape: tuple[int, ...]
    journey: Journey
    parts: Mapping[Coordinate, tuple[HeldBox, ...]]
    cat_dim: int
    offset: int

    @property
    def dtype(self) -> torch.dtype:
        """In which it travels."""
        return self.slot.spec.quantization.gather_dtype

    def pieces(self, begins: Coordinate, place: int) -> Iterator[tuple[HeldBox, int]]:
        """The boxes of the shard that begins at a coordinate, and the place of each, if the shard's is ``place``."""
        key = tuple(index if dim in self.journey.dims else 0 for dim, index in enumerate(begins))
        for part in self.parts[key]:
            yield part, place
            place += padded(part.box.volume * self.dtype.itemsize)


def items_of(slot: Slot, numbers: Mapping[str, int], meshes: Sequence[DeviceMesh | None]) -> Iterator[Item]:
    """The sources of a gathered slot that this rank has a part in.

    Args:
        slot: bound.
        numbers: of the readings, by the trainer's names.
        meshes: of the readings.
    """
    spec, owner = slot.spec, slot.route.owner
    stacked = int(spec.experts > 0)
    for source, share, offset in zip(spec.sources, slot.shares, slot.route.offsets, strict=True):
        grid = share.grid
        if grid is not None and owner not in grid.ranks:
            continue  # another mesh has the same tensor, and the owner in it
        shape = grid.shape if grid else ()
        at = tuple(int(i) for i in np.unravel_index(grid.ranks.index(owner), shape)) if grid else ()
        part = Source("", source.dim, source.start, source.length)  # layers differ in their names only
        shards = _shards(share.shape, share.cuts, shape, part, stacked, spec.quantization.gather_dtype.itemsize)
        yield Item(
            slot=slot,
            number=numbers[source.key],
            mesh=meshes[numbers[source.key]],
            here=grid.coordinate if grid else (),
            local_shape=share.local_shape,
            journey=Journey(at, shards.dims, shards.sizes),
            parts=shards.parts,
            cat_dim=spec.cat_dim + stacked,
            offset=offset,
        )


def padded(size: int) -> int:
    """``size`` bytes rounded up to whole units."""
    return -(-size // _UNIT) * _UNIT


@dataclass(slots=True)
class _Leg:
    """One exchange. ``send`` and ``receive``: where its bytes begin, and how many for each position of the dimension.

    ``moves``: from, to and size of what arrived in an earlier leg and goes on in this one.
    """

    group: dist.ProcessGroup
    send: tuple[int, list[int]]
    receive: tuple[int, list[int]]
    moves: list[tuple[int, int, int]]


@dataclass(slots=True)
class _Bound:
    """A leg with its memory and its process group, sizes in the group's order."""

    group: dist.ProcessGroup
    send: torch.Tensor
    receive: torch.Tensor
    send_sizes: list[int]
    receive_sizes: list[int]
    onward: list[torch.Tensor]
    arrived: list[torch.Tensor]

    def run(self) -> None:
        if self.onward:
            torch._foreach_copy_(self.onward, self.arrived)
        dist.all_to_all_single(self.receive, self.send, self.receive_sizes, self.send_sizes, group=self.group)


class Transit:
    """Items of one mesh. Laid out from ``begin`` of a buffer; ``end`` is the first byte behind."""

    def __init__(self, items: Sequence[Item], begin: int) -> None:
        self._items = items
        self._mesh = items[0].mesh
        self.end = begin
        self._legs: list[_Leg] = []
        self._first: dict[Blob, int] = {}
        self._last: dict[Blob, int] = {}
        self._lay_out()
        self._picks = Picks(())
        self._packed: list[torch.Tensor] = []
        self._bound: list[_Bound] = []
        self._arrivals: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])

    def bind(self, space: torch.Tensor, targets: Mapping[int, torch.Tensor]) -> None:
        """Take memory: ``space`` is uint8; ``targets`` are the whole tensors of the slots kept here, by ``id``."""
        picks: list[tuple[int, tuple[slice, ...] | None]] = []
        for (number, begins), place in self._first.items():
            item = self._items[number]
            for part, at in item.pieces(begins, place):
                whole = all(s.start == 0 and s.stop == n for s, n in zip(part.local, item.local_shape, strict=True))
                picks.append((item.number, None if whole else part.local))
                self._packed.append(_view(space, at, part.box.extent, item.dtype))
        self._picks = Picks(picks)
        for (number, begins), place in self._last.items():
            item = self._items[number]
            if id(item.slot) not in targets:
                continue  # only passed through
            for part, at in item.pieces(begins, place):
                box = part.box.shifted(item.cat_dim, item.offset) if item.offset else part.box
                self._arrivals[0].append(targets[id(item.slot)][box.slices])
                self._arrivals[1].append(_view(space, at, part.box.extent, item.dtype))
        self._bound = [_bound(leg, space) for leg in self._legs]

    def run(self, taken: Taken) -> None:
        """Bring the items to their targets. Collective over the mesh."""
        if self._packed:
            torch._foreach_copy_(self._packed, self._picks.of(taken))  # and casts, so that less travels
        for leg in self._bound:
            leg.run()
        if self._arrivals[0]:
            torch._foreach_copy_(*self._arrivals)

    # ---------------------------------------------------------------------------------------------------- layout
    def _lay_out(self) -> None:
        """A place for every shard that is ever at this rank; those to be sent lie by receiver."""
        here = self._items[0].here
        if self._mesh is not None:
            for exchange in exchanges([item.journey for item in self._items], tuple(self._mesh.mesh.shape), here):
                order = group_order(self._mesh, exchange.dim, here)
                moves: list[tuple[int, int, int]] = []
                send = (self.end, [self._sent(exchange.send[position], moves) for position in order])
                receive = (self.end, [self._placed(exchange.receive[position]) for position in order])
                self._legs.append(_Leg(self._mesh.get_group(exchange.dim), send, receive, moves))
        for number, item in enumerate(self._items):
            blob = (number, here)
            # What the owner has itself travels nowhere, but is cast like the rest.
            if item.slot.moves and blob not in self._last and item.journey.begins_at(here):
                self._placed([blob])
                self._first[blob] = self._last[blob]

    def _sent(self, blobs: Sequence[Blob], moves: list[tuple[int, int, int]]) -> int:
        """Places for what goes to one position, one behind the other; their bytes together."""
        earlier = [self._last.get(blob) for blob in blobs]
        size = self._placed(blobs)
        for blob, place in zip(blobs, earlier, strict=True):
            if place is None:
                self._first[blob] = self._last[blob]
            else:
                moves.append((place, self._last[blob], self._items[blob[0]].journey.size(blob[1])))
        return size

    def _placed(self, blobs: Sequence[Blob]) -> int:
        begin = self.end
        for blob in blobs:
            self._last[blob] = self.end
            self.end += self._items[blob[0]].journey.size(blob[1])
        return self.end - begin


def _bound(leg: _Leg, space: torch.Tensor) -> _Bound:
    (sent, send_sizes), (received, receive_sizes) = leg.send, leg.receive
    return _Bound(
        leg.group,
        space[sent : sent + sum(send_sizes)],
        space[received : received + sum(receive_sizes)],
        send_sizes,
        receive_sizes,
        [space[to : to + size] for _, to, size in leg.moves],
        [space[begin : begin + size] for begin, _, size in leg.moves],
    )


def _view(space: torch.Tensor, place: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return space.narrow(0, place, math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


@dataclass(frozen=True, slots=True)
class _Shards:
    """See ``Item``; ``sizes`` and ``dims`` as ``Journey``'s."""

    dims: frozenset[int]
    parts: Mapping[Coordinate, tuple[HeldBox, ...]]
    sizes: Mapping[Coordinate, int]


# Layers repeat the same few shapes, and each answer is a product over the whole mesh.
@lru_cache(maxsize=4096)
def _shards(
    shape: tuple[int, ...], cuts: tuple[Cut, ...], mesh: tuple[int, ...], source: Source, stacked: int, itemsize: int
) -> _Shards:
    """What each coordinate of a mesh has of the part of a tensor that ``source`` names."""
    dims = frozenset(cut.mesh_dim for cut in cuts if mesh[cut.mesh_dim] > 1)
    parts: dict[Coordinate, tuple[HeldBox, ...]] = {}
    for at in itertools.product(*(range(extent) if dim in dims else (0,) for dim, extent in enumerate(mesh))):
        held = LocalShare(shape, torch.uint8, cuts, Grid(mesh, ("",) * len(mesh), at, ()) if mesh else None)
        found = (part_of(box, source, stacked) for box in held.boxes)
        parts[at] = tuple(part for part in found if part is not None)
    sizes = {at: sum(padded(part.box.volume * itemsize) for part in own) for at, own in parts.items()}
    return _Shards(dims, parts, sizes)
