"""What a stream declares of one tensor before it passes: name, dtype, shape, and which ranks hold which piece."""

import math
from dataclasses import dataclass
from typing import Final

import torch
from weightsync.agents.trainer.errors import TrainerError
from weightsync.agents.trainer.slots.boxes import Cut, Grid, LocalShare

TABLES: Final = (torch.int64, torch.bool)
"""Of integers that are no packed weights, which some engines hold."""


class StreamError(TrainerError):
    """A stream or its metadata is not what a version needs."""


@dataclass(frozen=True, slots=True)
class StreamedTensor:
    """One tensor of a stream, declared alike on every rank. The vocabulary is that of vLLM's ``ParamMeta`` (0.33).

    Args:
        name: in the checkpoint that engines load.
        dtype: of what the stream yields.
        shape: of the whole tensor.
        owners: trainer ranks that yield a piece, row-major over ``mesh_shape``; None: every rank yields the whole.
        mesh_shape: of the owners; None: one axis.
        placements: for each axis of the mesh the dimension that it splits as ``torch.chunk`` does, the outer axis first
            where two split the same one; None in a place: that axis holds copies. None as a whole: copies everywhere.

    Raises:
        StreamError: fields that contradict each other.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    owners: tuple[int, ...] | None = None
    mesh_shape: tuple[int, ...] | None = None
    placements: tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        wrong = self._contradiction()
        if wrong:
            raise StreamError(f"metadata of {self.name!r}: {wrong}")

    def share(self, rank: int) -> LocalShare | None:
        """What trainer rank ``rank`` yields of it; None where it yields nothing."""
        if self.owners is None:
            return LocalShare(self.shape, self.dtype)
        if rank not in self.owners:
            return None
        mesh = self.mesh
        cuts = tuple(
            Cut(axis, dim, parts)
            for axis, (dim, parts) in enumerate(zip(self.placements or (), mesh, strict=False))
            if dim is not None
        )
        names = tuple(f"axis{axis}" for axis in range(len(mesh)))
        return LocalShare(self.shape, self.dtype, cuts, Grid(mesh, names, self._coordinate(rank), self.owners))

    @property
    def mesh(self) -> tuple[int, ...]:
        """Shape of the mesh over the owners; empty without owners."""
        return self.mesh_shape or (() if self.owners is None else (len(self.owners),))

    def _coordinate(self, rank: int) -> tuple[int, ...]:
        assert self.owners is not None
        position, coordinate = self.owners.index(rank), []
        for extent in reversed(self.mesh):
            position, at = divmod(position, extent)
            coordinate.append(at)
        return tuple(reversed(coordinate))

    def _contradiction(self) -> str:
        if not self.dtype.is_floating_point and self.dtype not in TABLES:
            return f"dtype {self.dtype} is no weight of floating point; dequantise it first, or leave it out"
        if 0 in self.shape:
            return f"shape {self.shape} has no elements: a placeholder (ZeRO-3); declare the shape of the whole tensor"
        if self.owners is None:
            return "a mesh or placements without owners" if self.mesh_shape or self.placements else ""
        if not self.owners or len(set(self.owners)) != len(self.owners) or min(self.owners) < 0:
            return f"owners {self.owners} are not distinct ranks"
        if math.prod(self.mesh) != len(self.owners):
            return f"mesh shape {self.mesh} does not cover its {len(self.owners)} owners"
        if self.placements is not None and len(self.placements) != len(self.mesh):
            return f"{len(self.placements)} placements for a mesh of {len(self.mesh)} axes"
        off = [dim for dim in self.placements or () if dim is not None and not 0 <= dim < len(self.shape)]
        return f"dimension {off[0]} of a tensor of shape {self.shape} is split" if off else ""
