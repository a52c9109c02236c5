"""Arenas and reachability on a machine without CUDA: real host memory, and doubles of CUDA's two libraries."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from weightsync.agents.memory import arena, cuda, pool, preload, reach
from weightsync.agents.memory.errors import MemoryPlacementError
from weightsync.agents.transport.nixl.regions import check_regions
from weightsync.orchestrator.protocol.layout import Region


class Call:
    """A foreign function in a library double: takes ``argtypes`` as ctypes functions do."""

    def __init__(self, body: Callable[..., int]) -> None:
        self.body = body
        self.argtypes: list[Any] = []

    def __call__(self, *arguments: Any) -> int:
        return self.body(*arguments)


DEVICES = 8


class FakeCudart(SimpleNamespace):
    """libcudart with ``room`` bytes per device, the current device, and a log of what was asked."""

    def __init__(self, room: int = 1 << 40) -> None:
        super().__init__()
        self.room, self.device, self.log, self.bound = room, 0, [], []
        self.cudaMalloc = Call(self._malloc)
        self.cudaFree = Call(lambda address: self._note("free", address))
        self.cudaGetDevice = Call(self._get)
        self.cudaSetDevice = Call(self._set)
        self.cudaHostRegister = Call(lambda address, size, flags: self._note("pin", address, size))
        self.cudaHostUnregister = Call(lambda address: self._note("unpin", address))

    def _note(self, what: str, *facts: int) -> int:
        self.log.append((what, self.device, *facts))
        return 0

    def _malloc(self, out: Any, size: int) -> int:
        if size > self.room:
            return 2
        out._obj.value = 0x7F0000000000 + self.device
        return self._note("malloc", size)

    def _get(self, out: Any) -> int:
        out._obj.value = self.device
        return 0

    def _set(self, device: int) -> int:
        if device >= DEVICES:
            return 101
        self.device = device
        self.bound.append(device)
        return 0


# --------------------------------------------------------------------------------------------------------- arenas
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
    monkeypatch.setattr(arena, "Runtime", lambda: cuda.Runtime(library))  # type: ignore[arg-type]
    memory = arena.host_arena(8192, pin=True)
    address = memory.data_ptr()
    del memory
    gc.collect()
    assert library.log == [("pin", 0, address, 8192), ("unpin", 0, address)]


def test_memory_that_cannot_be_pinned_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeCudart()
    library.cudaHostRegister = Call(lambda address, size, flags: 2)
    monkeypatch.setattr(arena, "Runtime", lambda: cuda.Runtime(library))  # type: ignore[arg-type]
    with pytest.raises(MemoryPlacementError, match="ulimit -l"):
        arena.host_arena(8192, pin=True)


@pytest.mark.parametrize("size", [0, -1, 1 << 62])
def test_an_impossible_size_is_an_error(size: int) -> None:
    with pytest.raises(MemoryPlacementError, match=str(size)):
        arena.host_arena(size)


def test_a_strided_tensor_is_no_region() -> None:
    with pytest.raises(MemoryPlacementError, match="no range"):
        arena.region_of(torch.zeros(4, 4)[:, :2])


def test_a_device_arena_without_cuda_says_so() -> None:
    if torch.cuda.is_available():
        assert arena.arena(1024, torch.device("cuda")).is_cuda
        return
    with pytest.raises(MemoryPlacementError, match="torch sees none"):
        arena.arena(1024, torch.device("cuda", 0))


# ---------------------------------------------------------------------------------------------------------- threads
def test_a_thread_is_bound_also_to_the_device_that_is_current() -> None:
    """A new thread says that device 0 is current and has no context of it."""
    library = FakeCudart()
    cuda.Runtime(library).bind(0)  # type: ignore[arg-type]
    assert library.bound == [0]


def test_a_device_that_is_not_there_cannot_be_bound() -> None:
    with pytest.raises(MemoryPlacementError, match=f"device {DEVICES} cannot be used"):
        cuda.Runtime(FakeCudart()).bind(DEVICES)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ plain allocations
def test_torch_can_call_the_allocator_as_c_functions() -> None:
    """Through the integers that torch gets: allocation on the asked device, the current one put back, and freeing."""
    library = FakeCudart()
    library.device = 3
    plain = pool.PlainAllocator(cuda.Runtime(library))  # type: ignore[arg-type]
    allocate = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)(
        plain.allocate_pointer
    )
    free = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)(plain.free_pointer)
    address = allocate(4096, 1, None)
    assert address == 0x7F0000000001
    free(address, 4096, 1, None)
    free(None, 0, 1, None)
    assert library.log == [("malloc", 1, 4096), ("free", 1, address)]
    assert library.device == 3


def test_no_room_is_a_null_pointer() -> None:
    plain = pool.PlainAllocator(cuda.Runtime(FakeCudart(room=100)))  # type: ignore[arg-type]
    allocate = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)(
        plain.allocate_pointer
    )
    assert allocate(4096, 0, None) is None


def test_without_libcudart_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preload, "cudart", lambda: None)
    with pytest.raises(MemoryPlacementError, match="CUDA build of torch"):
        cuda.Runtime()


# ---------------------------------------------------------------------------------------------------- reachability
def driver_with(facts: dict[int, int], answer: int = 0) -> Any:
    """A libcuda whose pointer attributes are ``facts``."""

    def query(out: Any, attribute: int, address: int) -> int:
        out._obj.value = facts.get(attribute, 0)
        return answer

    return SimpleNamespace(cuPointerGetAttribute=Call(query))


def look_with(facts: dict[int, int], answer: int = 0) -> Callable[[int], cuda.Pointer]:
    library = driver_with(facts, answer)
    return lambda address: cuda.Pointer(address, library)


PLAIN = {2: 2, 10: 1, 11: 1 << 40, 12: 4096}
"""Device memory of 4096 bytes at 1 << 40 that legacy IPC can export."""


def test_plain_device_memory_passes_and_host_memory_is_not_asked_about() -> None:
    reach.check_reachable([Region(1 << 40, 4096, "VRAM"), Region((1 << 40) + 96, 4000, "VRAM")], look_with(PLAIN))
    reach.check_reachable([Region(4096, 4096)], look_with({}, answer=1))


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (PLAIN | {10: 0}, "expandable_segments"),
        (PLAIN | {2: 1}, "host or managed"),
        (PLAIN | {12: 4095}, "leaves it"),
        (PLAIN | {11: (1 << 40) + 1}, "leaves it"),
    ],
)
def test_memory_out_of_reach_is_refused_with_the_reason(facts: dict[int, int], words: str) -> None:
    with pytest.raises(MemoryPlacementError, match=words):
        reach.check_reachable([Region(1 << 40, 4096, "VRAM", 1)], look_with(facts))


def test_an_address_that_cuda_does_not_know_is_refused() -> None:
    with pytest.raises(MemoryPlacementError, match="no CUDA address"):
        reach.check_reachable([Region(1 << 40, 4096, "VRAM")], look_with(PLAIN, answer=1))


def test_without_a_driver_there_is_no_device_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "driver", lambda: None)
    with pytest.raises(MemoryPlacementError, match=r"libcuda\.so\.1"):
        reach.check_reachable([Region(1 << 40, 4096, "VRAM")])
    assert not cuda.dma_buf_supported(0)


def test_a_nic_needs_peer_memory_or_dma_buf(tmp_path: Path) -> None:
    assert "nvidia_peermem" in (reach.why_not_by_nic(0, tmp_path, lambda device: False) or "")
    assert reach.why_not_by_nic(0, tmp_path, lambda device: True) is None
    (tmp_path / "nvidia_peermem").mkdir()
    assert reach.why_not_by_nic(0, tmp_path, lambda device: False) is None
