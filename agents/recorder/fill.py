"""Whole logical tensors into an engine's memory by the recorded rows: what the filesystem transport does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from weightsync.agents.recorder.rows import TARGET_DTYPES, Row, Rows
from weightsync.agents.recorder.trace import RecordError

_BY_NAME = {name: dtype for dtype, name in TARGET_DTYPES.items()}


def fill(rows: Rows, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy every logical tensor's boxes to their places; tensors that no row wants are passed over.

    ``weights`` are full tensors in the wire dtype, or in the checkpoint's where the loader would have cast it.

    Raises:
        RecordError: a shape or dtype differs from the layout's, or tensors that the layout needs did not come. What
            came before that is written.
    """
    by_tensor: dict[int, list[Row]] = defaultdict(list)
    for row in rows.rows:
        by_tensor[row.tensor].append(row)
    wanted = {tensor.name: index for index, tensor in enumerate(rows.tensors)}
    with torch.no_grad():
        for name, full in weights:
            index = wanted.pop(name, None)
            if index is not None:
                _check(rows, index, full)
                for row in by_tensor[index]:
                    place(rows, row).copy_(
                        full[tuple(slice(c, c + n) for c, n in zip(row.corner, row.extent, strict=True))]
                    )
    if wanted:
        names = sorted(wanted)
        raise RecordError(f"{len(names)} tensors did not come: {', '.join(names[:8])}")


def place(rows: Rows, row: Row) -> torch.Tensor:
    """The memory of ``row`` as a tensor of its box's shape and the wire dtype."""
    dtype = _BY_NAME[rows.tensors[row.tensor].dtype]
    view = torch.empty(0, dtype=dtype, device=rows.memory[row.region].device)
    strides = tuple(stride // dtype.itemsize for stride in row.strides)
    storage = rows.memory[row.region].untyped_storage()
    return view.set_(storage, row.offset // dtype.itemsize, row.extent, strides)


def _check(rows: Rows, index: int, full: torch.Tensor) -> None:
    tensor = rows.tensors[index]
    if tuple(full.shape) != tensor.shape:
        raise RecordError(f"{tensor.name} has shape {tuple(full.shape)}, the engine expects {tensor.shape}")
    if full.dtype not in (_BY_NAME[tensor.dtype], rows.loaded_dtypes[index]):
        raise RecordError(f"{tensor.name} is {full.dtype}, the engine expects {tensor.dtype}")
