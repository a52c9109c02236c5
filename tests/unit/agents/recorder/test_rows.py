"""Landings as rows of a Layout: merged, checked, and filled from full tensors."""

import numpy as np
import pytest
import torch
from weightsync.agents.recorder.boxes import StridedView
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.recorder.rows import LayoutRows, Row, Target, build_rows, fill, merge
from weightsync.agents.recorder.trace import Landing, RecordError
from weightsync.orchestrator.protocol import layout as protocol

F32 = torch.float32


def landing(
    name: str, shape: tuple[int, ...], corner: tuple[int, ...], place: StridedView, dtype: torch.dtype = F32
) -> Landing:
    return Landing(0, Checkpoint(name, shape, F32), corner, place, dtype)


def one_target(tensor: torch.Tensor, *landings: Landing, start: int = 0) -> LayoutRows:
    return build_rows([Target(tensor, start, landings)])


def test_a_row_says_where_a_box_lies_in_the_region_of_its_allocation() -> None:
    pool = torch.zeros(100)
    weight = pool[10:34].view(4, 6)
    rows = one_target(weight, landing("x", (8, 6), (4, 0), StridedView((4, 6), (24, 4), 128)), start=128)
    assert rows.regions == (protocol.Region(pool.data_ptr(), 400, "DRAM", 0),)
    assert rows.memory[0].data_ptr() == pool.data_ptr()
    assert rows.rows == (Row(0, 0, 40, (4, 0), (4, 6), (24, 4)),)
    (columns,) = rows.matrix()
    assert columns.tolist() == protocol.row(0, 0, 40, (4, 0), (4, 6), (24, 4))


def test_two_parameters_of_one_allocation_share_a_region() -> None:
    pool = torch.zeros(8)
    first, second = pool[:4], pool[4:]
    rows = build_rows(
        [
            Target(first, 0, (landing("x", (4,), (0,), StridedView((4,), (4,), 0)),)),
            Target(second, 0, (landing("y", (4,), (0,), StridedView((4,), (4,), 0)),)),
        ]
    )
    assert len(rows.regions) == 1
    assert [row.offset for row in rows.rows] == [0, 16]


def test_neighbouring_boxes_that_continue_in_memory_are_one_row() -> None:
    parts = [landing("x", (6, 4), (start, 0), StridedView((2, 4), (16, 4), 16 * start)) for start in (2, 0, 4)]
    rows = one_target(torch.zeros(6, 4), *parts)
    assert rows.rows == (Row(0, 0, 0, (0, 0), (6, 4), (16, 4)),)


def test_single_rows_find_their_stride() -> None:
    boxes = [Row(0, 0, 40 * i, (i, 0), (1, 4), (0, 4)) for i in range(3)]
    assert merge(boxes) == [Row(0, 0, 0, (0, 0), (3, 4), (40, 4))]


def test_boxes_that_do_not_continue_stay_apart() -> None:
    gap = [Row(0, 0, 0, (0, 0), (2, 4), (16, 4)), Row(0, 0, 64, (2, 0), (2, 4), (16, 4))]
    assert merge(gap) == gap
    twice = [Row(0, 0, 0, (0,), (4,), (4,)), Row(0, 0, 64, (0,), (4,), (4,))]
    assert merge(twice) == twice


def test_one_tensor_has_one_wire_dtype() -> None:
    target = torch.zeros(8)
    place = StridedView((4,), (4,), 0)
    with pytest.raises(RecordError, match="x is loaded as float32 and as int32"):
        one_target(target, landing("x", (4,), (0,), place), landing("x", (4,), (0,), place, torch.int32))


def test_what_cannot_travel_is_refused_by_name() -> None:
    with pytest.raises(RecordError, match=r"x: torch\.complex64 cannot travel"):
        one_target(torch.zeros(8), landing("x", (4,), (0,), StridedView((4,), (8,), 0), torch.complex64))
    with pytest.raises(RecordError, match="x: 5 dimensions, at most 4 can travel"):
        one_target(torch.zeros(1), landing("x", (1,) * 5, (0,) * 5, StridedView((1,) * 5, (4,) * 5, 0)))


def test_fill_places_boxes_and_asks_for_what_is_missing() -> None:
    weight = torch.zeros(4, 3)
    parts = (
        landing("a", (4, 3), (2, 0), StridedView((2, 3), (12, 4), 0)),
        landing("b", (3, 2), (0, 0), StridedView((3, 2), (4, 12), 24)),
    )
    rows = one_target(weight, *parts)
    a, b = torch.randn(4, 3), torch.randn(3, 2)
    fill(rows, iter([("other", torch.zeros(1)), ("b", b), ("a", a)]))
    assert torch.equal(weight, torch.cat([a[2:], b.t()]))
    with pytest.raises(RecordError, match="1 tensors did not come: b"):
        fill(rows, iter([("a", a)]))


@pytest.mark.parametrize(
    ("full", "message"),
    [
        (torch.zeros(2, 3), r"x has shape \(2, 3\)"),
        (torch.zeros(4, 3, dtype=torch.float16), "x is torch.float16, the engine expects float32"),
    ],
)
def test_fill_refuses_another_shape_or_dtype(full: torch.Tensor, message: str) -> None:
    rows = one_target(torch.zeros(4, 3), landing("x", (4, 3), (0, 0), StridedView((4, 3), (12, 4), 0)))
    with pytest.raises(RecordError, match=message):
        fill(rows, iter([("x", full)]))


def test_fill_casts_as_the_loader_would() -> None:
    weight = torch.zeros(3)
    source = Checkpoint("x", (3,), torch.bfloat16)
    rows = one_target(weight, Landing(0, source, (0,), StridedView((3,), (4,), 0), F32))
    assert rows.tensors == (protocol.Tensor("x", "float32", (3,)),)
    fill(rows, iter([("x", torch.tensor([1.5, 2, 3], dtype=torch.bfloat16))]))
    assert weight.tolist() == [1.5, 2, 3]


def test_the_matrix_of_no_rows_is_empty() -> None:
    assert build_rows([]).matrix().shape == (0, protocol.ROW_COLUMNS)
    assert build_rows([]).matrix().dtype == np.int64
