"""Boxes: their size, their place as an index, and whether two of them share an element."""

import numpy as np
import pytest
from weightsync.agents.tables.box import Box, with_entry


def test_a_box_is_a_range_per_dimension() -> None:
    box = Box((2, 1), (3, 4))
    assert (box.volume, box.end) == (12, (5, 5))
    assert np.arange(48).reshape(6, 8)[box.slices].tolist() == [
        [17, 18, 19, 20],
        [25, 26, 27, 28],
        [33, 34, 35, 36],
    ]
    assert Box.whole((6, 8)) == Box((0, 0), (6, 8))
    assert Box.whole(()).volume == 1, "a scalar"
    assert box.shifted(1, 3) == Box((2, 4), (3, 4))
    assert with_entry((1, 2, 3), 2, 9) == (1, 2, 9)


@pytest.mark.parametrize(
    ("other", "shared"),
    [
        (Box((4, 4), (1, 1)), True),
        (Box((5, 1), (1, 4)), False),
        (Box((2, 5), (3, 1)), False),
        (Box((0, 0), (6, 8)), True),
    ],
)
def test_neighbours_share_nothing(other: Box, shared: bool) -> None:
    box = Box((2, 1), (3, 4))
    assert box.overlaps(other) is other.overlaps(box) is shared
