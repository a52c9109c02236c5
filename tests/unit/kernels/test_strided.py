"""Strided tables: every rewriting of a table keeps its runs' bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from weightsync.kernels.columns import COLUMNS
from weightsync.kernels.errors import KernelTableError
from weightsync.kernels.strided import Sheets, as_table, canonical, concatenate, sheets

LOOP = st.tuples(st.integers(0, 4), st.integers(0, 12), st.integers(0, 12))
ROW = st.builds(
    lambda run, src, dst, loops: [run, 0, src, 7, dst, *(value for loop in loops for value in loop)],
    st.integers(0, 6),
    st.integers(0, 50),
    st.integers(0, 50),
    st.lists(LOOP, min_size=3, max_size=3),
)
TABLES = st.lists(ROW, min_size=1, max_size=5).map(lambda rows: np.array(rows, np.int64))


def pairs(table: np.ndarray) -> list[tuple[int, int, int]]:
    """Row, source byte and destination byte of everything a table names, sorted."""
    found = []
    for row, (run, _, src, _, dst, *loops) in enumerate(table.tolist()):
        (c0, s0, d0), (c1, s1, d1), (c2, s2, d2) = (loops[at : at + 3] for at in (0, 3, 6))
        for i, j, k, byte in np.ndindex(c0, c1, c2, run):
            found.append((row, src + i * s0 + j * s1 + k * s2 + byte, dst + i * d0 + j * d1 + k * d2 + byte))
    return sorted(found)


def sheet_pairs(parts: Sheets) -> list[tuple[int, int, int]]:
    """The same of sheets."""
    found = []
    for at in range(len(parts)):
        for i, byte in np.ndindex(int(parts.count[at]), int(parts.run[at])):
            step = int(parts.src[at] + i * parts.src_step[at]), int(parts.dst[at] + i * parts.dst_step[at])
            found.append((int(parts.row[at]), step[0] + byte, step[1] + byte))
    return sorted(found)


@given(TABLES)
def test_the_canonical_form_has_the_same_bytes(table: np.ndarray) -> None:
    assert pairs(canonical(table)) == pairs(table)


@given(TABLES, st.integers(1, 5))
def test_sheets_have_the_same_bytes_however_they_are_split(table: np.ndarray, most: int) -> None:
    whole = sheets(table)
    assert sheet_pairs(whole) == pairs(table)
    assert sheet_pairs(whole.unrolled()) == pairs(table)
    assert sheet_pairs(whole.at_most(np.full(len(whole), most))) == pairs(table)
    skip = np.minimum(whole.run, most)
    assert sheet_pairs(concatenate([whole.part(0 * skip, skip), whole.part(skip, whole.run - skip)])) == pairs(table)


def test_adjacent_runs_and_chained_loops_merge() -> None:
    box = np.array([[4, 0, 0, 7, 0, 2, 96, 96, 3, 32, 32, 8, 4, 4]], np.int64)
    assert canonical(box)[0].tolist()[:5] == [192, 0, 0, 7, 0]
    assert canonical(box)[0, 5::3].tolist() == [1, 1, 1]
    chained = np.array([[4, 0, 0, 7, 0, 5, 30, 60, 3, 10, 20, 1, 0, 0]], np.int64)
    assert canonical(chained)[0, 11:].tolist() == [15, 10, 20]


def test_malformed_tables_are_refused() -> None:
    assert as_table([]).shape == (0, COLUMNS)
    good = np.ones((2, COLUMNS), np.int64)
    for wrong in (good[:, :13], good.astype(np.int32), good[0]):
        with pytest.raises(KernelTableError, match="a strided table is int64"):
            as_table(wrong)
    good[1, 12] = -1
    with pytest.raises(KernelTableError, match="row 1 of the strided table has a negative"):
        as_table(good)
    good[1, 12], good[1, 3] = 1, -1
    assert as_table(good) is good
