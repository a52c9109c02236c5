"""Whole tensors on every rank from their shards: many in one collective for each dimension of a mesh that cuts them."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from weightsync.agents.trainer.slots.boxes import Grid, HeldBox, LocalShare, local_share

WHOLE_BYTES: Final = 128 * 1024 * 1024
"""Of whole tensors that are gathered at a time, unless one is larger; enough for links to be busy."""

Dims = tuple[int, ...]
"""Dimensions of a mesh, in order."""


@dataclass(frozen=True, slots=True)
class _Sharded:
    name: str
    local: torch.Tensor
    share: LocalShare

    @property
    def dims(self) -> Dims:
        """That cut it into more than one part."""
        grid = self.share.grid
        return tuple(sorted({cut.mesh_dim for cut in self.share.cuts if grid and grid.shape[cut.mesh_dim] > 1}))

    def at(self, coordinate: Sequence[int]) -> LocalShare:
        """What the rank at ``coordinate`` has."""
        grid = self.share.grid
        assert grid is not None, "a sharded tensor has a mesh"
        here = Grid(grid.shape, grid.names, tuple(coordinate), grid.ranks)
        return LocalShare(self.share.shape, self.share.dtype, self.share.cuts, here)


@torch.no_grad()
def whole_tensors(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All of each tensor in ``dtype``, on this rank. Collective over the meshes of those that are sharded.

    Args:
        tensors: by name, in one order on all ranks of a mesh.
        dtype: what they are cast to before they travel.

    Raises:
        UnsupportedPlacement: a placement that is neither a shard nor a replica.
    """
    whole: dict[str, torch.Tensor] = {}
    families: dict[tuple[DeviceMesh, Dims], list[_Sharded]] = {}
    for name, tensor in tensors.items():
        share = local_share(name, tensor)
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        sharded = _Sharded(name, local.detach(), share)
        if isinstance(tensor, DTensor) and sharded.dims:
            families.setdefault((tensor.device_mesh, sharded.dims), []).append(sharded)
        else:
            whole[name] = local.detach().to(dtype)
    # By meshes, so that ranks that share one enter its collectives in one order.
    for (mesh, dims), family in families.items():
        for part in _parts_of(family, dtype):
            whole |= _gathered(part, mesh, dims, dtype)
    return {name: whole[name] for name in tensors}


def group_order(mesh: DeviceMesh, dim: int, here: Sequence[int]) -> list[int]:
    """Positions along ``dim`` in the order of its process group: a mesh may list its ranks in another one."""
    line = mesh.mesh[tuple(slice(None) if e == dim else index for e, index in enumerate(here))].tolist()
    group = mesh.get_group(dim)
    return sorted(range(len(line)), key=lambda position: dist.get_group_rank(group, line[position]))


def _parts_of(family: Sequence[_Sharded], dtype: torch.dtype) -> Iterator[list[_Sharded]]:
    part: list[_Sharded] = []
    size = 0
    for each in family:
        nbytes = torch.Size(each.share.shape).numel() * dtype.itemsize
        if part and size + nbytes > WHOLE_BYTES:
            yield part
            part, size = [], 0
        part.append(each)
        size += nbytes
    yield part


def _gathered(part: Sequence[_Sharded], mesh: DeviceMesh, dims: Dims, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Whole tensors that the same dimensions of one mesh cut."""
    here = mesh.get_coordinate()
    assert here is not None, "local_share would have refused it"
    coordinates = list(_coordinates(mesh, dims, here))
    # As many elements everywhere as the largest share has, so that one collective of equal parts carries all.
    room = [max(sum(held.box.volume for held in each.at(at).boxes) for at in coordinates) for each in part]
    starts = list(itertools.accumulate(room, initial=0))
    everything = torch.zeros(starts[-1], dtype=dtype, device=part[0].local.device)
    for each, start in zip(part, starts[:-1], strict=True):
        for held, place in _places(each.share, start):
            everything[place].view(held.box.extent).copy_(each.local[held.local])
    for dim in reversed(dims):
        arrived = everything.new_empty((mesh.size(dim), *everything.shape))
        places = [arrived[position] for position in group_order(mesh, dim, here)]
        dist.all_gather(places, everything, group=mesh.get_group(dim))
        everything = arrived
    whole = {each.name: everything.new_empty(each.share.shape) for each in part}
    for at in coordinates:
        values = everything[tuple(at[dim] for dim in dims)]
        for each, start in zip(part, starts[:-1], strict=True):
            for held, place in _places(each.at(at), start):
                whole[each.name][held.box.slices] = values[place].view(held.box.extent)
    return whole


def _places(share: LocalShare, start: int) -> Iterator[tuple[HeldBox, slice]]:
    """The boxes of a share, and where each lies when they begin at ``start``, one behind the other."""
    for held in share.boxes:
        yield held, slice(start, start + held.box.volume)
        start += held.box.volume


def _coordinates(mesh: DeviceMesh, dims: Collection[int], here: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Of the ranks that together have all, as this one sees them."""
    return itertools.product(*(range(mesh.size(d)) if d in dims else (at,) for d, at in enumerate(here)))
