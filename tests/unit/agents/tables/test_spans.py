"""Spans are the bytes that a table reads, no more and no fewer, in as few ranges as there can be."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from weightsync.agents.tables.spans import NOWHERE, REGION_BITS, Spans
from weightsync.kernels.strided import MAX_LOGICAL_BYTES

LOOP = st.tuples(st.integers(0, 4), st.integers(0, 12), st.integers(0, 12))
ROW = st.builds(
    lambda run, region, src, loops: [run, region, src, 7, 0, *(value for loop in loops for value in loop)],
    st.integers(0, 6),
    st.integers(0, 2),
    st.integers(0, 90),
    st.lists(LOOP, min_size=3, max_size=3),
)
TABLES = st.lists(ROW, max_size=5).map(lambda rows: np.array(rows, np.int64).reshape(-1, 14))


def bytes_of(table: np.ndarray) -> set[tuple[int, int]]:
    """Region and byte of everything that a table reads, loop by loop."""
    found = set()
    for run, region, src, _, _, c0, s0, _, c1, s1, _, c2, s2, _ in table.tolist():
        for i, j, k, byte in np.ndindex(c0, c1, c2, run):
            found.add((region, src + i * s0 + j * s1 + k * s2 + byte))
    return found


def covered(spans: Spans) -> set[tuple[int, int]]:
    every = zip(spans.starts.tolist(), spans.ends.tolist(), strict=True)
    return {divmod(byte, 1 << REGION_BITS) for start, end in every for byte in range(start, end)}


def ranges(spans: Spans) -> list[tuple[int, int]]:
    return list(zip(spans.starts.tolist(), spans.ends.tolist(), strict=True))


@given(TABLES, TABLES)
def test_spans_are_the_bytes_of_the_table(table: np.ndarray, other: np.ndarray) -> None:
    spans = Spans.of(table)
    assert covered(spans) == bytes_of(table)
    assert all(end < start for end, start in zip(spans.ends[:-1].tolist(), spans.starts[1:].tolist(), strict=True))
    both = Spans.union([spans, Spans.of(other)])
    assert covered(both) == bytes_of(table) | bytes_of(other)
    assert ranges(both) == ranges(Spans.of(np.concatenate([table, other])))


@given(TABLES, st.integers(0, 2), st.lists(st.tuples(st.integers(0, 120), st.integers(1, 20)), max_size=6))
def test_a_range_is_held_if_all_of_its_bytes_are(table: np.ndarray, region: int, asked: list[tuple[int, int]]) -> None:
    known = bytes_of(table)
    expected = [all((region, offset + byte) in known for byte in range(size)) for offset, size in asked]
    offsets, sizes = np.array(asked, np.int64).reshape(-1, 2).T
    assert Spans.of(table).hold(region, offsets, sizes).tolist() == expected


def test_column_slices_that_complete_one_another_are_one_span() -> None:
    halves = [[64, 0, 256 + 64 * half, 7, 0, 1, 0, 0, 1, 0, 0, 10, 128, 128] for half in range(2)]
    assert len(Spans.of(np.array(halves[:1])).starts) == 10
    whole = Spans.of(np.array(halves))
    assert ranges(whole) == [(256, 256 + 1280)]


def test_nowhere_holds_nothing() -> None:
    assert not NOWHERE.hold(0, np.array([0]), np.array([1])).any()
    assert 1 << REGION_BITS == MAX_LOGICAL_BYTES
