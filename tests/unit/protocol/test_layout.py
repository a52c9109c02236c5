"""Rows of layouts, with values worked out by hand."""

from typing import Any

import numpy as np
import pytest
from weightsync.orchestrator.protocol.layout import (
    COPY_COLUMNS,
    COPY_REMOTE,
    ITEMSIZE,
    ROW_COLUMNS,
    Layout,
    Region,
    Tensor,
    as_matrix,
    contents,
    pad,
    row,
)
from weightsync.orchestrator.protocol.limits import MAX_RANK


def test_the_columns() -> None:
    # A row: tensor, region, byte offset, then (offset, extent, stride) of 4 dimensions.
    assert (MAX_RANK, ROW_COLUMNS) == (4, 15)
    # A copy: peer, row, group, staged, then (offset, extent) of 4 dimensions, then region, byte offset and 4 strides.
    assert (COPY_REMOTE, COPY_COLUMNS) == (12, 18)


def test_a_row_of_a_matrix_is_padded_on_the_left() -> None:
    # Rows 128..255 of a bfloat16 [512, 64] that lie at byte 4096: 128 bytes from row to row, 2 from column to column.
    assert row(3, 1, 4096, (128, 0), (128, 64), (128, 2)) == [3, 1, 4096, 0, 1, 0, 0, 1, 0, 128, 128, 128, 0, 64, 2]


def test_a_scalar_is_a_box_of_one() -> None:
    assert row(0, 0, 8, (), (), ()) == [0, 0, 8, *[0, 1, 0] * 4]


def test_rows_travel_as_little_endian_int64() -> None:
    entries = [row(0, 0, 0, (0,), (8,), (4,)), row(1, 0, 32, (8,), (8,), (4,))]
    rows = np.array(entries, dtype="<i8").tobytes()
    assert len(rows) == 2 * 15 * 8
    assert rows[15 * 8 : 16 * 8] == b"\x01" + bytes(7)
    layout = Layout(tensors=(Tensor("a", "float32", (16,)),), regions=(Region(1 << 40, 64),), rows=rows)
    assert layout.matrix().tolist() == entries
    assert not layout.matrix().flags.writeable


@pytest.mark.parametrize("size", [1, 8, 15 * 8 - 1, 16 * 8])
def test_a_table_of_no_whole_number_of_rows(size: int) -> None:
    with pytest.raises(ValueError, match=f"a table of {size} bytes is no whole number of rows of 15 int64 columns"):
        as_matrix(bytes(size), ROW_COLUMNS)


def test_an_empty_table_has_no_rows() -> None:
    assert as_matrix(b"", ROW_COLUMNS).shape == (0, 15)


def test_more_dimensions_than_travel() -> None:
    assert pad((1, 2, 3, 4), 0) == (1, 2, 3, 4)
    with pytest.raises(ValueError, match="a tensor of 5 dimensions; at most 4 are supported"):
        pad((1, 2, 3, 4, 5), 0)


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float8_e4m3fn", 1), ("float8_e8m0fnu", 1), ("int64", 8)]
)
def test_bytes_per_element(dtype: str, size: int) -> None:
    assert ITEMSIZE[dtype] == size


def _layout(*rows: list[int], **more: Any) -> Layout:
    tensors = (Tensor("a", "bfloat16", (8, 4)), Tensor("b", "bfloat16", (8, 4)))
    return Layout(**{"tensors": tensors, "regions": (), "rows": np.array(rows, "<i8").tobytes(), **more})


ROW = row(0, 0, 0, (0, 0), (8, 4), (8, 2))
OTHER = row(1, 0, 64, (4, 0), (4, 4), (8, 2))


def test_the_same_contents_in_another_order_at_other_places() -> None:
    moved = row(0, 3, 4096, (0, 0), (8, 4), (2, 16))
    assert contents(_layout(ROW, OTHER)) == contents(_layout(OTHER, moved, lands="copy", staging=2))


@pytest.mark.parametrize(
    "other",
    [
        _layout(ROW),
        _layout(ROW, OTHER, OTHER),
        _layout(ROW, row(0, 0, 64, (4, 0), (4, 4), (8, 2))),
        _layout(ROW, row(1, 0, 64, (3, 0), (4, 4), (8, 2))),
        _layout(ROW, row(1, 0, 64, (4, 0), (4, 3), (8, 2))),
        _layout(ROW, row(1, 0, 64, (0, 4), (4, 4), (8, 2))),
        _layout(ROW, OTHER, tensors=(Tensor("a", "bfloat16", (8, 4)), Tensor("b", "float16", (8, 4)))),
    ],
)
def test_other_contents(other: Layout) -> None:
    assert contents(_layout(ROW, OTHER)) != contents(other)


def test_a_box_more_in_one_tensor_and_less_in_another_is_no_exchange() -> None:
    """What is summed up covers a row as a whole."""
    first = _layout(row(0, 0, 0, (0, 0), (4, 4), (8, 2)), row(1, 0, 0, (4, 0), (4, 4), (8, 2)))
    second = _layout(row(0, 0, 0, (4, 0), (4, 4), (8, 2)), row(1, 0, 0, (0, 0), (4, 4), (8, 2)))
    assert contents(first) != contents(second)
