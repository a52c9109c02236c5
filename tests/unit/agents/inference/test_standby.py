"""Standby pages of a layout: what rounds write lands there, and what they do not write is carried at a flip."""

import numpy as np
import torch
from dram_pages import PAGE, DramPages
from weightsync.agents.inference.standby import StandbyPages, unwritten
from weightsync.agents.memory.pages.paged import PagedMemory
from weightsync.agents.memory.pages.ranges import PageRange
from weightsync.kernels.columns import COUNTS, DST_OFFSET, DST_REGION, RUN_BYTES, SRC_OFFSET, SRC_REGION
from weightsync.orchestrator.protocol.layout import Layout, Region, Tensor, row

TENSORS = (Tensor("a", "uint8", (100,)), Tensor("b", "uint8", (4, 8)))


def layout(rows: list[list[int]], *regions: int) -> Layout:
    table = np.array(rows, dtype="<i8")
    return Layout(
        tensors=TENSORS,
        regions=tuple(Region(PAGE * (1 + index), length) for index, length in enumerate(regions)),
        rows=table.tobytes(),
    )


def gaps(of: Layout) -> list[tuple[int, int, int]]:
    """Region, offset and length of what no row writes."""
    table = unwritten(of)
    assert (table[:, list(COUNTS)] == 1).all()
    assert (table[:, [SRC_REGION, SRC_OFFSET]] == table[:, [DST_REGION, DST_OFFSET]]).all()
    return [tuple(map(int, line)) for line in table[:, [SRC_REGION, SRC_OFFSET, RUN_BYTES]]]


def test_a_region_that_rows_fill_has_nothing_to_carry() -> None:
    assert gaps(layout([row(0, 0, 0, (0,), (60,), (1,)), row(0, 0, 60, (60,), (40,), (1,))], 100)) == []


def test_bytes_in_front_of_rows_between_and_behind_them_are_carried() -> None:
    rows = [row(0, 0, 5, (0,), (60,), (1,)), row(0, 0, 70, (60,), (40,), (1,))]
    assert gaps(layout(rows, 128)) == [(0, 0, 5), (0, 65, 5), (0, 110, 18)]


def test_the_padding_of_a_strided_row_is_carried_and_each_region_ends_for_itself() -> None:
    rows = [row(1, 1, 0, (0, 0), (4, 8), (16, 1)), row(0, 0, 0, (0,), (100,), (1,))]
    assert gaps(layout(rows, 100, 64)) == [(1, 8, 8), (1, 24, 8), (1, 40, 8), (1, 56, 8)]


def test_a_region_that_no_row_reaches_is_carried_whole() -> None:
    assert gaps(layout([row(0, 1, 0, (0,), (100,), (1,))], 30, 100)) == [(0, 0, 30)]


def test_a_flip_serves_what_landed_and_keeps_what_the_engine_has_in_between() -> None:
    memory = DramPages()
    live, standby = PageRange(memory, PAGE), PageRange(memory, PAGE)
    live.fill(PAGE)
    standby.fill(PAGE)
    served = memory.tensor(live.base, PAGE)[:64]
    rows = layout([row(1, 0, 0, (0, 0), (4, 8), (16, 1))], 64)
    pages = StandbyPages(PagedMemory(memory, live, standby), rows, [served])
    assert pages.carried_bytes == 32
    weights = slice(None), slice(0, 8)
    served.view(4, 16)[weights] = 1
    served.view(4, 16)[:, 8:] = 7  # the engine's own
    pages.tensors[0].view(4, 16)[weights] = 2
    pages.flip()
    assert served.view(4, 16).tolist() == [[2] * 8 + [7] * 8] * 4
    served.view(4, 16)[:, 8:] = 9
    pages.flip()
    pages.settle()
    assert served.view(4, 16).tolist() == [[1] * 8 + [9] * 8] * 4
    assert torch.equal(pages.tensors[0].view(4, 16)[weights], torch.full((4, 8), 2, dtype=torch.uint8))
