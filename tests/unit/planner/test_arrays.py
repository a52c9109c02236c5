"""The planner's array helpers, against values worked out by hand."""

import numpy as np
import pytest
from weightsync.orchestrator.planner import arrays
from weightsync.orchestrator.planner.arrays import (
    Growing,
    boundaries,
    compress,
    count_runs,
    distinct_rows,
    expand,
    mix,
    stable_order,
    starts,
)


def test_starts_and_expand():
    assert starts(np.array([2, 0, 3])).tolist() == [0, 2, 2, 5]
    owner, ordinal = expand(np.array([2, 0, 3]))
    assert owner.tolist() == [0, 0, 2, 2, 2]
    assert ordinal.tolist() == [0, 1, 0, 1, 2]


def test_sorting_is_stable_beyond_sixteen_bits():
    keys = np.array([70000, 3, 70000, 65539, 3])
    assert stable_order(keys, 1 << 17).tolist() == [1, 4, 3, 0, 2]


def test_boundaries():
    assert boundaries(np.array([5, 5, 7, 9, 9, 9])).tolist() == [0, 2, 3, 6]
    assert boundaries(np.array([], np.int64)).tolist() == [0]


@pytest.mark.parametrize("bound", [10, 1 << 40])
def test_compress_by_table_and_by_sorting(bound):
    distinct, index = compress(np.array([7, 2, 7]), bound)
    assert distinct.tolist() == [2, 7]
    assert index.tolist() == [1, 0, 1]


@pytest.mark.parametrize("colliding", [False, True])
def test_distinct_rows_are_exact_even_where_hashes_collide(colliding, monkeypatch):
    if colliding:
        monkeypatch.setattr(arrays, "mix", lambda values: np.zeros(len(values), np.uint64))
    rows, index = distinct_rows(np.array([[2, 1], [1, 2], [0, 9], [2, 1]]))
    assert rows.tolist() == [[2, 1], [1, 2], [0, 9]], "in order of first occurrence"
    assert index.tolist() == [0, 1, 2, 0]


def test_mix_is_the_published_generator():
    assert [int(x) for x in mix(np.array([1, 2, 3]))] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_views_of_a_growing_array_stay_as_they_were():
    grown = Growing()
    grown.extend([1, 2])
    early = grown.view()
    grown.extend(list(range(5000)))
    assert early.tolist() == [1, 2]
    assert len(grown.view()) == 5002
    assert grown.view()[-1] == 4999


DENSE, PITCHED, BY_COLUMNS = [0, 0, 6, 2], [0, 0, 8, 2], [0, 0, 2, 4]


@pytest.mark.parametrize(
    ("strides", "runs"), [([DENSE], 1), ([PITCHED], 2), ([BY_COLUMNS], 6), ([DENSE, PITCHED], 2), ([DENSE, DENSE], 1)]
)
def test_runs_of_a_matrix_of_two_by_three(strides, runs):
    found = count_runs(np.array([[1, 1, 2, 3]]), np.array([2]), *(np.array([s]) for s in strides))
    assert found.tolist() == [runs]


def test_a_dimension_of_one_element_does_not_break_a_run():
    assert count_runs(np.array([[1, 2, 1, 3]]), np.array([2]), np.array([[99, 6, 77, 2]])).tolist() == [1]
