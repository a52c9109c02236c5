"""The columns of a strided table, for those who write one and for the kernels that read it. Imports nothing.

A row is ``run_bytes, src_region, src_offset, dst_region, dst_offset`` and three loops of ``count, src_stride,
dst_stride``, outermost first; loops that do not loop are (1, 0, 0). All are int64, offsets and strides in bytes. What a
row means is in :mod:`weightsync.kernels.strided`.
"""

from typing import Final

RUN_BYTES, SRC_REGION, SRC_OFFSET, DST_REGION, DST_OFFSET = range(5)
LOOPS: Final = 3
"""Loops around the contiguous run."""
LOOP_COLUMNS: Final = 3
"""Columns of one loop."""
COUNTS: Final = (5, 8, 11)
"""The column of each loop's count."""
SRC_STRIDE, DST_STRIDE = 1, 2
"""How far behind its count a loop's strides are."""
COLUMNS: Final = 14
"""Of the whole row."""
