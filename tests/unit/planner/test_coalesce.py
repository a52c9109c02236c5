"""What is packed, and where it is staged."""

import numpy as np
import pytest
from layouts import copies_of, engine_rank, party_of, trainer
from weightsync.orchestrator.planner import CostModel, make_plan
from weightsync.orchestrator.planner.coalesce import STAGING_ALIGNMENT, pack
from weightsync.orchestrator.protocol.layout import COPY_STAGED, Tensor


def test_small_pieces_share_one_descriptor_and_large_ones_go_straight():
    small = [Tensor(f"model.layers.{i}.norm", "bfloat16", (16,)) for i in range(20)]
    large = [Tensor("model.layers.0.w", "bfloat16", (1024, 1024))]
    model = small + large
    plan = make_plan(
        [party_of(trainer(0), model[::-1], staging=1 << 20)],
        [party_of(engine_rank("e"), model, staging=1 << 20)],
        CostModel(),
    )
    assert plan.sends[trainer(0)].descriptors == 2
    staged = copies_of(plan, trainer(0))[:, COPY_STAGED]
    assert (staged >= 0).sum() == len(small)
    assert len(copies_of(plan, engine_rank("e"))) == len(small)


def test_a_lone_small_piece_is_not_packed():
    model = [Tensor("norm", "bfloat16", (16,))]
    plan = make_plan([party_of(trainer(0), model, staging=4096)], [party_of(engine_rank("e"), model, staging=4096)])
    assert (copies_of(plan, trainer(0))[:, COPY_STAGED] == -1).all()


COST = CostModel(alpha_seconds=1e-6, bytes_per_second=1e8, pack_bytes_per_second=1e9)
"""A descriptor is worth 100 bytes."""


def packed(edge, target, size, source_room, target_room):
    used = np.zeros(1, np.int64)
    count = len(edge)
    staged = pack(
        np.array(edge), np.zeros(count, np.int32), np.array(target, np.int32), np.array(size),
        np.ones(count, np.int64), COST, used, np.array([source_room]), np.array(target_room),
    )  # fmt: skip
    return staged.at_source.tolist(), staged.at_target.tolist(), used.tolist()


def test_each_edge_has_one_stretch_on_both_sides():
    found = packed([0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [30, 40, 500, 10, 10], 4096, [4096, 4096])
    begin = STAGING_ALIGNMENT
    assert found == ([0, 30, -1, begin, begin + 10], [0, 30, -1, 0, 10], [2 * begin])


def test_two_pieces_are_packed_only_if_they_are_smaller_than_the_descriptor_they_save():
    assert packed([0, 0], [0, 0], [60, 50], 4096, [4096]) == ([-1, -1], [-1, -1], [0])
    assert packed([0, 0], [0, 0], [60, 39], 4096, [4096])[0] == [0, 60]


@pytest.mark.parametrize(("source_room", "target_room"), [(0, 4096), (4096, 0), (0, 0)])
def test_nothing_is_packed_without_staging_on_both_sides(source_room, target_room):
    assert packed([0, 0], [0, 0], [30, 40], source_room, [target_room]) == ([-1, -1], [-1, -1], [0])


def test_an_edge_that_keeps_one_piece_for_want_of_room_is_not_packed():
    """88 bytes are left beside the alignment of two edges: 30, 40 and 10 fit, the last 10 does not."""
    room = 2 * STAGING_ALIGNMENT + 88
    found = packed([0, 0, 1, 1], [0, 0, 1, 1], [30, 40, 10, 10], room, [4096, 4096])
    assert found == ([0, 30, -1, -1], [0, 30, -1, -1], [STAGING_ALIGNMENT])
