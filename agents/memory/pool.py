"""A torch memory pool of plain cudaMalloc memory, beside a caching allocator that may use expandable segments.

Memory of expandable segments cannot be exported to another process or pinned by a NIC: NIXL then copies through the
host at 0.4 GB/s without a word, or fails at the first write. Arenas from here are ordinary, and torch's memory
statistics see them. The allocator is two ctypes callbacks; torch takes them as function pointers, so that no compiler
is needed.
"""

import ctypes
import functools
import sys
from typing import Any

import torch
from weightsync.agents.memory.cuda import Runtime
from weightsync.agents.memory.errors import MemoryPlacementError

_Allocate = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
_Free = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
"""The signatures of torch's pluggable allocator: (size, device, stream) and (pointer, size, device, stream)."""


class PlainAllocator:
    """The pair of C functions, as integers that torch accepts.

    They take the GIL. torch calls them with its allocator's lock held and the GIL released, so another thread that
    holds the GIL while it waits for that lock (``torch.cuda.memory_stats``) would wait for ever: allocate arenas at
    start, on the main thread.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._allocate = _Allocate(self._on_allocate)
        self._free = _Free(self._on_free)
        self.allocate_pointer: int = ctypes.cast(self._allocate, ctypes.c_void_p).value or 0
        self.free_pointer: int = ctypes.cast(self._free, ctypes.c_void_p).value or 0

    def _on_allocate(self, size: int, device: int, stream: int | None) -> int | None:
        return self._runtime.malloc(size, device)

    def _on_free(self, address: int | None, size: int, device: int, stream: int | None) -> None:
        if address and not sys.is_finalizing():
            self._runtime.free(address, device)


@functools.cache
def plain_pool() -> Any:
    """This process's ``torch.cuda.MemPool`` of cudaMalloc memory. It lives as long as the process.

    Raises:
        MemoryPlacementError: no CUDA, no libcudart, or a torch without pluggable pools.
    """
    if not torch.cuda.is_available():
        raise MemoryPlacementError("device arenas need a CUDA device, and torch sees none")
    custom = getattr(torch._C, "_cuda_customAllocator", None)
    if custom is None or not hasattr(torch.cuda, "MemPool"):
        raise MemoryPlacementError(
            f"torch {torch.__version__} has no memory pools over a custom allocator (they came with 2.6); without them"
            " arenas are plain only if PYTORCH_CUDA_ALLOC_CONF has no expandable_segments:True"
        )
    allocator = PlainAllocator(Runtime())
    handle = custom(allocator.allocate_pointer, allocator.free_pointer)
    pool = torch.cuda.MemPool(handle)
    for kept in (allocator, handle, pool):
        # torch may call the functions while the interpreter is taken down; what never dies cannot be called dead.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
    return pool


def device_arena(size: int, device: torch.device) -> torch.Tensor:
    """``size`` bytes (uint8) of plain device memory, uninitialised. Freeing the tensor returns it to the pool.

    Raises:
        MemoryPlacementError: as for ``plain_pool``, or there is no room.
    """
    pool = plain_pool()
    try:
        with torch.cuda.use_mem_pool(pool, device):
            return torch.empty(size, dtype=torch.uint8, device=device)
    except torch.cuda.OutOfMemoryError as error:
        raise MemoryPlacementError(f"no room for an arena of {size} bytes on {device}: {error}") from error
