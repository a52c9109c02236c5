"""Arenas: the few large allocations that slots, targets and staging buffers are cut from.

One registration per tensor costs seconds for a large model, one per arena a fraction of a millisecond.
"""

import contextlib
import mmap
import sys
from typing import Final

import torch
from weightsync.agents.memory.cuda import DeviceBytes, Runtime
from weightsync.agents.memory.errors import MemoryPlacementError
from weightsync.orchestrator.protocol.layout import Region

ALIGNMENT: Final = 256
"""Of every tensor within an arena, in bytes: what cudaMalloc gives, and enough for any vector load or NIC."""

BLOCK_BYTES: Final = 2 << 20
"""What is taken of a device at a time. CUDA cuts smaller allocations from blocks of this size, and another process that
maps one of them by cuda_ipc maps all of its block, with what else lies there."""


class _DeviceMemory(DeviceBytes):
    """Memory of cudaMalloc's that is freed with the last tensor of it."""

    def __init__(self, runtime: Runtime, address: int, size: int, device: int) -> None:
        super().__init__(address, size)
        self._given = runtime, address, device

    def __del__(self) -> None:
        runtime, address, device = self._given
        if not sys.is_finalizing():
            runtime.free(address, device)


class _HostMapping(mmap.mmap):
    """Anonymous pages that are unpinned before they are unmapped."""

    pinned_at = 0

    def __del__(self) -> None:
        if self.pinned_at and not sys.is_finalizing():
            Runtime().unpin(self.pinned_at)


def arena(size: int, device: torch.device) -> torch.Tensor:
    """``size`` bytes (uint8) on ``device``: pinned host memory for the CPU, plain memory for a GPU.

    Raises:
        MemoryPlacementError: there is no room, or no way to plain memory.
    """
    if device.type == "cuda":
        return device_arena(size, device)
    return host_arena(size)


def device_arena(size: int, device: torch.device) -> torch.Tensor:
    """``size`` bytes (uint8) of plain device memory, uninitialised; freed with the last tensor of it. No other memory
    is in its blocks (BLOCK_BYTES), at whose border it begins.

    Not torch's: memory of its expandable segments cannot be exported to another process or pinned by a NIC (NIXL then
    copies through the host at 0.4 GB/s without a word, or fails at the first write), and vLLM's budget for its KV cache
    (0.24) does not see what torch was asked for between loading and profiling.

    Raises:
        MemoryPlacementError: no CUDA, no libcudart, or there is no room.
    """
    if size < 1:
        raise MemoryPlacementError(f"an arena of {size} bytes")
    if not torch.cuda.is_available():
        raise MemoryPlacementError("device arenas need a CUDA device, and torch sees none")
    runtime, number = Runtime(), device.index if device.index is not None else torch.cuda.current_device()
    taken = -(-size // BLOCK_BYTES) * BLOCK_BYTES
    address = runtime.malloc(taken, number)
    if address is None:
        torch.cuda.empty_cache()  # what torch has cached for later
        address = runtime.malloc(taken, number)
    if address is None:
        free = torch.cuda.mem_get_info(number)[0]
        raise MemoryPlacementError(f"no room for an arena of {size} bytes on cuda:{number}, where {free} are free")
    return torch.as_tensor(_DeviceMemory(runtime, address, size, number), device=torch.device("cuda", number))


def host_arena(size: int, *, pin: bool | None = None) -> torch.Tensor:
    """``size`` zero bytes (uint8) of page-aligned host memory, in huge pages where the system gives them.

    Args:
        size: bytes, at least 1. Exactly so many: torch's pinned allocator would round up to a power of two.
        pin: page-lock for CUDA copies; None: if there is a CUDA device.

    Raises:
        MemoryPlacementError: there is no room, or CUDA cannot pin it.
    """
    if size < 1:
        raise MemoryPlacementError(f"an arena of {size} bytes")
    try:
        mapping = _HostMapping(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise MemoryPlacementError(f"no room for a host arena of {size} bytes: {error}") from error
    with contextlib.suppress(OSError, AttributeError):  # an optimisation that kernels may lack
        mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    if torch.cuda.is_available() if pin is None else pin:
        _pin(mapping, memory)
    return memory


def region_of(memory: torch.Tensor) -> Region:
    """The contiguous tensor's memory as a region to register.

    Raises:
        MemoryPlacementError: it is not contiguous, so that its bytes are not one range.
    """
    if not memory.is_contiguous():
        raise MemoryPlacementError(f"a tensor of shape {tuple(memory.shape)} and strides {memory.stride()} is no range")
    on_device = memory.device.type != "cpu"
    return Region(
        base=memory.data_ptr(),
        length=memory.numel() * memory.element_size(),
        memory="VRAM" if on_device else "DRAM",
        device=(memory.device.index or 0) if on_device else 0,
    )


def _pin(mapping: _HostMapping, memory: torch.Tensor) -> None:
    address, size = memory.data_ptr(), memory.numel()
    failed = Runtime().pin(address, size)
    if failed:
        raise MemoryPlacementError(f"CUDA cannot pin {size} bytes of host memory (error {failed}); see ulimit -l")
    mapping.pinned_at = address
