"""Storages of torch moved into a range of addresses, without anybody who holds a tensor of them noticing.

``UntypedStorage.resize_`` takes new memory from torch's allocator, copies into it and changes the storage itself, so
that all of its views follow, in modules, helper objects and closures alike. While a pool of ours is in use, torch's
allocator asks two C functions for that memory; here they hand out the addresses of a reserved range one after another.
Torch would round and cache; so it is first asked for everything at once, which tells how many bytes must be mapped,
and then each storage takes the very place that was made for it.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, Final

import torch
from weightsync.agents.memory.errors import PagesUnavailable
from weightsync.agents.turns import no_collection

SEGMENT_BYTES: Final = 2 << 20
"""What torch's allocator asks for at least, and in multiples of (``kSmallBuffer``, ``kRoundLarge``)."""
SMALL_BYTES: Final = 1 << 20
"""Up to this size a request is cut from a segment of its own kind (``kSmallSize``)."""
BLOCK_BYTES: Final = 512
"""What it rounds each request up to (``kMinBlockSize``); storages begin at multiples of it."""

_Allocate = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
_Free = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
"""The signatures of torch's pluggable allocator: (size, device, stream) and (pointer, size, device, stream)."""


class PageAddresses:
    """The pair of C functions, as integers that torch accepts: addresses of a range, none of them twice.

    They take the GIL while torch holds its allocator's lock, so another thread that holds the GIL and waits for that
    lock (``torch.cuda.memory_stats``) would wait for ever: only for the main thread, while an engine starts, and while
    no garbage is collected, on whichever thread, of which tensors may be part.

    Attributes:
        used: bytes from ``base`` on that were handed out.
    """

    def __init__(self, base: int, span: int) -> None:
        self._base, self._span, self.used = base, span, 0
        self._allocate = _Allocate(self._on_allocate)
        self._free = _Free(lambda address, size, device, stream: None)
        self.allocate_pointer: int = ctypes.cast(self._allocate, ctypes.c_void_p).value or 0
        self.free_pointer: int = ctypes.cast(self._free, ctypes.c_void_p).value or 0

    def end(self) -> None:
        """Hand out no more: what lies behind is not mapped."""
        self._span = self.used

    def _on_allocate(self, size: int, device: int, stream: int | None) -> int | None:
        taken = _up(size, SEGMENT_BYTES)
        if self.used + taken > self._span:
            return None  # torch makes an OutOfMemoryError of it
        self.used += taken
        return self._base + self.used - taken


def span_of(sizes: Sequence[int]) -> int:
    """Addresses that storages of ``sizes`` bytes take at most, however small they are."""
    return sum(_up(size, SEGMENT_BYTES) for size in sizes)


class Relocation:
    """Storages on their way into a range of addresses; in two steps, between which memory is mapped to them.

    Args:
        storages: each once, none empty.
        addresses: where to.

    Attributes:
        used: bytes from the range's base on that have to be mapped before ``finish``.

    Raises:
        PagesUnavailable: a storage's memory is not torch's own, or a torch without such pools. Nothing has changed.
    """

    def __init__(
        self, storages: Sequence[torch.UntypedStorage], addresses: PageAddresses, device: torch.device
    ) -> None:
        for storage in storages:
            if not storage.resizable():
                raise PagesUnavailable(
                    f"{storage.nbytes()} bytes of weights at {storage.data_ptr():#x} are memory that torch has from"
                    " elsewhere (shared or mapped) and cannot be moved into pages; set WEIGHTSYNC_MODE=copy"
                )
        # The large ones first: torch then cuts them from what it was given for all of them, one after another.
        self._storages = sorted(storages, key=lambda storage: -storage.nbytes())
        self._device = device
        self._pool = _pool(addresses)
        large = sum(_up(s.nbytes(), BLOCK_BYTES) for s in self._storages if s.nbytes() > SMALL_BYTES)
        try:
            with no_collection(), torch.cuda.use_mem_pool(self._pool, device):
                if large:
                    self._room(large)
                self._places = [self._room(storage.nbytes()) for storage in self._storages]
        except torch.cuda.OutOfMemoryError as error:
            raise PagesUnavailable(
                "torch's allocator does not cut weights from one allocation; take options by which it does not"
                f" (max_split_size_mb, roundup_power2_divisions) out of PYTORCH_CUDA_ALLOC_CONF ({error})"
            ) from error
        addresses.end()
        self.used = addresses.used

    def cancel(self) -> None:
        """Forget the places; in place of ``finish``."""
        del self._places, self._pool

    def finish(self) -> None:
        """Copy every storage to its place; what it had goes back to torch. The pool lives as long as the process."""
        _never_dies(self._pool)
        with no_collection(), torch.cuda.use_mem_pool(self._pool, self._device):
            for storage in self._storages:
                del self._places[0]
                storage.resize_(storage.nbytes())

    def _room(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)


def _pool(addresses: PageAddresses) -> Any:
    """A pool of torch's over ``addresses``. Where it is given up, torch forgets what they gave it."""
    custom = getattr(torch._C, "_cuda_customAllocator", None)
    if custom is None or not hasattr(torch.cuda, "MemPool"):
        raise PagesUnavailable(
            f"torch {torch.__version__} has no memory pools over a custom allocator (they came with 2.6), which weights"
            " in pages need; set WEIGHTSYNC_MODE=copy"
        )
    handle = custom(addresses.allocate_pointer, addresses.free_pointer)
    for called in (addresses, handle):
        _never_dies(called)
    return torch.cuda.MemPool(handle)


def _never_dies(called: object) -> None:
    """Torch may call functions late, also while the interpreter is taken down; what never dies is not called dead."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(called))


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
