"""From the plan's copies and a layout's rows to byte runs for the wire and strided tables for the kernels.

Everything here is NumPy over whole tables: no loop over rows, because a rank of a large model has a hundred thousand.
A table says *where*; nothing here touches weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from weightsync.agents.errors import AgentError
from weightsync.agents.tables.boxes import Boxes, Column, loops_of, solid, unroll
from weightsync.kernels.columns import (
    CODES,
    COLUMNS,
    COUNTS,
    DST_OFFSET,
    DST_REGION,
    DST_STRIDE,
    LOOP_COLUMNS,
    LOOPS,
    RUN_BYTES,
    SRC_OFFSET,
    SRC_REGION,
    SRC_STRIDE,
    UNSEEN,
)
from weightsync.orchestrator.protocol.layout import (
    COPY_BOX,
    COPY_COLUMNS,
    COPY_PEER,
    COPY_REMOTE,
    COPY_ROW,
    COPY_STAGED,
    ITEMSIZE,
    ROW_BOX,
    ROW_COLUMNS,
    ROW_OFFSET,
    ROW_REGION,
    ROW_TENSOR,
    Layout,
    Matrix,
    dense,
    pad,
)
from weightsync.orchestrator.protocol.limits import MAX_RANK

RUN_PEER, RUN_LOCAL_REGION, RUN_LOCAL_OFFSET, RUN_REMOTE_REGION, RUN_REMOTE_OFFSET, RUN_LENGTH = range(6)
RUN_COLUMNS: Final = 6


class RunTableError(AgentError):
    """Copies or rows that do not fit the layout they are read with. The planner's or the caller's fault; no retry."""

    fault = "daemon"


def runs(copies: Matrix, layout: Layout) -> Matrix:
    """The contiguous byte runs of those of a writer's copies that it does not pack, as far as both memories allow.

    Args:
        copies: int64 ``[n, COPY_COLUMNS]``, rows of this agent's own ``layout``.
        layout: this agent's.

    Returns:
        int64 ``[m, RUN_COLUMNS]``: peer, local region, local offset, remote region, remote offset, length (bytes),
        ordered by peer, local region and local offset. No two runs of one peer continue each other in both memories.

    Raises:
        RunTableError: a copy outside its row.
    """
    copies = _checked(copies, COPY_COLUMNS)
    direct = copies[copies[:, COPY_STAGED] < 0]
    return _merged(_expand(_wire_boxes(direct, layout), direct[:, COPY_PEER]))


def copied_bytes(copies: Matrix, layout: Layout) -> int:
    """Bytes that ``copies`` are worth, packed or not; arguments and errors as for ``runs``."""
    return int(copy_sizes(copies, layout).sum())


def copy_sizes(copies: Matrix, layout: Layout) -> Column:
    """Bytes of each of ``copies``: int64 ``[n]``; arguments and errors as for ``runs``."""
    copies = _checked(copies, COPY_COLUMNS)
    itemsize = _TensorFacts.of(layout).itemsize[_rows_of(copies, layout)[:, ROW_TENSOR]]
    sizes: Column = copies[:, COPY_BOX + 1 : COPY_REMOTE : 2].prod(axis=1) * itemsize
    return sizes


def pack_table(copies: Matrix, layout: Layout) -> Matrix:
    """Kernel table that gathers a writer's packed copies from its rows.

    Args:
        copies: int64 ``[n, COPY_COLUMNS]``; those that are not packed are left out.
        layout: this agent's.

    Returns:
        int64 ``[m, COLUMNS]`` (:mod:`weightsync.kernels.columns`): from the rows' regions to places in the edge's
        cargo, whose region is ``layout.staging``.

    Raises:
        RunTableError: as for ``runs``, or packed copies in a layout without a staging region.
    """
    staged = _staged_only(copies, layout)
    return _table(_staging_boxes(staged, layout))


def scatter_table(copies: Matrix, layout: Layout) -> Matrix:
    """Kernel table that spreads what landed over a reader's own rows.

    Args:
        copies: int64 ``[n, COPY_COLUMNS]``, with their places in the edge's cargo, or in the landing.
        layout: this agent's.

    Returns:
        int64 ``[m, COLUMNS]`` as for ``pack_table``, the other way round.

    Raises:
        RunTableError: as for ``pack_table``.
    """
    boxes = _staging_boxes(_staged_only(copies, layout), layout)
    return _table(
        Boxes(
            boxes.target_region,
            boxes.target_offset,
            boxes.target_stride,
            boxes.source_region,
            boxes.source_offset,
            boxes.source_stride,
            boxes.extent,
            boxes.itemsize,
        )
    )


def digest_table(copies_or_rows: Matrix, layout: Layout, *, landed: bool = False) -> Matrix:
    """Kernel table of the bytes to digest, with logical destinations.

    Args:
        copies_or_rows: int64 ``[n, COPY_COLUMNS]`` or ``[n, ROW_COLUMNS]``, told apart by their width.
        layout: this agent's; the bytes are read where its rows lie, packed or not.
        landed: they are read where copies have landed, by their places in the landing, and not yet in their rows.

    Returns:
        int64 ``[m, COLUMNS]`` as for ``pack_table``, where the destination region is the tensor's 64-bit key and the
        destination offsets are logical byte offsets in the full tensor, row-major.

    Raises:
        RunTableError: a table of another width, or a copy outside its row.
    """
    table = np.ascontiguousarray(copies_or_rows, dtype=np.int64)
    if table.ndim == 2 and table.shape[1] == ROW_COLUMNS:
        corner, extent, offset = table[:, ROW_BOX::3], table[:, ROW_BOX + 1 :: 3], table[:, ROW_OFFSET]
        rows = table
    else:
        table = _checked(table, COPY_COLUMNS)
        rows = _rows_of(table, layout)
        corner, extent = table[:, COPY_BOX:COPY_REMOTE:2], table[:, COPY_BOX + 1 : COPY_REMOTE : 2]
        offset = _corner_offset(rows, corner)
    facts = _TensorFacts.of(layout)
    tensor = rows[:, ROW_TENSOR]
    stride = facts.stride[tensor]
    region, step = rows[:, ROW_REGION], rows[:, ROW_BOX + 2 :: 3]
    if landed:
        region = np.full(len(table), layout.staging, np.int64)
        offset, step = table[:, COPY_STAGED], dense(extent, facts.itemsize[tensor])
    boxes = Boxes(
        source_region=region,
        source_offset=offset,
        source_stride=step,
        target_region=_keys(layout)[tensor],
        target_offset=(corner * stride).sum(axis=1),
        target_stride=stride,
        extent=extent,
        itemsize=facts.itemsize[tensor],
    )
    return _table(boxes)


def element_codes(table: Matrix, layout: Layout) -> Column:
    """What the elements of each row of a ``digest_table`` are, by ``columns.CODES``: int64 ``[m]``."""
    keys = _keys(layout)
    codes = np.fromiter((CODES.get(t.dtype, UNSEEN) for t in layout.tensors), np.int64, len(layout.tensors))
    order = np.argsort(keys)
    found: Column = codes[order[np.searchsorted(keys[order], table[:, DST_REGION])]]
    return found


def table_bytes(table: Matrix) -> int:
    """Bytes that a kernel table covers."""
    return int((table[:, RUN_BYTES] * table[:, list(COUNTS)].prod(axis=1)).sum())


def tensor_names(layout: Layout) -> Callable[[int, int], str]:
    """A function from (region, byte offset) to the name of the logical tensor there, for error messages.

    A place in the staging region belongs to many tensors and one between rows to none; both are named as such.
    """
    rows = layout.matrix()
    order = np.lexsort((rows[:, ROW_OFFSET], rows[:, ROW_REGION]))
    regions, offsets = rows[order, ROW_REGION], rows[order, ROW_OFFSET]

    def name(region: int, offset: int) -> str:
        if region == layout.staging:
            return "packed tensors"
        # The last row of the region that begins at the offset or before it.
        low, high = np.searchsorted(regions, [region, region + 1])
        place = low + int(np.searchsorted(offsets[low:high], offset, side="right")) - 1
        if place < low:
            return f"bytes {offset} of region {region}"
        return layout.tensors[int(rows[order[place], ROW_TENSOR])].name

    return name


# ------------------------------------------------------------------------------------------------- boxes of copies
@dataclass(frozen=True, slots=True)
class _TensorFacts:
    """Per logical tensor: bytes per element, and row-major byte strides of the full tensor, padded to MAX_RANK."""

    itemsize: Column
    stride: Matrix

    @classmethod
    def of(cls, layout: Layout) -> "_TensorFacts":
        count = len(layout.tensors)
        itemsize = np.fromiter((ITEMSIZE[t.dtype] for t in layout.tensors), np.int64, count)
        shape = np.array([pad(t.shape, 1) for t in layout.tensors], dtype=np.int64).reshape(count, MAX_RANK)
        stride = np.empty_like(shape)
        stride[:, -1] = itemsize
        for dim in range(MAX_RANK - 2, -1, -1):
            stride[:, dim] = stride[:, dim + 1] * shape[:, dim + 1]
        return cls(itemsize, stride)


def _keys(layout: Layout) -> Column:
    from weightsync.kernels.digest import tensor_key  # here, because it brings torch and only digests need it

    # Columns are signed; what counts is the bit pattern.
    unsigned = np.fromiter(
        (tensor_key(t.name) & 0xFFFF_FFFF_FFFF_FFFF for t in layout.tensors), np.uint64, len(layout.tensors)
    )
    return unsigned.view(np.int64)


def _checked(table: Matrix, columns: int) -> Matrix:
    table = np.ascontiguousarray(table, dtype=np.int64)
    if table.ndim != 2 or table.shape[1] != columns:
        raise RunTableError(f"a table of shape {table.shape}; expected [n, {columns}]")
    return table


def _rows_of(copies: Matrix, layout: Layout) -> Matrix:
    """The layout row of each copy, after proving that the copy lies inside it."""
    rows = layout.matrix()
    index = copies[:, COPY_ROW]
    if len(index) and (index.min() < 0 or index.max() >= len(rows)):
        raise RunTableError(f"copies name rows {index.min()} … {index.max()} of a layout of {len(rows)} rows")
    taken = rows[index]
    corner, extent = copies[:, COPY_BOX:COPY_REMOTE:2], copies[:, COPY_BOX + 1 : COPY_REMOTE : 2]
    row_corner, row_extent = taken[:, ROW_BOX::3], taken[:, ROW_BOX + 1 :: 3]
    outside = (corner < row_corner) | (extent < 0) | (corner + extent > row_corner + row_extent)
    if outside.any():
        worst = int(np.flatnonzero(outside.any(axis=1))[0])
        name = layout.tensors[int(taken[worst, ROW_TENSOR])].name
        raise RunTableError(f"copy {worst} of {name} asks for elements that row {int(index[worst])} does not hold")
    return taken


def _corner_offset(rows: Matrix, corner: Matrix) -> Column:
    """Byte offset of each copy's corner in its row's region."""
    offset: Column = rows[:, ROW_OFFSET] + ((corner - rows[:, ROW_BOX::3]) * rows[:, ROW_BOX + 2 :: 3]).sum(axis=1)
    return offset


def _wire_boxes(copies: Matrix, layout: Layout) -> Boxes:
    rows = _rows_of(copies, layout)
    return Boxes(
        source_region=rows[:, ROW_REGION],
        source_offset=_corner_offset(rows, copies[:, COPY_BOX:COPY_REMOTE:2]),
        source_stride=rows[:, ROW_BOX + 2 :: 3],
        target_region=copies[:, COPY_REMOTE],
        target_offset=copies[:, COPY_REMOTE + 1],
        target_stride=copies[:, COPY_REMOTE + 2 :],
        extent=copies[:, COPY_BOX + 1 : COPY_REMOTE : 2],
        itemsize=_TensorFacts.of(layout).itemsize[rows[:, ROW_TENSOR]],
    )


def _staged_only(copies: Matrix, layout: Layout) -> Matrix:
    copies = _checked(copies, COPY_COLUMNS)
    staged = copies[copies[:, COPY_STAGED] >= 0]
    if len(staged) and not 0 <= layout.staging < len(layout.regions):
        raise RunTableError(f"{len(staged)} staged copies, but the layout has no staging region")
    return staged


def _staging_boxes(staged: Matrix, layout: Layout) -> Boxes:
    """From the rows to places in the edge's cargo, where each copy is one block, packed row by row."""
    boxes = _wire_boxes(staged, layout)
    return Boxes(
        boxes.source_region,
        boxes.source_offset,
        boxes.source_stride,
        np.full(len(staged), layout.staging, dtype=np.int64),
        staged[:, COPY_STAGED],
        dense(boxes.extent, boxes.itemsize),
        boxes.extent,
        boxes.itemsize,
    )


