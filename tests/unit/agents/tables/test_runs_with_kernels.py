"""Tables and kernels together on real bytes: packed on one side, scattered on the other, digests that agree."""

import numpy as np
import torch
from weightsync.agents.tables import runs as tables
from weightsync.kernels.copy import strided_copy
from weightsync.kernels.digest import digest
from weightsync.orchestrator.protocol.layout import Layout, Region, Tensor, row
from weightsync.orchestrator.protocol.names import add_digests

SHAPE = (6, 40)
TENSOR = Tensor("model.layers.0.mlp.down_proj.weight", "bfloat16", SHAPE)
BYTES = 6 * 40 * 2


def layout(rows: list[list[int]], *lengths: int, staging: int = -1) -> Layout:
    regions = tuple(Region((index + 1) << 32, length) for index, length in enumerate(lengths))
    return Layout((TENSOR,), regions, np.array(rows, dtype="<i8").tobytes(), staging)


def copy(row_index: int, staged: int, columns: tuple[int, int], remote: tuple[int, int, int, int]) -> list[int]:
    """All rows of the tensor and ``columns`` (first, count) of it."""
    region, offset, *strides = remote
    return [0, row_index, 0, staged, 0, 1, 0, 1, 0, 6, *columns, region, offset, 0, 0, *strides]


def test_a_tensor_split_by_columns_arrives_packed_in_two_targets() -> None:
    """One whole tensor at the source; each target holds half of the columns, with a pitch of its own."""
    weights = torch.randint(0, 256, (BYTES + 32,), dtype=torch.uint8)
    source = layout([row(0, 0, 32, (0, 0), SHAPE, (80, 2))], BYTES + 32, BYTES, staging=1)
    staging = torch.zeros(BYTES, dtype=torch.uint8)
    sums = []
    for half in range(2):
        columns = (20 * half, 20)
        outgoing = np.array([copy(0, half * BYTES // 2, columns, (1, 8, 0, 0))])
        strided_copy([weights, staging], [weights, staging], tables.pack_table(outgoing, source))

        target = layout([row(0, 0, 4, (0, 20 * half), (6, 20), (64, 2))], 6 * 64 + 4, BYTES, staging=1)
        memory, arrived = torch.zeros(6 * 64 + 4, dtype=torch.uint8), torch.zeros(BYTES, dtype=torch.uint8)
        arrived[8 : 8 + BYTES // 2] = staging[half * BYTES // 2 : (half + 1) * BYTES // 2]
        incoming = np.array([copy(0, 8, columns, (0, 0, 0, 0))])
        strided_copy([memory, arrived], [memory, arrived], tables.scatter_table(incoming, target))

        whole = weights[32:].reshape(6, 80)
        assert torch.equal(memory[4:].reshape(6, 64)[:, :40], whole[:, 40 * half : 40 * half + 40])
        found = digest([memory, arrived], tables.digest_table(target.matrix(), target))
        assert found == digest([weights, staging], tables.digest_table(outgoing, source))
        sums.append(found)
    assert add_digests(*sums) == digest([weights, staging], tables.digest_table(source.matrix(), source))
