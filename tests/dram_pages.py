"""Pages in this machine's memory: what the CUDA driver's virtual memory management does, by files without a name and
``mmap``, and failures at any call of it."""

import ctypes
import mmap
import os
from collections.abc import Callable
from typing import Any

import torch
from weightsync.agents.memory.pages.driver import DriverError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FIXED, _NORESERVE = 0x10, 0x4000
NOTHING = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
PAGE = mmap.PAGESIZE


class DramPages:
    """``weightsync.agents.memory.pages.driver.VirtualMemory`` of ``room`` bytes.

    Attributes:
        calls: names of all calls that changed something, in their order.
        refuse: told each call's number (from 0) and name; the call fails where it says so, and changes nothing.
        mapped: address → bytes and handle of what is mapped.
    """

    granularity = PAGE

    def __init__(self, room: int = 1 << 30, refuse: Callable[[int, str], bool] = lambda number, name: False) -> None:
        self.room, self.refuse = room, refuse
        self.calls: list[str] = []
        self.mapped: dict[int, tuple[int, int]] = {}
        self.reserved: dict[int, int] = {}
        self._sizes: dict[int, int] = {}

    def free(self) -> int:
        return self.room - sum(self._sizes.values())

    def create(self, size: int) -> Any:
        self._count("create")
        if size > self.free():
            raise DriverError("create", "CUDA_ERROR_OUT_OF_MEMORY")
        handle = os.memfd_create("pages")
        os.truncate(handle, size)
        self._sizes[handle] = size
        return handle

    def release(self, handle: Any) -> None:
        self._count("release")
        assert handle not in [mapped for _, mapped in self.mapped.values()], "released while it is mapped"
        del self._sizes[handle]
        os.close(handle)

    def reserve(self, size: int) -> int:
        self._count("reserve")
        address = self._mmap(None, size, 0, NOTHING, -1)
        self.reserved[address] = size
        return address

    def give_back(self, address: int, size: int) -> None:
        self._count("give_back")
        assert self.reserved.pop(address) == size
        assert not _libc.munmap(address, size)

    def map(self, address: int, size: int, handle: Any) -> None:
        self._count("map")
        assert size == self._sizes[handle], "a handle is mapped whole"
        assert any(base <= address and address + size <= base + length for base, length in self.reserved.items())
        assert all(at + length <= address or address + size <= at for at, (length, _) in self.mapped.items())
        self.mapped[address] = (size, handle)

    def allow(self, address: int, size: int) -> None:
        self._count("allow")
        covered = 0
        for at, (length, handle) in self.mapped.items():
            if address <= at and at + length <= address + size:
                self._mmap(at, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _FIXED, handle)
                covered += length
        assert covered == size, "access is for what is mapped"

    def unmap(self, address: int, size: int) -> None:
        self._count("unmap")
        assert self.mapped.pop(address)[0] == size
        self._mmap(address, size, 0, NOTHING | _FIXED, -1)

    def synchronise(self) -> None:
        self._count("synchronise")

    def tensor(self, address: int, size: int) -> torch.Tensor:
        return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)

    def _count(self, name: str) -> None:
        number = len(self.calls)
        self.calls.append(name)
        if self.refuse(number, name):
            raise DriverError(name, "CUDA_ERROR_UNKNOWN")

    def _mmap(self, address: int | None, size: int, protection: int, flags: int, file: int) -> int:
        got = _libc.mmap(address, size, protection, flags, file, 0)
        if got is None or got == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), f"mmap of {size} bytes")
        return int(got)