# ------------------------------------------------------------------------------------------------ loops and runs
def _expand(boxes: Boxes, peer: Column) -> Matrix:
    """One row ``[RUN_COLUMNS]`` per contiguous run of the boxes."""
    kept = np.flatnonzero((boxes.extent > 0).all(axis=1))
    boxes, peer = boxes.take(kept), peer[kept]
    loops = loops_of(boxes)
    owner, steps = unroll(loops.count)
    table = np.empty((len(owner), RUN_COLUMNS), dtype=np.int64)
    table[:, RUN_PEER] = peer[owner]
    table[:, RUN_LOCAL_REGION] = boxes.source_region[owner]
    table[:, RUN_LOCAL_OFFSET] = boxes.source_offset[owner] + (steps * loops.source_stride[owner]).sum(axis=1)
    table[:, RUN_REMOTE_REGION] = boxes.target_region[owner]
    table[:, RUN_REMOTE_OFFSET] = boxes.target_offset[owner] + (steps * loops.target_stride[owner]).sum(axis=1)
    table[:, RUN_LENGTH] = loops.run[owner]
    return table


def _merged(table: Matrix) -> Matrix:
    """Join runs that continue each other in both memories.

    Sorting by the difference of the two offsets before the offset itself puts every pair that can be joined side by
    side, also where one source range goes to several places.
    """
    table = table[table[:, RUN_LENGTH] > 0]
    if not len(table):
        return table
    local, remote = table[:, RUN_LOCAL_OFFSET], table[:, RUN_REMOTE_OFFSET]
    regions = table[:, RUN_REMOTE_REGION], table[:, RUN_LOCAL_REGION], table[:, RUN_PEER]
    table = table[np.lexsort((local, remote - local, *regions))]
    ends = table[:, [RUN_LOCAL_OFFSET, RUN_REMOTE_OFFSET]] + table[:, [RUN_LENGTH]]
    same = [RUN_PEER, RUN_LOCAL_REGION, RUN_REMOTE_REGION]
    joined = (table[1:, same] == table[:-1, same]).all(axis=1)
    joined &= (table[1:, [RUN_LOCAL_OFFSET, RUN_REMOTE_OFFSET]] == ends[:-1]).all(axis=1)
    starts = np.concatenate(([0], np.flatnonzero(~joined) + 1))
    merged = table[starts]
    merged[:, RUN_LENGTH] = np.add.reduceat(table[:, RUN_LENGTH], starts)
    ordered: Matrix = merged[
        np.lexsort(
            (
                merged[:, RUN_REMOTE_OFFSET],
                merged[:, RUN_REMOTE_REGION],
                merged[:, RUN_LOCAL_OFFSET],
                merged[:, RUN_LOCAL_REGION],
                merged[:, RUN_PEER],
            )
        )
    ]
    return ordered


