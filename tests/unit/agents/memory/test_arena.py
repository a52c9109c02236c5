"""Arenas: real host memory, and a double of CUDA's runtime."""

import gc
from typing import Any

import pytest
import torch
from cuda_doubles import Call, FakeCudart
from weightsync.agents.memory import arena, cuda
from weightsync.agents.memory.errors import MemoryPlacementError
from weightsync.agents.transport.nixl.regions import check_regions
from weightsync.orchestrator.protocol.layout import Region

BLOCK = arena.BLOCK_BYTES


def test_a_host_arena_is_exact_aligned_zero_and_registrable() -> None:
    memory = arena.arena(10_001, torch.device("cpu"))
    assert (memory.dtype, memory.numel()) == (torch.uint8, 10_001)
    assert memory.data_ptr() % 4096 == 0
    assert int(memory.sum()) == 0
    memory.fill_(7)
    region = arena.region_of(memory)
    assert region == Region(memory.data_ptr(), 10_001)
    check_regions([region])


def test_views_keep_a_host_arena_alive() -> None:
    view = arena.host_arena(1 << 20, pin=False)[4096:8192].view(torch.int32)
    gc.collect()
    view.fill_(3)
    assert int(view.sum()) == 3 * 1024


def test_a_pinned_arena_is_unpinned_before_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeCudart()
    monkeypatch.setattr(arena, "Runtime", lambda: cuda.Runtime(library, library.on))  # type: ignore[arg-type]
    memory = arena.host_arena(8192, pin=True)
    address = memory.data_ptr()
    del memory
    gc.collect()
    assert library.log == [("pin", 0, address, 8192), ("unpin", 0, address)]


def test_memory_that_cannot_be_pinned_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeCudart()
    library.cudaHostRegister = Call(lambda address, size, flags: 2)
    monkeypatch.setattr(arena, "Runtime", lambda: cuda.Runtime(library, library.on))  # type: ignore[arg-type]
    with pytest.raises(MemoryPlacementError, match="ulimit -l"):
        arena.host_arena(8192, pin=True)


@pytest.mark.parametrize("size", [0, -1, 1 << 62])
def test_an_impossible_size_is_an_error(size: int) -> None:
    with pytest.raises(MemoryPlacementError, match=str(size)):
        arena.host_arena(size)


def test_a_strided_tensor_is_no_region() -> None:
    with pytest.raises(MemoryPlacementError, match="no range"):
        arena.region_of(torch.zeros(4, 4)[:, :2])


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> FakeCudart:
    """A GPU with room for a block; what torch makes of its memory is the object that holds it."""
    library = FakeCudart(room=BLOCK)
    monkeypatch.setattr(arena, "Runtime", lambda: cuda.Runtime(library, library.on))  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: library.log.append(("empty torch's cache",)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 100))
    monkeypatch.setattr(torch, "as_tensor", lambda memory, device: memory)
    return library


def test_a_device_arena_is_freed_with_its_last_tensor(cudart: FakeCudart) -> None:
    memory: Any = arena.device_arena(BLOCK, torch.device("cuda", 1))
    address = 0x7F0000000001
    assert memory.__cuda_array_interface__["data"] == (address, False)
    assert cudart.log == [("malloc", 1, BLOCK)]
    del memory
    gc.collect()
    assert cudart.log == [("malloc", 1, BLOCK), ("free", 1, address)]
    assert cudart.device == 0, "the current device is the caller's"


@pytest.mark.parametrize("size", [1, 2048, BLOCK - 1])
def test_a_device_arena_shares_no_block_with_other_memory(cudart: FakeCudart, size: int) -> None:
    """CUDA cuts less from a block that has others' memory in it; ``tests/gpu/test_memory.py`` asks the driver."""
    memory: Any = arena.device_arena(size, torch.device("cuda", 1))
    assert memory.__cuda_array_interface__["shape"] == (size,)
    assert cudart.log == [("malloc", 1, BLOCK)]


def test_without_room_torch_gives_back_what_it_has_cached_before_an_arena_is_refused(cudart: FakeCudart) -> None:
    with pytest.raises(MemoryPlacementError, match=f"{BLOCK + 1} bytes on cuda:1, where 60 are free"):
        arena.device_arena(BLOCK + 1, torch.device("cuda", 1))
    assert cudart.log == [("forget the error", 0), ("empty torch's cache",), ("forget the error", 0)]


def test_a_device_arena_of_nothing_is_an_error(cudart: FakeCudart) -> None:
    with pytest.raises(MemoryPlacementError, match="0 bytes"):
        arena.device_arena(0, torch.device("cuda", 1))
    assert cudart.log == []


def test_a_device_arena_without_cuda_says_so() -> None:
    if torch.cuda.is_available():
        assert arena.arena(1024, torch.device("cuda")).is_cuda
        return
    with pytest.raises(MemoryPlacementError, match="torch sees none"):
        arena.arena(1024, torch.device("cuda", 0))
