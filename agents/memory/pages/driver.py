"""CUDA's virtual memory management: physical memory, addresses, and which memory an address means.

By NVIDIA's ``cuda-bindings``, which CUDA builds of torch depend on since 2.10. The calls are those of the CUDA driver
API, section *Virtual Memory Management*.
"""

import importlib
from typing import Any, Protocol

import torch
from weightsync.agents.errors import AgentError
from weightsync.agents.memory.cuda import DeviceBytes
from weightsync.agents.memory.errors import PagesUnavailable
from weightsync.orchestrator.protocol.messages import Fault


class DriverError(AgentError):
    """A call of the driver failed.

    Attributes:
        name: of the driver's code, such as ``CUDA_ERROR_OUT_OF_MEMORY``.
    """

    fault: Fault = "engine"
    retry: bool = True

    def __init__(self, call: str, name: str) -> None:
        super().__init__(f"{call}: {name}")
        self.name = name


class VirtualMemory(Protocol):
    """One device's. Sizes and addresses are multiples of ``granularity``, in bytes; all calls may raise DriverError."""

    @property
    def granularity(self) -> int: ...

    def free(self) -> int:
        """Bytes of physical memory that nobody has, whichever process."""

    def create(self, size: int) -> Any:
        """The handle of ``size`` bytes of physical memory."""

    def release(self, handle: Any) -> None:
        """Give physical memory back, as soon as it is mapped nowhere."""

    def reserve(self, size: int) -> int:
        """The first of ``size`` addresses, which mean no memory yet."""

    def give_back(self, address: int, size: int) -> None:
        """Undo ``reserve``; nothing is mapped there."""

    def map(self, address: int, size: int, handle: Any) -> None:
        """From here on the addresses mean all of the handle's memory, which nothing may use before ``allow``."""

    def unmap(self, address: int, size: int) -> None:
        """Undo one or several ``map``. Whoever uses the addresses now, or later, faults."""

    def allow(self, address: int, size: int) -> None:
        """Let the device read and write what is mapped there."""

    def synchronise(self) -> None:
        """Wait until the device is idle."""

    def tensor(self, address: int, size: int) -> torch.Tensor:
        """uint8 ``[size]`` at mapped addresses. It owns nothing."""


class CudaMemory:
    """A CUDA device's, seen by its process.

    Raises:
        PagesUnavailable: no CUDA, no bindings, or a device (a virtual one, say) without this kind of memory.
    """

    def __init__(self, device: torch.device, bindings: Any = None) -> None:
        """``bindings``: the module ``cuda.bindings.driver``, if not the installed one."""
        if device.type != "cuda":
            raise PagesUnavailable(f"weights on {device} cannot lie in pages: they need a CUDA device")
        self._cuda = cuda = _bindings() if bindings is None else bindings
        self._device = device
        number = device.index or 0
        torch.cuda.synchronize(device)  # so that this thread has the device's context
        attribute = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        if not self._call("cuDeviceGetAttribute", attribute, number):
            raise PagesUnavailable(
                f"{torch.cuda.get_device_name(device)}: its driver offers no virtual memory management, which weights"
                " in pages need (some virtual GPUs have none); set WEIGHTSYNC_MODE=copy"
            )
        self._kind = cuda.CUmemAllocationProp()
        self._kind.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._access = cuda.CUmemAccessDesc()
        self._access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        for place in (self._kind.location, self._access.location):
            place.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            place.id = number
        recommended = cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        self.granularity = int(self._call("cuMemGetAllocationGranularity", self._kind, recommended))

    def free(self) -> int:
        return int(torch.cuda.mem_get_info(self._device)[0])

    def create(self, size: int) -> Any:
        return self._call("cuMemCreate", size, self._kind, 0)

    def release(self, handle: Any) -> None:
        self._call("cuMemRelease", handle)

    def reserve(self, size: int) -> int:
        return int(self._call("cuMemAddressReserve", size, self.granularity, self._cuda.CUdeviceptr(0), 0))

    def give_back(self, address: int, size: int) -> None:
        self._call("cuMemAddressFree", self._cuda.CUdeviceptr(address), size)

    def map(self, address: int, size: int, handle: Any) -> None:
        self._call("cuMemMap", self._cuda.CUdeviceptr(address), size, 0, handle, 0)

    def unmap(self, address: int, size: int) -> None:
        self._call("cuMemUnmap", self._cuda.CUdeviceptr(address), size)

    def allow(self, address: int, size: int) -> None:
        self._call("cuMemSetAccess", self._cuda.CUdeviceptr(address), size, [self._access], 1)

    def synchronise(self) -> None:
        torch.cuda.synchronize(self._device)

    def tensor(self, address: int, size: int) -> torch.Tensor:
        return torch.as_tensor(DeviceBytes(address, size), device=self._device)

    def _call(self, name: str, *arguments: Any) -> Any:
        """What the driver's function answers beside its code."""
        code, *answer = getattr(self._cuda, name)(*arguments)
        if int(code):
            raise DriverError(name, getattr(code, "name", str(code)))
        return answer[0] if answer else None


def _bindings() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise PagesUnavailable(
            f"weights in pages need the package cuda-bindings ({error}): install the major of it that torch's CUDA has,"
            f" {torch.version.cuda}, or set WEIGHTSYNC_MODE=copy"
        ) from error
