"""Chunks, places and the size of a landing, worked out by hand."""

import numpy as np
import pytest
from layouts import Builder, engine_rank
from weightsync.orchestrator.protocol.landing import (
    PIECE_ALIGNMENT,
    PIECES_PER_ROW,
    SPARE_BYTES,
    Berth,
    arena_bytes,
    chunk_bytes,
    landed,
    landed_layout,
    landing_length,
)
from weightsync.orchestrator.protocol.layout import (
    COPY_BOX,
    COPY_COLUMNS,
    COPY_PEER,
    COPY_REMOTE,
    COPY_ROW,
    COPY_STAGED,
    Layout,
    Note,
    Region,
    Tensor,
    contents,
    row,
)


@pytest.mark.parametrize(
    ("length", "memory", "expected"),
    [
        (1 << 30, "VRAM", 128 << 20),
        (2 << 30, "VRAM", 256 << 20),
        (64 << 20, "VRAM", 8 << 20),
        (64 << 20, "DRAM", 8 << 20),
        (1 << 30, "DRAM", 8 << 20),
        (8191, "DRAM", 768),
        (600, "DRAM", 256),
        (256, "DRAM", 256),
        (255, "DRAM", 0),
        (0, "DRAM", 0),
    ],
)
def test_a_ring_has_eight_chunks_or_more(length, memory, expected):
    assert chunk_bytes(Region(4096, length, memory)) == expected


def test_a_berth_is_gone_through_again_and_again():
    berth = Berth(region=3, offset=512, chunk_bytes=256, places=3, bytes=1025)
    assert (berth.chunks, berth.wraps, berth.end) == (5, True, 512 + 768)
    assert [berth.place(chunk) for chunk in range(5)] == [512, 768, 1024, 512, 768]
    whole = Berth(region=3, offset=512, chunk_bytes=256, places=5, bytes=1025)
    assert (whole.wraps, whole.end) == (False, 512 + 1025)


def test_an_arena_takes_all_rows_and_the_padding_of_their_pieces():
    tensors = (Tensor("a", "float32", (100,)), Tensor("b", "uint8", (10, 10)))
    boxes = [(0, 0, (0,), (100,), (4,)), (1, 400, (2, 0), (8, 10), (10, 1)), (1, 500, (0, 0), (0, 10), (10, 1))]
    rows = [row(tensor, 0, offset, low, extent, stride) for tensor, offset, low, extent, stride in boxes]
    layout = Layout(tensors, (Region(0, 1000),), np.array(rows, "<i8").tobytes())
    exact = 480 + 3 * PIECES_PER_ROW * PIECE_ALIGNMENT + 480 // 64 + SPARE_BYTES
    assert arena_bytes(layout) == -(-exact // 256) * 256
    assert arena_bytes(Layout((), (), b"")) == SPARE_BYTES
    assert landing_length(layout) == 0
    assert landing_length(Builder(engine_rank("e"), 600).party().layout) == 600


def test_places_in_a_landing_are_those_of_edges_that_land_as_a_whole():
    copies = np.zeros((4, COPY_COLUMNS), np.int64)
    copies[:, COPY_PEER], copies[:, COPY_STAGED] = [0, 1, 0, 2], [0, 0, 64, 32]
    whole, again = Berth(3, 4096, 256, 8, 2048), Berth(3, 8192, 256, 8, 2048, passes=True)
    found = landed(copies, [whole, again, Berth(3, 0, 256, 1, 64)])
    assert found[:, [COPY_PEER, COPY_STAGED]].tolist() == [[0, 4096], [0, 4160], [2, 32]]
    assert copies[0, COPY_STAGED] == 0
    assert landed(copies[:0], []).shape == (0, COPY_COLUMNS)


def copy(of: int, staged: int, *box: tuple[int, int]) -> list[int]:
    """Of row ``of``, at ``staged``; ``box``: offset and extent per dimension."""
    made = np.zeros(COPY_COLUMNS, np.int64)
    made[COPY_ROW], made[COPY_STAGED] = of, staged
    dims = [(0, 1)] * ((COPY_REMOTE - COPY_BOX) // 2 - len(box)) + list(box)
    made[COPY_BOX:COPY_REMOTE] = np.array(dims).ravel()
    return made.tolist()


def test_what_has_landed_is_a_layout_of_the_same_tensors_by_the_boxes_that_came():
    """A transposed matrix of 4 × 6 in two pieces, one row behind the other, and a vector."""
    regions = (Region(1 << 20, 4096), Region(1 << 21, 1024))
    rows = [row(0, 0, 0, (0, 0), (4, 6), (2, 8)), row(1, 0, 2048, (0,), (5,), (4,))]
    live = Layout(
        (Tensor("w", "bfloat16", (4, 6)), Tensor("b", "float32", (5,))),
        regions,
        np.array(rows, "<i8").tobytes(),
        staging=1,
        notes=(Note(0, 1, "sharded", "why"),),
        lands="copy",
    )
    copies = [copy(0, 64, (0, 4), (0, 2)), copy(0, 128, (0, 4), (2, 4)), copy(1, 256, (0, 5))]
    found = landed_layout(live, np.array(copies, np.int64))
    told = found.matrix()
    assert told[:, :3].tolist() == [[0, 1, 64], [0, 1, 128], [1, 1, 256]]
    assert told[:2, -6:].tolist() == [[0, 4, 4, 0, 2, 2], [0, 4, 8, 2, 4, 2]], "offset, extent and stride"
    assert told[2, -3:].tolist() == [0, 5, 4]
    assert (found.tensors, found.regions, found.staging, found.notes, found.lands) == (
        live.tensors, regions, -1, (), "copy"
    )  # fmt: skip
    assert contents(found) != contents(live), "it is cut otherwise"
