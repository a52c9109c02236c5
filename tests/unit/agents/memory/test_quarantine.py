"""Memory that a late writer may reach keeps its addresses, gives its pages back, and is nobody's."""

import mmap
from pathlib import Path

import pytest
import torch
from weightsync.agents.memory import quarantine as module
from weightsync.agents.memory.arena import host_arena
from weightsync.agents.memory.errors import MemoryPlacementError
from weightsync.agents.memory.quarantine import MOST, keep, quarantine, room, spare

SIZE = 8 << 20


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Of this test alone."""
    memory: list[torch.Tensor] = []
    monkeypatch.setattr(module, "_kept", memory)
    return memory


def resident(address: int) -> int:
    """KiB of the mapping that holds ``address``."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(maxsplit=1)[0]
        if "-" in head:
            low, high = (int(part, 16) for part in head.split("-"))
            inside = low <= address < high
        elif inside and head == "Rss:":
            return int(line.split()[1])
    raise AssertionError(f"nothing is mapped at {address:#x}")


def test_its_pages_go_back_and_its_addresses_stay() -> None:
    memory = host_arena(SIZE)
    memory.fill_(7)
    address, before = memory.data_ptr(), resident(memory.data_ptr())
    quarantine(memory)
    assert resident(address) <= before - SIZE // 1024
    assert not memory.any(), "whoever reads it for all that reads zeros, and is not ended"
    memory[5] = 9  # a late writer
    del memory
    others = [host_arena(SIZE) for _ in range(8)]
    assert all(not other.any() for other in others)
    assert not any(other.data_ptr() <= address < other.data_ptr() + SIZE for other in others)


def test_there_is_an_end() -> None:
    assert room() == MOST
    for _ in range(MOST):
        quarantine(host_arena(mmap.PAGESIZE))
    assert room() == 0
    with pytest.raises(MemoryPlacementError, match=f"{MOST} arenas can"):
        quarantine(host_arena(mmap.PAGESIZE))


def test_what_begins_within_a_page_has_neighbours_in_it(kept: list[torch.Tensor]) -> None:
    with pytest.raises(MemoryPlacementError, match="cannot be quarantined"):
        quarantine(host_arena(mmap.PAGESIZE)[8:])
    assert kept == []


def test_a_gpus_memory_is_quarantined_wherever_it_begins(kept: list[torch.Tensor]) -> None:
    """Refused, it would be freed for others while a late writer reaches it."""

    class OnDevice(torch.Tensor):
        is_cuda = True

    memory = host_arena(mmap.PAGESIZE).fill_(7)[512:].as_subclass(OnDevice)
    quarantine(memory)
    assert len(kept) == 1
    assert kept[0] is memory
    assert memory.as_subclass(torch.Tensor).eq(7).all(), "its pages are no host's to give back"


def test_a_word_stays_mapped() -> None:
    word = mmap.mmap(-1, mmap.PAGESIZE)
    address = torch.frombuffer(word, dtype=torch.uint8).data_ptr()
    keep(word)
    del word
    assert resident(address) >= 0


def test_a_spare_of_host_memory_is_an_arena_of_that_size() -> None:
    assert (memory := spare(SIZE, torch.device("cpu"))).numel() == SIZE
    assert memory.data_ptr() % mmap.PAGESIZE == 0


@pytest.mark.parametrize("free", [SIZE, 2 * SIZE - 1, 2 * SIZE])
def test_a_spare_of_a_gpus_memory_leaves_as_much_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """``tests/gpu/test_late_writers.py`` has it on a GPU."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 100 * SIZE))
    monkeypatch.setattr(module, "arena", lambda size, device: torch.empty(size, device="meta"))
    if free < 2 * SIZE:
        with pytest.raises(MemoryPlacementError, match=f"more than half of the {free} that are free on cuda:0"):
            spare(SIZE, torch.device("cuda", 0))
    else:
        assert spare(SIZE, torch.device("cuda", 0)).numel() == SIZE
