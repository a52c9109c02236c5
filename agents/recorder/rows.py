"""Landings in live memory as the rows of a protocol Layout: few, merged, one region per allocation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from weightsync.agents.recorder.boxes import Ints
from weightsync.agents.recorder.trace import Landing, RecordError
from weightsync.orchestrator.protocol import layout as protocol
from weightsync.orchestrator.protocol.limits import MAX_RANK

TARGET_DTYPES: Final = {getattr(torch, name): name for name in protocol.ITEMSIZE}
"""Every dtype that may travel, with its name in the protocol."""


@dataclass(frozen=True, slots=True)
class Target:
    """Memory that receives writes: ``tensor`` (live or shadow) holds what landed at ``start`` bytes of a storage.

    ``owner`` and ``attribute`` say which parameter it is (or, for a shadow, stands for).
    """

    tensor: torch.Tensor
    start: int
    landings: tuple[Landing, ...]
    owner: object = None
    attribute: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A box of a logical tensor and its bytes in a region; strides in bytes, 0 where the extent is 1."""

    tensor: int
    region: int
    offset: int
    corner: Ints
    extent: Ints
    strides: Ints


@dataclass(frozen=True, slots=True)
class Rows:
    """Logical tensors, regions with a byte view of each, and rows; the parts of a Layout."""

    tensors: tuple[protocol.Tensor, ...]
    loaded_dtypes: tuple[torch.dtype, ...]
    regions: tuple[protocol.Region, ...]
    memory: tuple[torch.Tensor, ...]
    rows: tuple[Row, ...]

    def matrix(self) -> protocol.Matrix:
        """int64 ``[n, ROW_COLUMNS]``."""
        table = [protocol.row(r.tensor, r.region, r.offset, r.corner, r.extent, r.strides) for r in self.rows]
        return np.array(table, dtype="<i8").reshape(len(table), protocol.ROW_COLUMNS)


def build_rows(targets: Sequence[Target]) -> Rows:
    """Rows of all landings, in the order of the targets.

    Raises:
        RecordError: a tensor has more dimensions or another dtype than can travel, or two wire dtypes.
    """
    tensors: dict[str, int] = {}
    described: list[protocol.Tensor] = []
    loaded: list[torch.dtype] = []
    regions: dict[int, int] = {}
    memory: list[torch.Tensor] = []
    rows: dict[tuple[int, int], list[Row]] = defaultdict(list)
    for target in targets:
        region = regions.setdefault(target.tensor.untyped_storage().data_ptr(), len(memory))
        if region == len(memory):
            memory.append(bytes_of_storage(target.tensor))
        shift = target.tensor.storage_offset() * target.tensor.element_size() - target.start
        for landing in target.landings:
            index = tensors.setdefault(landing.source.name, len(described))
            about = _described(landing)
            if index == len(described):
                described.append(about)
                loaded.append(landing.source.dtype)
            elif described[index] != about:
                raise RecordError(f"{about.name} is loaded as {described[index].dtype} and as {about.dtype}")
            place = landing.place
            row = Row(index, region, int(place.offset + shift), landing.corner, place.sizes, place.strides)
            rows[index, region].append(row)
    merged = tuple(row for group in rows.values() for row in merge(group))
    return Rows(tuple(described), tuple(loaded), tuple(_region(t) for t in memory), tuple(memory), merged)


def bytes_of_storage(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of the storage under ``tensor``: uint8, one-dimensional, the same memory."""
    with torch.no_grad():
        storage = tensor.detach().untyped_storage()
        view = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        return view.set_(storage, 0, (storage.nbytes(),), (1,))


def _region(memory: torch.Tensor) -> protocol.Region:
    on_device = memory.device.type == "cuda"
    device = (memory.device.index or 0) if on_device else 0
    return protocol.Region(memory.data_ptr(), memory.numel(), "VRAM" if on_device else "DRAM", device)


def _described(landing: Landing) -> protocol.Tensor:
    name = TARGET_DTYPES.get(landing.dtype)
    if name is None:
        raise RecordError(f"{landing.source.name}: {landing.dtype} cannot travel")
    if len(landing.source.shape) > MAX_RANK:
        raise RecordError(
            f"{landing.source.name}: {len(landing.source.shape)} dimensions, at most {MAX_RANK} can travel"
        )
    return protocol.Tensor(landing.source.name, name, landing.source.shape)


def merge(rows: Iterable[Row]) -> list[Row]:
    """Rows of one tensor in one region with neighbouring boxes joined where memory continues too."""
    rows = list(rows)
    if len(rows) < 2:
        return rows
    for dim in range(len(rows[0].corner)):
        joined: list[Row] = []
        for row in sorted(rows, key=lambda r: (_without(r.corner, dim), r.corner[dim], r.offset)):
            both = _joined(joined[-1], row, dim) if joined else None
            if both is None:
                joined.append(row)
            else:
                joined[-1] = both
        rows = joined
    return rows


def _joined(first: Row, second: Row, dim: int) -> Row | None:
    if (
        _without(first.corner, dim) != _without(second.corner, dim)
        or _without(first.extent, dim) != _without(second.extent, dim)
        or _without(first.strides, dim) != _without(second.strides, dim)
        or first.corner[dim] + first.extent[dim] != second.corner[dim]
    ):
        return None
    gap = second.offset - first.offset
    stride, rest = divmod(gap, first.extent[dim])
    known = {r.strides[dim] for r in (first, second) if r.extent[dim] > 1}
    if gap <= 0 or rest or known - {stride}:
        return None
    extent = first.extent[dim] + second.extent[dim]
    return replace(first, extent=_with(first.extent, dim, extent), strides=_with(first.strides, dim, stride))


def _without(values: Ints, dim: int) -> Ints:
    return values[:dim] + values[dim + 1 :]


def _with(values: Ints, dim: int, value: int) -> Ints:
    return (*values[:dim], value, *values[dim + 1 :])
