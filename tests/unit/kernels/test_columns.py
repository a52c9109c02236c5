"""The columns of a strided table, from where agents write them to where kernels read them."""

import numpy as np
import torch
from weightsync.agents.tables import runs as tables
from weightsync.kernels import columns
from weightsync.kernels.columns import COLUMNS, COUNTS, DST_STRIDE, LOOP_COLUMNS, LOOPS, SRC_STRIDE
from weightsync.kernels.copy import strided_copy
from weightsync.kernels.strided import as_table
from weightsync.orchestrator.protocol.layout import Layout, Region, Tensor, row


def test_every_column_has_one_name() -> None:
    fixed = [columns.RUN_BYTES, columns.SRC_REGION, columns.SRC_OFFSET, columns.DST_REGION, columns.DST_OFFSET]
    loops = [count + side for count in COUNTS for side in (0, SRC_STRIDE, DST_STRIDE)]
    assert len(COUNTS) == LOOPS
    assert len(loops) == LOOPS * LOOP_COLUMNS
    assert fixed + loops == list(range(COLUMNS))


def test_kernels_read_each_column_that_agents_write() -> None:
    """A box of three dimensions, none of which continues another, so that every loop has a count and strides."""
    shape, stride = (2, 3, 2, 4), (512, 96, 24, 4)
    tensor = Tensor("t", "float32", shape)
    data = np.array([row(0, 1, 8, (0,) * 4, shape, stride)], dtype="<i8")
    regions = (Region(0, 16), Region(1 << 20, 2048), Region(1 << 21, 256))
    layout = Layout((tensor,), regions, data.tobytes(), staging=2)
    copy = [0, 0, 0, 0, *(value for extent in shape for value in (0, extent)), 0, 0, 0, 0, 0, 0]
    table = tables.pack_table(np.array([copy], dtype=np.int64), layout)
    assert as_table(table) is table
    [written] = table.tolist()
    # 16 contiguous bytes from byte 8 of region 1 to byte 0 of region 2, in loops of 2, 3 and 2.
    assert written == [16, 1, 8, 2, 0, 2, 512, 96, 3, 96, 32, 2, 24, 16]
    source = torch.randint(0, 256, (2048,), dtype=torch.uint8)
    staging = torch.zeros(256, dtype=torch.uint8)
    strided_copy([staging[:16], source, staging], [staging[:16], source, staging], table)
    expected = source.view(torch.int32)[2:].as_strided(shape, [step // 4 for step in stride], 2)
    assert torch.equal(staging[:192].view(torch.int32), expected.reshape(-1))
