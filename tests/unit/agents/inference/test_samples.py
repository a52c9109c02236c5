"""Which bytes of a page are looked at to tell two sets of pages apart."""

import numpy as np
import pytest
import torch
from weightsync.agents.inference.samples import PAGE_BITS, SAMPLE_BYTES, Samples, sample_table
from weightsync.kernels.columns import (
    COLUMNS,
    COUNTS,
    DST_OFFSET,
    DST_REGION,
    RUN_BYTES,
    SRC_OFFSET,
    SRC_REGION,
    SRC_STRIDE,
)
from weightsync.orchestrator.protocol.layout import Matrix

PAGE = 1 << PAGE_BITS


def reads(*runs: tuple[int, int, int], count: int = 1, stride: int = 0) -> Matrix:
    """A kernel table that reads ``(region, offset, size)``, each ``count`` times."""
    table = np.zeros((len(runs), COLUMNS), np.int64)
    table[:, [SRC_REGION, SRC_OFFSET, RUN_BYTES]] = np.array(runs, np.int64).reshape(-1, 3)
    table[:, list(COUNTS)] = 1
    table[:, COUNTS[-1]], table[:, COUNTS[-1] + SRC_STRIDE] = count, stride
    return table


def looked_at(table: Matrix) -> list[tuple[int, int, int]]:
    """Region, offset and size of all that is."""
    found = []
    for line in sample_table(table):
        assert (line[[SRC_REGION, SRC_OFFSET]] == line[[DST_REGION, DST_OFFSET]]).all()
        stride = int(line[COUNTS[-1] + SRC_STRIDE])
        found += [
            (int(line[SRC_REGION]), int(line[SRC_OFFSET]) + piece * stride, int(line[RUN_BYTES]))
            for piece in range(line[COUNTS[-1]])
        ]
    return found


def test_every_page_of_a_long_run_is_looked_at() -> None:
    start = PAGE // 2
    expected = [(0, start + page * PAGE, SAMPLE_BYTES) for page in range(3)]
    assert looked_at(reads((0, start, 3 * PAGE))) == expected
    assert looked_at(reads((0, start, 2 * PAGE + SAMPLE_BYTES))) == expected
    assert looked_at(reads((0, start, 2 * PAGE + SAMPLE_BYTES - 1))) == expected[:2]


def test_of_many_short_runs_one_in_each_page_is() -> None:
    found = looked_at(reads((1, 64, 32), count=4 * PAGE // 1024, stride=1024))
    assert found == [(1, 64 + page * PAGE, 32) for page in range(4)]


def test_each_region_is_looked_at_and_one_without_weights_is_not() -> None:
    assert looked_at(reads((0, 0, 10), (0, 4096, 10), (2, 0, 10), (3, 5, 2000))) == [
        (0, 0, 10), (2, 0, 10), (3, 5, SAMPLE_BYTES),
    ]  # fmt: skip
    assert looked_at(reads()) == []


@pytest.mark.parametrize("page", [0, 1, 4])
def test_a_page_of_the_other_set_is_found(page: int) -> None:
    sets = [torch.full((5 * PAGE,), value, dtype=torch.uint8) for value in (1, 2)]
    samples = Samples(sets[:1], sets[1:], reads((0, 0, 5 * PAGE)))
    samples.take()
    assert samples.agree()
    samples.exchange()
    assert not samples.agree()
    sets[0].fill_(2)
    assert samples.agree()
    sets[0][page * PAGE : (page + 1) * PAGE] = 1
    assert not samples.agree()
