"""Landings in live memory as the rows of a protocol Layout: few, merged, one region per allocation.

``fill`` writes whole logical tensors by such rows: what the filesystem transport does in place of remote writes.
"""

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
_BY_NAME: Final = {name: dtype for dtype, name in TARGET_DTYPES.items()}


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
class LayoutRows:
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


def build_rows(targets: Sequence[Target]) -> LayoutRows:
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
        # Landings count from the start of the loader's storage; rows count from the start of the region, which is the
        # storage of the live tensor: another one if processing has copied or moved the parameter.
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
    return LayoutRows(tuple(described), tuple(loaded), tuple(_region(t) for t in memory), tuple(memory), merged)


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
    # One dimension at a time: rows that meet along it are neighbours once sorted by everything else.
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
    # A box of extent 1 has no stride yet; joining gives it one. Others must agree with the gap.
    known = {r.strides[dim] for r in (first, second) if r.extent[dim] > 1}
    if gap <= 0 or rest or known - {stride}:
        return None
    extent = first.extent[dim] + second.extent[dim]
    return replace(first, extent=_with(first.extent, dim, extent), strides=_with(first.strides, dim, stride))


def _without(values: Ints, dim: int) -> Ints:
    return values[:dim] + values[dim + 1 :]


def _with(values: Ints, dim: int, value: int) -> Ints:
    return (*values[:dim], value, *values[dim + 1 :])


# ------------------------------------------------------------------------------------------------ filling by rows
def fill(layout: LayoutRows, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy every logical tensor's boxes to their places; tensors that no row wants are passed over.

    ``weights`` are full tensors in the wire dtype, or in the checkpoint's where the loader would have cast it.

    Raises:
        RecordError: a shape or dtype differs from the layout's, or tensors that the layout needs did not come. What
            came before that is written.
    """
    by_tensor: dict[int, list[Row]] = defaultdict(list)
    for row in layout.rows:
        by_tensor[row.tensor].append(row)
    wanted = {tensor.name: index for index, tensor in enumerate(layout.tensors)}
    with torch.no_grad():
        for name, full in weights:
            index = wanted.pop(name, None)
            if index is not None:
                _check(layout, index, full)
                for row in by_tensor[index]:
                    place(layout, row).copy_(
                        full[tuple(slice(c, c + n) for c, n in zip(row.corner, row.extent, strict=True))]
                    )
    if wanted:
        names = sorted(wanted)
        raise RecordError(f"{len(names)} tensors did not come: {', '.join(names[:8])}")


def place(layout: LayoutRows, row: Row) -> torch.Tensor:
    """The memory of ``row`` as a tensor of its box's shape and the wire dtype."""
    dtype = _BY_NAME[layout.tensors[row.tensor].dtype]
    view = torch.empty(0, dtype=dtype, device=layout.memory[row.region].device)
    strides = tuple(stride // dtype.itemsize for stride in row.strides)
    storage = layout.memory[row.region].untyped_storage()
    return view.set_(storage, row.offset // dtype.itemsize, row.extent, strides)


def _check(layout: LayoutRows, index: int, full: torch.Tensor) -> None:
    tensor = layout.tensors[index]
    if tuple(full.shape) != tensor.shape:
        raise RecordError(f"{tensor.name} has shape {tuple(full.shape)}, the engine expects {tensor.shape}")
    if full.dtype not in (_BY_NAME[tensor.dtype], layout.loaded_dtypes[index]):
        raise RecordError(f"{tensor.name} is {full.dtype}, the engine expects {tensor.dtype}")
