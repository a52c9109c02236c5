"""Weights in host memory, twice: a flip exchanges the pages beneath them by ``mremap``, in a time that hardly grows
with their size. Nothing moves: whatever computes by their addresses sees the other set.

Linux 5.7 or newer (``MREMAP_DONTUNMAP``), which keeps an address readable while its pages are elsewhere: a thread that
digests live memory during a flip reads zeros there, and what it finds is of a version that is served no more.
"""

import ctypes
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from weightsync.agents.memory.errors import FlipFailed, PagesTorn, PagesUnavailable

PAGE: Final = mmap.PAGESIZE

TABLE_BYTES: Final = 2 << 20
"""What one page table maps. The kernel moves whole tables where both ends of a move begin alike within one."""

LEAST_BYTES: Final = 256 << 10
"""Of memory whose pages are exchanged; copying less takes no longer than the calls."""

# linux/mman.h
_MAYMOVE, _FIXED, _DONTUNMAP = 1, 2, 4
_NORESERVE: Final = 0x4000
_FAILED: Final = ctypes.c_void_p(-1).value


def _mremap() -> Any:
    call = ctypes.CDLL(None, use_errno=True).mremap
    call.restype = ctypes.c_void_p
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    return call


@dataclass(frozen=True, slots=True)
class _PageTrade:
    """``size`` bytes in whole pages at two addresses, and a third to which they go meanwhile."""

    live: int
    standby: int
    between: int
    size: int


class HostPages:
    """Memory on the CPU, and as much again; ``paged.Pages`` of it.

    Args:
        tensors: contiguous, uint8, apart from each other.

    Attributes:
        bytes: in both sets together.

    Raises:
        PagesUnavailable: pages of this memory cannot be exchanged; the message says why. Nothing has changed.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = sorted(tensors, key=lambda tensor: tensor.data_ptr())
        for one, other in zip(self._tensors, self._tensors[1:], strict=False):
            if one.data_ptr() + one.numel() > other.data_ptr():
                raise PagesUnavailable(f"weights at {other.data_ptr():#x} overlap others; set WEIGHTSYNC_MODE=copy")
        self.bytes = 2 * sum(tensor.numel() for tensor in tensors)
        self._move = _mremap()
        room = TABLE_BYTES + sum(tensor.numel() + TABLE_BYTES for tensor in tensors)
        self._mappings = [_mapping(room), _mapping(max((t.numel() for t in tensors), default=0) + 2 * TABLE_BYTES)]
        whole, between = (torch.frombuffer(mapping, dtype=torch.uint8) for mapping in self._mappings)
        self._standby: list[torch.Tensor] = []
        self._trades: list[_PageTrade] = []
        self._copied: list[tuple[torch.Tensor, torch.Tensor]] = []
        end = whole.data_ptr()
        for tensor in self._tensors:
            first = _alike(tensor.data_ptr(), end) - whole.data_ptr()
            standby = whole[first : first + tensor.numel()]
            end = standby.data_ptr() + standby.numel()
            self._standby.append(standby)
            self._plan(tensor, standby, between.data_ptr())
        for tensor, standby in zip(self._tensors, self._standby, strict=True):
            standby.copy_(tensor)
        try:
            self.flip()
            self.flip()
        except FlipFailed as error:
            raise PagesUnavailable(f"pages of weights in host memory cannot be exchanged: {error}") from error

    def _plan(self, live: torch.Tensor, standby: torch.Tensor, between: int) -> None:
        """Which of its bytes are exchanged in whole pages, and which copied: those in pages that others use, too."""
        begin = -live.data_ptr() % PAGE
        size = (live.numel() - begin) // PAGE * PAGE
        if size < LEAST_BYTES:
            self._copied.append((live, standby))
            return
        for part in (slice(0, begin), slice(begin + size, live.numel())):
            if part.start < part.stop:
                self._copied.append((live[part], standby[part]))
        first = live.data_ptr() + begin
        self._trades.append(_PageTrade(first, standby.data_ptr() + begin, _alike(first, between), size))

    def standby_of(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """See ``paged.Pages.standby_of``."""
        return tuple(self._beside(tensor) for tensor in tensors)

    def _beside(self, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.numel() * tensor.element_size()
        for live, standby in zip(self._tensors, self._standby, strict=True):
            first = tensor.data_ptr() - live.data_ptr()
            if first >= 0 and first + size <= live.numel():
                return standby[first : first + size]
        raise PagesUnavailable(f"{size} bytes at {tensor.data_ptr():#x} do not lie in pages")

    def flip(self) -> None:
        """See ``paged.Pages.flip``."""
        done: list[_PageTrade] = []
        try:
            for trade in self._trades:
                self._trade(trade)
                done.append(trade)
        except OSError as error:
            try:
                for trade in done:
                    self._trade(trade)
            except OSError as again:
                raise PagesTorn(
                    f"flip failed ({error}), and so did the way back ({again}); restart the engine"
                ) from error
            raise FlipFailed(f"flip failed: {error}; what is served is as it was") from error
        for live, standby in self._copied:
            kept = live.clone()
            live.copy_(standby)
            standby.copy_(kept)

    def settle(self) -> None:
        """See ``paged.Pages.settle``: all of it was exchanged at once."""

    def _trade(self, of: _PageTrade) -> None:
        """All or nothing.

        Raises:
            OSError: nothing was exchanged.
            PagesTorn: and what had been moved does not go back.
        """
        ways = [(of.live, of.between), (of.standby, of.live), (of.between, of.standby)]
        for number, (source, destination) in enumerate(ways):
            try:
                self._go(source, destination, of.size)
            except OSError as error:
                try:
                    for there, back in reversed(ways[:number]):
                        self._go(back, there, of.size)
                except OSError as again:
                    raise PagesTorn(f"pages lost ({error}; {again}); restart the engine") from error
                raise

    def _go(self, source: int, destination: int, size: int) -> None:
        if self._move(source, size, size, _MAYMOVE | _FIXED | _DONTUNMAP, destination) == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, f"mremap of {size} bytes at {source:#x}: {os.strerror(number)}")


def _mapping(size: int) -> mmap.mmap:
    """Addresses that take memory only as they are written to."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)


def _alike(address: int, least: int) -> int:
    """The first address from ``least`` on that is where ``address`` is within a page table."""
    return least + (address - least) % TABLE_BYTES
