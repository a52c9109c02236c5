"""Which boxes of a trainer tensor this rank holds, from plain tensors and DTensors.

Sharding of any kind is the same thing here: per tensor dimension, a list of half-open index intervals that the local
tensor holds one after the other. FSDP2, tensor, context and expert parallelism differ only in the mesh dimensions.
"""

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from weightsync.agents.tables.box import Box
from weightsync.agents.trainer.errors import UnsupportedPlacement

Interval = tuple[int, int]
"""Half-open range of indices along one dimension."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How one mesh dimension cuts one tensor dimension, as torch.chunk does; ``factor`` is ``_StridedShard``'s."""

    mesh_dim: int
    dim: int
    parts: int
    factor: int = 1


@dataclass(frozen=True, slots=True)
class Grid:
    """A device mesh without its process groups: extents, names, this rank's coordinate, all global ranks in order."""

    shape: tuple[int, ...]
    names: tuple[str, ...]
    coordinate: tuple[int, ...]
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return " × ".join(f"{name}={size}" for name, size in zip(self.names, self.shape, strict=True))

    def ranks_where(self, fixed: dict[int, int]) -> tuple[int, ...]:
        """Global ranks whose coordinate on each mesh dimension of ``fixed`` has the given value."""
        coordinates = itertools.product(*(range(size) for size in self.shape))
        return tuple(
            rank
            for rank, coordinate in zip(self.ranks, coordinates, strict=True)
            if all(coordinate[dim] == value for dim, value in fixed.items())
        )


@dataclass(frozen=True, slots=True)
class HeldBox:
    """A box of the whole tensor, and the corner at which it begins in the local tensor."""

    box: Box
    start: tuple[int, ...]

    @property
    def local(self) -> tuple[slice, ...]:
        """The box as an index of the local tensor."""
        return tuple(slice(s, s + e) for s, e in zip(self.start, self.box.extent, strict=True))


@dataclass(frozen=True, slots=True)
class LocalShare:
    """What this rank holds of one trainer tensor of global ``shape``. ``grid`` is None for a plain tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    cuts: tuple[Cut, ...] = ()
    grid: Grid | None = None

    @property
    def boxes(self) -> tuple[HeldBox, ...]:
        """The held boxes, disjoint, in the local tensor's order; empty ones are left out."""
        per_dim = [list(self._intervals(dim)) for dim in range(len(self.shape))]
        # The local tensor holds the intervals of a dimension one behind the other, whatever lies between them globally.
        starts = [list(itertools.accumulate((b - a for a, b in dim), initial=0))[:-1] for dim in per_dim]
        corners = itertools.product(*(zip(dim, at, strict=True) for dim, at in zip(per_dim, starts, strict=True)))
        return tuple(
            HeldBox(Box(tuple(i[0] for i, _ in c), tuple(i[1] - i[0] for i, _ in c)), tuple(at for _, at in c))
            for c in corners
        )

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the local tensor."""
        return tuple(sum(b - a for a, b in self._intervals(dim)) for dim in range(len(self.shape)))

    @property
    def even(self) -> bool:
        """Whether every rank of the mesh holds equally much, without padding."""
        return all(_profile(size, self.cuts_of(dim))[0] for dim, size in enumerate(self.shape))

    @property
    def first_replica(self) -> bool:
        """Whether this rank is the first of those that hold the same boxes."""
        return self.grid is None or all(self.grid.coordinate[dim] == 0 for dim in self.replicated_dims)

    @property
    def replicated_dims(self) -> tuple[int, ...]:
        """Mesh dimensions along which all ranks hold the same."""
        cutting = {cut.mesh_dim for cut in self.cuts}
        return tuple(dim for dim in range(len(self.grid.shape) if self.grid else 0) if dim not in cutting)

    def cuts_of(self, dim: int) -> tuple[Cut, ...]:
        """The cuts of tensor dimension ``dim``, in the order in which they apply."""
        return tuple(cut for cut in self.cuts if cut.dim == dim)

    def boundaries(self, dim: int, mesh_dims: Collection[int] | None = None) -> tuple[int, ...]:
        """Indices within dimension ``dim`` at which any rank's share begins or ends (cut by ``mesh_dims`` only)."""
        cuts = self.cuts_of(dim)
        return _profile(self.shape[dim], tuple(c for c in cuts if mesh_dims is None or c.mesh_dim in mesh_dims))[1]

    def _intervals(self, dim: int) -> list[Interval]:
        cuts = self.cuts_of(dim)
        at = self.grid.coordinate if self.grid else ()
        return _share(self.shape[dim], cuts, [at[cut.mesh_dim] for cut in cuts])