def _table(boxes: Boxes) -> Matrix:
    """Kernel table of the boxes; those with more loops than a row has are unrolled along their outermost ones."""
    boxes = solid(boxes)
    loops = loops_of(boxes)
    # Loops that do not loop come first, so this multiplies only rows with more loops than the table has columns for.
    owner, steps = unroll(loops.count[:, : MAX_RANK - LOOPS])
    outer = slice(0, MAX_RANK - LOOPS)
    inner = slice(MAX_RANK - LOOPS, MAX_RANK)
    table = np.empty((len(owner), COLUMNS), dtype=np.int64)
    table[:, RUN_BYTES] = loops.run[owner]
    table[:, SRC_REGION] = boxes.source_region[owner]
    table[:, SRC_OFFSET] = boxes.source_offset[owner] + (steps * loops.source_stride[owner, outer]).sum(axis=1)
    table[:, DST_REGION] = boxes.target_region[owner]
    table[:, DST_OFFSET] = boxes.target_offset[owner] + (steps * loops.target_stride[owner, outer]).sum(axis=1)
    first = COUNTS[0]
    table[:, first::LOOP_COLUMNS] = loops.count[owner, inner]
    table[:, first + SRC_STRIDE :: LOOP_COLUMNS] = loops.source_stride[owner, inner]
    table[:, first + DST_STRIDE :: LOOP_COLUMNS] = loops.target_stride[owner, inner]
    return table
