"""Boxes as loops around a run, against the bytes of each element."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from weightsync.agents.tables.boxes import Boxes, loops_of, solid, unroll
from weightsync.orchestrator.protocol.limits import MAX_RANK


def boxes(*each: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], itemsize: int = 2) -> Boxes:
    """Boxes from (extents, source strides, target strides), in regions 0 and 1 at offset 0."""
    extent, source, target = (np.array([box[part] for box in each], dtype=np.int64) for part in range(3))
    zero = np.zeros(len(each), dtype=np.int64)
    return Boxes(zero, zero, source, zero + 1, zero, target, extent, zero + itemsize)


def bytes_of(box: Boxes) -> list[tuple[int, int]]:
    [extent], [source], [target] = box.extent.tolist(), box.source_stride.tolist(), box.target_stride.tolist()
    return sorted(
        (np.dot(index, source) + byte, np.dot(index, target) + byte)
        for index in itertools.product(*map(range, extent))
        for byte in range(int(box.itemsize[0]))
    )


def test_dense_boxes_are_one_run() -> None:
    loops = loops_of(boxes(((2, 3, 4, 5), (120, 40, 10, 2), (120, 40, 10, 2))))
    assert loops.run.tolist() == [240]
    assert loops.count.tolist() == [[1] * MAX_RANK]
    assert not loops.source_stride.any()
    assert not loops.target_stride.any()


def test_dimensions_that_continue_one_another_are_one_loop() -> None:
    # Rows of 10 bytes, 16 apart at the source and 10 at the target; three dimensions walk over them in step.
    loops = loops_of(boxes(((2, 3, 4, 5), (192, 64, 16, 2), (120, 40, 10, 2))))
    assert loops.run.tolist() == [10]
    assert loops.count.tolist() == [[1, 1, 1, 24]]
    assert loops.source_stride.tolist() == [[0, 0, 0, 16]]
    assert loops.target_stride.tolist() == [[0, 0, 0, 10]]


def test_a_transposed_box_loops_over_single_elements() -> None:
    loops = loops_of(boxes(((1, 1, 3, 4), (0, 0, 8, 2), (0, 0, 2, 6))))
    assert loops.run.tolist() == [2]
    assert loops.count.tolist() == [[1, 1, 3, 4]]
    assert loops.source_stride.tolist() == [[0, 0, 8, 2]]
    assert loops.target_stride.tolist() == [[0, 0, 2, 6]]


def test_boxes_without_elements_are_left_out() -> None:
    both = boxes(((1, 1, 0, 4), (0, 0, 8, 2), (0, 0, 8, 2)), ((1, 1, 1, 4), (0, 0, 8, 2), (0, 0, 8, 2)))
    assert solid(both).extent.tolist() == [[1, 1, 1, 4]]


def test_unrolling_counts_each_row_s_loops_like_an_odometer() -> None:
    owner, steps = unroll(np.array([[2, 2], [1, 1], [0, 3], [1, 3]], dtype=np.int64))
    assert owner.tolist() == [0, 0, 0, 0, 1, 3, 3, 3]
    assert steps.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 0], [0, 0], [0, 1], [0, 2]]


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(*[st.integers(1, 3)] * MAX_RANK),
    st.permutations(range(MAX_RANK)),
    st.tuples(*[st.integers(0, 2)] * MAX_RANK),
)
def test_loops_reach_the_bytes_of_the_box(extent: tuple[int, ...], order: list[int], gaps: tuple[int, ...]) -> None:
    """Any box with gaps at the source and with its dimensions in any order at the target."""
    source, target = [0] * MAX_RANK, [0] * MAX_RANK
    step = jump = 2
    for dim in reversed(range(MAX_RANK)):
        source[dim] = step
        step = (step * extent[dim]) + 2 * gaps[dim]
    for dim in reversed(order):
        target[dim] = jump
        jump *= extent[dim]
    box = boxes((extent, tuple(source), tuple(target)))
    loops = loops_of(box)
    found = []
    for index in itertools.product(*map(range, loops.count[0].tolist())):
        first, then = np.dot(index, loops.source_stride[0]), np.dot(index, loops.target_stride[0])
        found += [(first + byte, then + byte) for byte in range(int(loops.run[0]))]
    assert sorted(found) == bytes_of(box)
