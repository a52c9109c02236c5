"""The few CUDA calls that torch does not offer, through ctypes: no compiler and no further package is needed."""

import ctypes
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final

import torch
from weightsync.agents.memory import preload
from weightsync.agents.memory.errors import MemoryPlacementError

_RANGE_START: Final = 11
_RANGE_SIZE: Final = 12
_MEMORY_TYPE: Final = 2
_LEGACY_IPC: Final = 10
"""CUpointer_attribute values, from cuda.h (stable since CUDA 11.1)."""
_DEVICE_MEMORY: Final = 2
"""CU_MEMORYTYPE_DEVICE."""
_DMA_BUF: Final = 124
"""CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED, from cuda.h (CUDA 11.7)."""


class Runtime:
    """Allocation calls of the process's libcudart.

    Args:
        library: if not the one that is found.
        on: makes a device the calling thread's for as long as its context lasts. torch's does not go back to a device
            that this process has not used: that alone would take half a gigabyte there, of GPU 0 for each worker.

    Raises:
        MemoryPlacementError: there is no libcudart.
    """

    def __init__(
        self, library: ctypes.CDLL | None = None, on: Callable[[int], AbstractContextManager[object]] | None = None
    ) -> None:
        self._on = torch.cuda.device if on is None else on
        if library is None:
            path = preload.cudart()
            if path is None:
                raise MemoryPlacementError(
                    "plain device memory needs libcudart: install a CUDA build of torch (its wheels bring it) or set"
                    " CUDA_HOME to a toolkit"
                )
            library = ctypes.CDLL(path)
        self._malloc = library.cudaMalloc
        self._malloc.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t]
        self._free = library.cudaFree
        self._free.argtypes = [ctypes.c_void_p]
        self._register = library.cudaHostRegister
        self._register.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
        self._unregister = library.cudaHostUnregister
        self._unregister.argtypes = [ctypes.c_void_p]
        self._set_device = library.cudaSetDevice
        self._set_device.argtypes = [ctypes.c_int]
        self._forget_error = library.cudaGetLastError

    def bind(self, device: int) -> None:
        """Make ``device`` the calling thread's, with its context.

        torch's ``set_device`` does nothing where the number is current already, as 0 is in every new thread; what asks
        the driver for a context there (UCX does) finds none.

        Raises:
            MemoryPlacementError: there is no such device.
        """
        failed = self._set_device(device)
        if failed:
            raise MemoryPlacementError(f"CUDA device {device} cannot be used (error {failed})")

    def malloc(self, size: int, device: int) -> int | None:
        """Address of ``size`` bytes on ``device``; None when there is no room."""
        address = ctypes.c_void_p()
        with self._on(device):
            failed = self._malloc(ctypes.byref(address), size)
        if failed:
            self._forget_error()  # else torch takes it for the failure of its next call
            return None
        return address.value

    def free(self, address: int, device: int) -> None:
        """Give memory of ``malloc`` back. Waits for the device."""
        with self._on(device):
            self._free(address)

    def pin(self, address: int, size: int) -> int:
        """Page-lock host memory for fast copies; 0, or CUDA's error number."""
        failed = int(self._register(address, size, 0))
        if failed:
            self._forget_error()
        return failed

    def unpin(self, address: int) -> None:
        """Undo ``pin``, before the memory is unmapped."""
        self._unregister(address)


class DeviceBytes:
    """``size`` bytes of device memory as torch takes them from others (CUDA array interface, version 3): uint8."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


@functools.cache
def driver() -> ctypes.CDLL | None:
    """The CUDA driver's library; None on a machine without one."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


class Pointer:
    """What the driver knows of one device address.

    Attributes:
        device_memory: it is device memory at all.
        start: first address of the allocation.
        size: bytes of the allocation.
        legacy_ipc: cudaMalloc memory, which cudaIpc and peer-memory NICs can map; memory from the driver's virtual
            memory management (expandable segments, vLLM's sleep mode) is not.

    Raises:
        MemoryPlacementError: no driver, or an address that it does not know.
    """

    def __init__(self, address: int, library: ctypes.CDLL | None = None) -> None:
        library = library or driver()
        if library is None:
            raise MemoryPlacementError("there is no CUDA driver (libcuda.so.1), so there can be no device memory")
        self._query = library.cuPointerGetAttribute
        self._query.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64]
        self._address = address
        self.device_memory = self._get(_MEMORY_TYPE, ctypes.c_uint()) == _DEVICE_MEMORY
        self.start = self._get(_RANGE_START, ctypes.c_uint64())
        self.size = self._get(_RANGE_SIZE, ctypes.c_size_t())
        self.legacy_ipc = bool(self._get(_LEGACY_IPC, ctypes.c_int()))

    def _get(self, attribute: int, value: ctypes.c_uint | ctypes.c_uint64 | ctypes.c_size_t | ctypes.c_int) -> int:
        failed = self._query(ctypes.byref(value), attribute, self._address)
        if failed:
            raise MemoryPlacementError(f"{self._address:#x} is no CUDA address (the driver answers {failed})")
        return int(value.value)


def dma_buf_supported(device: int, library: ctypes.CDLL | None = None) -> bool:
    """Whether the driver can hand the device's memory to a NIC by dma-buf. False without a driver."""
    library = library or driver()
    if library is None:
        return False
    value = ctypes.c_int()
    return library.cuDeviceGetAttribute(ctypes.byref(value), _DMA_BUF, device) == 0 and bool(value.value)
