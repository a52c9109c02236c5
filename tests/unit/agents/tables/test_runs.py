"""Runs and kernel tables against loops over single elements, on boxes of every rank, stride and dtype."""

import itertools
import sys
import types
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weightsync.agents.tables import runs as tables
from weightsync.kernels.columns import CODES, COLUMNS, UNSEEN
from weightsync.orchestrator.protocol.layout import COPY_COLUMNS, ITEMSIZE, Layout, Region, Tensor, pad, row
from weightsync.orchestrator.protocol.limits import MAX_RANK


@dataclass
class Case:
    """A writer's layout with copies, and what each element does: where it is read and where it should land."""

    layout: Layout
    copies: np.ndarray
    moves: list[tuple[int, int, int, int, int, int]]
    """(peer, local region, local byte, remote region, remote byte, itemsize) per element of direct copies."""


def row_major(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides = [itemsize]
    for extent in reversed(shape[1:]):
        strides.insert(0, strides[0] * extent)
    return tuple(strides[-len(shape) :]) if shape else ()


def spread(draw: st.DrawFn, extent: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Strides of a box in memory, dense or with gaps after any dimension."""
    strides: list[int] = []
    step = itemsize
    for size in reversed(extent):
        strides.insert(0, step)
        step = step * max(size, 1) + draw(st.sampled_from([0, 0, itemsize, 3 * itemsize]))
    return tuple(strides)


@st.composite
def cases(draw: st.DrawFn, staged: bool = False) -> Case:
    names = st.sampled_from(["bfloat16", "float32", "uint8"])
    made, rows, copies, moves = [], [], [], []
    packed = 0
    for number in range(draw(st.integers(1, 4))):
        dtype = draw(names)
        itemsize = ITEMSIZE[dtype]
        shape = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=MAX_RANK)))
        made.append(Tensor(f"t{number}", dtype, shape))
        box = [draw(st.integers(0, size - 1)) for size in shape]
        extent = tuple(draw(st.integers(1, size - low)) for size, low in zip(shape, box, strict=True))
        stride = spread(draw, extent, itemsize)
        base = number * 100_000
        rows.append(row(number, number % 2, base, tuple(box), extent, stride))
        for _ in range(draw(st.integers(1, 2))):
            start = [draw(st.integers(0, size - 1)) for size in extent]
            sub = tuple(
                draw(st.integers(0 if size > 1 else 1, size - low)) for size, low in zip(extent, start, strict=True)
            )
            target_stride = spread(draw, sub, itemsize)
            peer, remote_region, remote = draw(st.integers(0, 1)), draw(st.integers(0, 2)), len(copies) * 100_000
            absolute = tuple(low + low2 for low, low2 in zip(box, start, strict=True))
            interleaved = itertools.chain.from_iterable(zip(pad(absolute, 0), pad(sub, 1), strict=True))
            place = packed if staged else -1
            copies.append([peer, number, 0, place, *interleaved, remote_region, remote, *pad(target_stride, 0)])
            for element in itertools.product(*(range(size) for size in sub)):
                local = base + sum((s + e) * step for s, e, step in zip(start, element, stride, strict=True))
                far = remote + sum(e * step for e, step in zip(element, target_stride, strict=True))
                moves.append((peer, number % 2, local, remote_region, far, itemsize))
            packed += int(np.prod(sub, dtype=np.int64)) * itemsize
    regions = (Region(0, 1 << 30), Region(1 << 30, 1 << 30), Region(1 << 31, 1 << 30))
    layout = Layout(tuple(made), regions, np.array(rows, dtype="<i8").tobytes(), staging=2)
    return Case(layout, np.array(copies, dtype=np.int64).reshape(-1, COPY_COLUMNS), moves)


def bytes_of_runs(table: np.ndarray) -> list[tuple[int, ...]]:
    return sorted(
        (peer, region, local + i, far_region, far + i)
        for peer, region, local, far_region, far, length in table.tolist()
        for i in range(length)
    )


def bytes_of_moves(moves: list[tuple[int, int, int, int, int, int]]) -> list[tuple[int, ...]]:
    return sorted((p, r, a + i, q, b + i) for p, r, a, q, b, size in moves for i in range(size))


def bytes_of_table(table: np.ndarray) -> list[tuple[int, ...]]:
    found = []
    for run, source, offset, target, place, *loops in table.tolist():
        counts, steps, jumps = loops[0::3], loops[1::3], loops[2::3]
        for index in itertools.product(*(range(count) for count in counts)):
            a = offset + sum(i * step for i, step in zip(index, steps, strict=True))
            b = place + sum(i * jump for i, jump in zip(index, jumps, strict=True))
            found += [(source, a + i, target, b + i) for i in range(run)]
    return sorted(found)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_runs_move_each_byte_where_the_copies_say(case: Case) -> None:
    table = tables.runs(case.copies, case.layout)
    assert bytes_of_runs(table) == bytes_of_moves(case.moves)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_no_two_runs_continue_each_other(case: Case) -> None:
    table = tables.runs(case.copies, case.layout).tolist()
    starts = {tuple(run[:5]) for run in table}
    for peer, region, local, far_region, far, length in table:
        assert (peer, region, local + length, far_region, far + length) not in starts


@settings(deadline=None, max_examples=60)
@given(cases(staged=True))
def test_pack_and_scatter_mirror_each_other(case: Case) -> None:
    packed = tables.pack_table(case.copies, case.layout)
    scattered = tables.scatter_table(case.copies, case.layout)
    mirrored = sorted((c, d, a, b) for a, b, c, d in bytes_of_table(packed))
    assert bytes_of_table(scattered) == mirrored
    assert tables.table_bytes(packed) == tables.table_bytes(scattered) == len(mirrored)


@settings(deadline=None, max_examples=60)
@given(cases(staged=True))
def test_packing_fills_the_staging_bytes_in_the_order_of_the_box(case: Case) -> None:
    targets = sorted(place for _, _, region, place in bytes_of_table(tables.pack_table(case.copies, case.layout)))
    assert targets == list(range(len(targets)))
    sources = sorted(
        (region, place) for region, place, _, _ in bytes_of_table(tables.pack_table(case.copies, case.layout))
    )
    assert sources == sorted((r, a + i) for _, r, a, _, _, size in case.moves for i in range(size))


@settings(deadline=None, max_examples=60)
@given(cases(staged=True))
def test_what_is_packed_is_no_run_and_worth_its_bytes(case: Case) -> None:
    assert tables.runs(case.copies, case.layout).shape == (0, tables.RUN_COLUMNS)
    assert tables.copied_bytes(case.copies, case.layout) == sum(size for *_, size in case.moves)


@settings(deadline=None, max_examples=60)
@given(cases(staged=True))
def test_what_has_landed_is_digested_where_it_lies_as_its_box(case: Case) -> None:
    """The logical places are those of the copies' boxes, and each is read from where it is packed to."""
    with pytest.MonkeyPatch.context() as patched:
        module = types.ModuleType("weightsync.kernels.digest")
        module.tensor_key = lambda name: int(name[1:])  # type: ignore[attr-defined]
        patched.setitem(sys.modules, "weightsync.kernels.digest", module)
        here = bytes_of_table(tables.digest_table(case.copies, case.layout))
        there = bytes_of_table(tables.digest_table(case.copies, case.layout, landed=True))
    # The same copy of a byte at both places: by pack_table, from where its row lies to where it is packed.
    packed = {(a, b): (c, d) for a, b, c, d in bytes_of_table(tables.pack_table(case.copies, case.layout))}
    if len(packed) == len(here):  # else copies overlap in their rows
        assert sorted((*packed[a, b], key, place) for a, b, key, place in here) == there


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key function whose values are beyond the signed range, so that the bit pattern is what counts."""
    module = types.ModuleType("weightsync.kernels.digest")
    module.tensor_key = lambda name: (1 << 63) + int(name[1:])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "weightsync.kernels.digest", module)


@pytest.mark.usefixtures("keys")
def test_digest_places_are_logical_and_add_up_over_shards() -> None:
    """Two ranks with half the columns each name together exactly the logical bytes of the whole tensor."""
    tensor = Tensor("t7", "bfloat16", (3, 8))
    found: list[tuple[int, int]] = []
    for first in (0, 4):
        data = np.array([row(0, 0, 64, (0, first), (3, 4), (8, 2))], dtype="<i8")
        layout = Layout((tensor,), (Region(0, 4096),), data.tobytes())
        table = tables.digest_table(layout.matrix(), layout)
        assert table[0, 0] == 8
        found += [(region, place) for _, _, region, place in bytes_of_table(table)]
    assert sorted(found) == [(-(1 << 63) + 7, place) for place in range(3 * 8 * 2)]


@pytest.mark.usefixtures("keys")
def test_digest_of_copies_is_that_of_their_boxes() -> None:
    tensor = Tensor("t1", "float32", (4, 6))
    data = np.array([row(0, 1, 0, (0, 0), (4, 6), (24, 4))], dtype="<i8")
    layout = Layout((tensor,), (Region(0, 1), Region(4096, 4096)), data.tobytes())
    copy = [0, 0, 0, -1, 0, 1, 0, 1, 1, 2, 2, 3, 0, 0, 0, 0, 0, 0]
    table = tables.digest_table(np.array([copy], dtype=np.int64), layout)
    assert table.tolist() == [[12, 1, 32, -(1 << 63) + 1, 32, 1, 0, 0, 1, 0, 0, 2, 24, 24]]


@pytest.mark.usefixtures("keys")
def test_elements_have_the_code_of_their_dtype() -> None:
    names = {"t9": "bfloat16", "t2": "int32", "t5": "float8_e8m0fnu", "t1": "uint8"}
    made = tuple(Tensor(name, dtype, (4,)) for name, dtype in names.items())
    data = np.array([row(number, 0, 64 * number, (0,), (4,), (8,)) for number in (3, 0, 2, 1)], dtype="<i8")
    layout = Layout(made, (Region(0, 256),), data.tobytes())
    codes = tables.element_codes(tables.digest_table(layout.matrix(), layout), layout)
    assert codes.tolist() == [CODES["float8_e8m0fnu"], CODES["bfloat16"], CODES["float8_e8m0fnu"], UNSEEN]


def test_a_whole_row_is_one_run() -> None:
    data = np.array([row(0, 0, 0, (0, 0), (1024, 256), (512, 2))], dtype="<i8")
    layout = Layout((Tensor("t", "bfloat16", (1024, 256)),), (Region(0, 1 << 20),), data.tobytes())
    copy = [1, 0, 0, -1, 0, 1, 0, 1, 0, 1024, 0, 256, 3, 77, 0, 0, 512, 2]
    assert tables.runs(np.array([copy]), layout).tolist() == [[1, 0, 0, 3, 77, 1024 * 512]]


def test_empty_copies_give_empty_tables() -> None:
    layout = Layout((), (), b"")
    none = np.empty((0, COPY_COLUMNS), dtype=np.int64)
    assert tables.runs(none, layout).shape == (0, tables.RUN_COLUMNS)
    assert tables.pack_table(none, layout).shape == (0, COLUMNS)
    assert tables.scatter_table(none, layout).shape == (0, COLUMNS)


def one_row() -> tuple[Layout, list[int]]:
    data = np.array([row(0, 0, 0, (2,), (4,), (1,))], dtype="<i8")
    layout = Layout((Tensor("weird", "uint8", (8,)),), (Region(0, 64),), data.tobytes())
    return layout, [0, 0, 0, -1, 0, 1, 0, 1, 0, 1, 2, 4, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [(10, 1, "weird"), (11, 5, "weird"), (1, 1, "layout of 1 rows"), (1, -1, "layout of 1 rows")],
)
def test_copies_that_do_not_fit_are_refused(column: int, value: int, words: str) -> None:
    layout, copy = one_row()
    copy[column] = value
    with pytest.raises(tables.RunTableError, match=words):
        tables.runs(np.array([copy]), layout)


def test_what_is_packed_needs_a_ring() -> None:
    layout, copy = one_row()
    copy[3] = 0
    with pytest.raises(tables.RunTableError, match="no staging"):
        tables.pack_table(np.array([copy]), layout)


def test_a_table_of_another_width_is_refused() -> None:
    with pytest.raises(tables.RunTableError, match=r"expected \[n, 18\]"):
        tables.digest_table(np.zeros((1, 7), dtype=np.int64), one_row()[0])


def test_places_have_names() -> None:
    data = np.array([row(0, 0, 0, (0,), (8,), (1,)), row(1, 0, 64, (0,), (8,), (1,))], dtype="<i8")
    made = (Tensor("first", "uint8", (8,)), Tensor("second", "uint8", (8,)))
    name = tables.tensor_names(Layout(made, (Region(0, 128), Region(4096, 64)), data.tobytes(), staging=1))
    assert [name(0, 3), name(0, 70), name(1, 5)] == ["first", "second", "packed tensors"]
    assert name(2, 5) == "bytes 5 of region 2"
