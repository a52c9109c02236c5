"""Cutting at the borders of chunks moves no byte and leaves none that crosses one."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weightsync.agents.tables.cargo import cut_packing, cut_runs, cut_scattering, plain_runs
from weightsync.kernels.columns import COUNTS, DST_OFFSET, RUN_BYTES, SRC_OFFSET
from weightsync.orchestrator.protocol.landing import Berth


def places(table, chunk, chunk_bytes, moved):
    """(source byte, destination byte) of every byte; column ``moved`` counts from the row's chunk on."""
    found = []
    for number, values in enumerate(table.tolist()):
        values[moved] += int(chunk[number]) * chunk_bytes
        run, _, source, _, target, *loops = values
        for index in itertools.product(*(range(count) for count in loops[0::3])):
            a = source + sum(i * step for i, step in zip(index, loops[1::3], strict=True))
            b = target + sum(i * step for i, step in zip(index, loops[2::3], strict=True))
            found += [(a + i, b + i) for i in range(run)]
    return sorted(found)


@st.composite
def packings(draw):
    """Kernel rows of boxes with any strides, packed row by row with some padding between them."""
    rows, place = [], 0
    for number in range(draw(st.integers(1, 3))):
        run, counts = draw(st.integers(1, 20)), [draw(st.integers(1, 4)) for _ in COUNTS]
        dense, spread = [run, 0, 0], [run + draw(st.integers(0, 3)), 0, 0]
        for outer in (1, 2):
            dense[outer] = dense[outer - 1] * counts[-outer]
            spread[outer] = spread[outer - 1] * counts[-outer] + draw(st.integers(0, 3))
        loops = [value for at in range(3) for value in (counts[at], spread[2 - at], dense[2 - at])]
        rows.append([run, 0, 10_000 * number, 1, place, *loops])
        place += run * counts[0] * counts[1] * counts[2] + draw(st.integers(0, 16))
    return np.array(rows, np.int64)


@settings(deadline=None, max_examples=100)
@given(packings(), st.integers(1, 100))
def test_a_packing_that_is_cut_packs_the_same_bytes_chunk_by_chunk(table, chunk_bytes):
    cut = cut_packing(table, chunk_bytes)
    whole = places(table, np.zeros(len(table), np.int64), chunk_bytes, DST_OFFSET)
    assert places(cut.rows, cut.chunk, chunk_bytes, DST_OFFSET) == whole
    size = cut.rows[:, RUN_BYTES] * cut.rows[:, list(COUNTS)].prod(axis=1)
    assert (size > 0).all()
    assert (cut.rows[:, DST_OFFSET] + size <= chunk_bytes).all()
    assert (np.diff(cut.chunk) >= 0).all()
    assert sum(len(cut.of(chunk)) for chunk in set(cut.chunk.tolist())) == len(cut.rows)


@settings(deadline=None, max_examples=30)
@given(packings(), st.integers(1, 100))
def test_scattering_is_cut_as_packing_is(table, chunk_bytes):
    mirrored = table.copy()
    for a, b in [(1, 3), (2, 4), *((column + 1, column + 2) for column in COUNTS)]:
        mirrored[:, [a, b]] = table[:, [b, a]]
    cut = cut_scattering(mirrored, chunk_bytes)
    there = [(b, a) for a, b in places(table, np.zeros(len(table), np.int64), chunk_bytes, DST_OFFSET)]
    assert places(cut.rows, cut.chunk, chunk_bytes, SRC_OFFSET) == sorted(there)


def test_whole_iterations_of_a_loop_stay_together():
    """A hundred rows of 10 bytes in chunks of 256: 25 whole rows a chunk, and 6 + 4 bytes of the one between."""
    table = np.array([[10, 0, 0, 1, 0, 1, 0, 0, 1, 0, 0, 100, 64, 10]], np.int64)
    cut = cut_packing(table, 256)
    assert len(cut.of(0)) == 2
    assert cut.of(0)[:, [0, 4, 11]].tolist() == [[10, 0, 25], [6, 250, 1]]
    assert cut.of(1)[:, [0, 4]].tolist() == [[10, 4], [4, 0], [2, 254]]


def test_runs_are_cut_at_borders():
    runs = np.array([[0, 1, 1000, 3, 200, 700]], np.int64)
    cut = cut_runs(runs, 256)
    assert cut.chunk.tolist() == [0, 1, 2, 3]
    assert cut.rows[:, [2, 4, 5]].tolist() == [[1000, 200, 56], [1056, 0, 256], [1312, 0, 256], [1568, 0, 132]]
    assert cut.rows[:, [0, 1, 3]].tolist() == [[0, 1, 3]] * 4


WHOLE, AGAIN = Berth(3, 4096, 256, 8, 2048), Berth(3, 8192, 256, 8, 2048, passes=True)


@pytest.mark.parametrize(
    ("berth", "expected"), [(None, [[3, 7], [1, 7]]), (WHOLE, [[3, 4103], [1, 7]]), (AGAIN, [[1, 7]])]
)
def test_what_is_the_same_in_every_round_is_a_plain_write(berth, expected):
    runs = np.array([[0, 0, 0, 3, 7, 10], [0, 0, 0, 1, 7, 10]], np.int64)
    assert plain_runs(runs, berth)[:, [3, 4]].tolist() == expected
    assert runs[0, 4] == 7