def local_share(name: str, tensor: torch.Tensor) -> LocalShare:
    """What this rank holds of ``tensor``: all of a plain one, the placements' share of a DTensor.

    Raises:
        UnsupportedPlacement: a placement that is neither a shard nor a replica (a pending reduction, for example).
    """
    if not isinstance(tensor, DTensor):
        return LocalShare(tuple(tensor.shape), tensor.dtype)
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise UnsupportedPlacement(name, "this rank is not part of the tensor's device mesh")
    cuts = tuple(
        _cut(name, mesh_dim, placement, mesh.size(mesh_dim))
        for mesh_dim, placement in enumerate(tensor.placements)
        if not placement.is_replicate()
    )
    names = mesh.mesh_dim_names or tuple(f"dim{index}" for index in range(mesh.ndim))
    grid = Grid(tuple(mesh.mesh.shape), tuple(names), tuple(coordinate), tuple(mesh.mesh.flatten().tolist()))
    held = LocalShare(tuple(tensor.shape), tensor.dtype, cuts, grid)
    local: tuple[int, ...] = tuple(tensor.to_local().shape)
    expected = held.local_shape
    # Empty shares have whatever shape torch gave them; only elements count.
    if local != expected and math.prod(local) + math.prod(expected) > 0:
        raise UnsupportedPlacement(name, f"local shape {local}, but {tensor.placements} over {grid} gives {expected}")
    return held


def _cut(name: str, mesh_dim: int, placement: Placement, parts: int) -> Cut:
    if isinstance(placement, _StridedShard):
        return Cut(mesh_dim, placement.dim, parts, int(placement.split_factor))
    if isinstance(placement, Shard):
        return Cut(mesh_dim, placement.dim, parts)
    raise UnsupportedPlacement(name, f"placement {placement} is neither a shard nor a replica")


# Layers repeat the same few shapes, and each answer is a product over the whole mesh.
@lru_cache(maxsize=4096)
def _profile(size: int, cuts: tuple[Cut, ...]) -> tuple[bool, tuple[int, ...]]:
    """Whether all shares of a dimension are equal, and all indices inside it at which one begins or ends."""
    shares = [_share(size, cuts, coordinate) for coordinate in itertools.product(*(range(c.parts) for c in cuts))]
    lengths = {sum(b - a for a, b in share) for share in shares}
    ends = {end for share in shares for interval in share for end in interval}
    return len(lengths) == 1, tuple(sorted(ends - {0, size}))


def _share(size: int, cuts: Sequence[Cut], coordinate: Sequence[int]) -> list[Interval]:
    """Indices of a dimension of ``size`` that remain after ``cuts``, at ``coordinate`` of each."""
    intervals = [(0, size)] if size else []
    for cut, index in zip(cuts, coordinate, strict=True):
        intervals = _taken(intervals, cut, index)
    return intervals


def _taken(intervals: list[Interval], cut: Cut, index: int) -> list[Interval]:
    """The part of ``intervals`` (a concatenation) that position ``index`` of the mesh dimension keeps."""
    # _StridedShard: an axis to the right was sharded first, so this one cuts each of its ``factor`` parts anew.
    pieces = (_chunk(intervals, cut.factor, number) for number in range(cut.factor))
    kept = itertools.chain.from_iterable(_chunk(piece, cut.parts, index) for piece in pieces)
    return list(_merged(kept))


def _chunk(intervals: list[Interval], parts: int, index: int) -> list[Interval]:
    """One piece of ``intervals``, cut as torch.chunk cuts: ceil(n / parts) each, the last ones short or empty."""
    total = sum(b - a for a, b in intervals)
    size = -(-total // parts)
    return _window(intervals, min(total, index * size), min(total, (index + 1) * size))


def _window(intervals: list[Interval], start: int, stop: int) -> list[Interval]:
    """Positions ``start`` to ``stop`` of the concatenation of ``intervals``."""
    window, position = [], 0
    for a, b in intervals:
        low, high = max(start, position), min(stop, position + b - a)
        if low < high:
            window.append((a + low - position, a + high - position))
        position += b - a
    return window


def _merged(intervals: Iterator[Interval]) -> Iterator[Interval]:
    """``intervals`` with neighbours that touch joined."""
    current: Interval | None = None
    for a, b in intervals:
        if current is not None and current[1] == a:
            current = (current[0], b)
            continue
        if current is not None:
            yield current
        current = (a, b)
    if current is not None:
        yield current
