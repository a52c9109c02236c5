"""Ranges and the flip, over real memory of this machine; and every place where a driver may refuse."""

import pytest
from dram_pages import PAGE, DramPages
from weightsync.agents.memory.errors import FlipFailed, PagesTorn
from weightsync.agents.memory.pages.driver import DriverError
from weightsync.agents.memory.pages.ranges import PageRange, PhysicalChunks, create_chunks, flip, release_chunks

SIZE = 5 * PAGE
"""In chunks of two pages: two whole ones and a smaller last one."""


def two_sets(memory: DramPages) -> tuple[PageRange, PageRange]:
    """Served: all bytes 1. Standby: all bytes 2."""
    ranges = []
    for value in (1, 2):
        made = PageRange(memory, SIZE)
        made.show(create_chunks(memory, SIZE, 2 * PAGE))
        memory.tensor(made.base, SIZE).fill_(value)
        ranges.append(made)
    memory.calls.clear()
    return ranges[0], ranges[1]


def value_at(memory: DramPages, pages: PageRange) -> int:
    """The one value of all bytes."""
    [value] = memory.tensor(pages.base, SIZE).unique().tolist()
    return int(value)


def test_chunks_are_exact_and_the_last_one_is_smaller() -> None:
    memory = DramPages()
    chunks = create_chunks(memory, SIZE, 2 * PAGE)
    assert [(chunk.offset, chunk.size) for chunk in chunks] == [(0, 2 * PAGE), (2 * PAGE, 2 * PAGE), (4 * PAGE, PAGE)]
    assert memory.room - memory.free() == SIZE
    release_chunks(memory, chunks)
    assert memory.free() == memory.room


def test_chunks_without_room_leave_nothing_behind() -> None:
    memory = DramPages(room=SIZE - 1)
    with pytest.raises(DriverError, match="OUT_OF_MEMORY"):
        create_chunks(memory, SIZE, 2 * PAGE)
    assert memory.free() == memory.room


def test_a_flip_shows_the_other_set_at_the_same_addresses_and_again_the_first() -> None:
    memory = DramPages()
    live, standby = two_sets(memory)
    served = memory.tensor(live.base, SIZE)
    standby.show(flip(memory, live, standby))
    assert (set(served.tolist()), value_at(memory, standby)) == ({2}, 1)
    standby.show(flip(memory, live, standby))
    assert (set(served.tolist()), value_at(memory, standby)) == ({1}, 2)


def test_the_device_is_idle_before_anything_is_unmapped_and_standby_is_left_for_later() -> None:
    memory = DramPages()
    flip(memory, *two_sets(memory))
    assert memory.calls == ["synchronise", *["unmap"] * 3, *["map"] * 3, "allow"]


def test_a_closed_range_gives_its_addresses_back_and_its_chunks_can_be_released() -> None:
    memory = DramPages()
    for pages in two_sets(memory):
        chunks = pages.chunks
        assert chunks is not None
        pages.close()
        release_chunks(memory, chunks)
    assert (memory.mapped, memory.reserved, memory.free()) == ({}, {}, memory.room)


CALLS = 8
"""Of one flip: the wait, three unmaps, three maps and the access."""


@pytest.mark.parametrize("failing", range(CALLS))
def test_a_refusal_at_any_call_leaves_both_sets_where_they_were(failing: int) -> None:
    memory = DramPages()
    live, standby = two_sets(memory)
    memory.refuse = lambda number, name: number == failing
    error = DriverError if failing == 0 else FlipFailed
    with pytest.raises(error, match="CUDA_ERROR_UNKNOWN"):
        flip(memory, live, standby)
    assert (value_at(memory, live), value_at(memory, standby)) == (1, 2)
    standby.show(flip(memory, live, standby))
    assert (value_at(memory, live), value_at(memory, standby)) == (2, 1)


@pytest.mark.parametrize("failing", range(2, CALLS))
def test_a_refusal_of_the_way_back_too_tears_what_is_served_for_good(failing: int) -> None:
    """From some call on nothing works any more."""
    memory = DramPages()
    live, standby = two_sets(memory)
    memory.refuse = lambda number, name: number >= failing
    with pytest.raises(PagesTorn, match="and so did the way back"):
        flip(memory, live, standby)
    memory.refuse = lambda number, name: False
    with pytest.raises(PagesTorn, match="restart the engine"):
        flip(memory, live, standby)


def test_a_driver_that_does_nothing_any_more_has_changed_nothing() -> None:
    memory = DramPages()
    live, standby = two_sets(memory)
    memory.refuse = lambda number, name: number >= 1
    with pytest.raises(FlipFailed, match="as it was"):
        flip(memory, live, standby)
    assert (value_at(memory, live), value_at(memory, standby)) == (1, 2)


def test_showing_what_is_shown_does_nothing() -> None:
    memory = DramPages()
    live, _ = two_sets(memory)
    shown: PhysicalChunks | None = live.chunks
    assert shown is not None
    live.show(shown)
    assert memory.calls == []
