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
    landing_length,
)
from weightsync.orchestrator.protocol.layout import Layout, Region, Tensor, row


@pytest.mark.parametrize(
    ("length", "memory", "expected"),
    [
        (1 << 30, "VRAM", 128 << 20),
        (2 << 30, "VRAM", 128 << 20),
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
