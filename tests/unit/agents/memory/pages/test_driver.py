"""CUDA's driver by its bindings: what is asked of them, and its refusals by name. ``tests/gpu/test_pages.py`` has the
real one."""

import enum
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from weightsync.agents.memory.errors import PagesUnavailable
from weightsync.agents.memory.pages.driver import CudaMemory, DriverError

GPU = torch.device("cuda", 3)


class Code(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2


class Bindings(SimpleNamespace):
    """``cuda.bindings.driver``: constants by their names, and calls that answer what ``answers`` says, else success."""

    def __init__(self, **answers: tuple[Any, ...]) -> None:
        super().__init__()
        self.answers = {"cuDeviceGetAttribute": (Code.CUDA_SUCCESS, 1)} | answers
        self.answers.setdefault("cuMemGetAllocationGranularity", (Code.CUDA_SUCCESS, 1 << 21))
        self.log: list[tuple[Any, ...]] = []
        self.CUmemAllocationProp = self.CUmemAccessDesc = lambda: SimpleNamespace(location=SimpleNamespace())
        self.CUdeviceptr = lambda address: ("pointer", address)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("CU"):
            return _Names()
        if name.startswith("cu"):
            return self._call(name)
        raise AttributeError(name)

    def _call(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.log.append((name, *arguments))
            return self.answers.get(name, (Code.CUDA_SUCCESS,))

        return call


class _Names:
    def __getattr__(self, name: str) -> str:
        return name


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


def test_memory_is_created_mapped_and_allowed_on_the_device_of_its_process() -> None:
    bindings = Bindings(cuMemCreate=(Code.CUDA_SUCCESS, "handle"), cuMemAddressReserve=(Code.CUDA_SUCCESS, 4096))
    memory = CudaMemory(GPU, bindings)
    assert memory.granularity == 1 << 21
    bindings.log.clear()
    assert memory.create(1 << 21) == "handle"
    assert memory.reserve(1 << 22) == 4096
    memory.map(4096, 1 << 21, "handle")
    memory.allow(4096, 1 << 21)
    memory.unmap(4096, 1 << 21)
    memory.give_back(4096, 1 << 22)
    memory.release("handle")
    created, reserved, mapped, allowed, *ended = bindings.log
    assert (created[0], created[1], created[2].location.id, created[3]) == ("cuMemCreate", 1 << 21, 3, 0)
    assert reserved == ("cuMemAddressReserve", 1 << 22, 1 << 21, ("pointer", 0), 0)
    assert mapped == ("cuMemMap", ("pointer", 4096), 1 << 21, 0, "handle", 0)
    assert allowed[:3] == ("cuMemSetAccess", ("pointer", 4096), 1 << 21)
    assert [(access.location.id, access.flags) for access in allowed[3]] == [
        (3, "CU_MEM_ACCESS_FLAGS_PROT_READWRITE"),
    ]
    assert ended == [
        ("cuMemUnmap", ("pointer", 4096), 1 << 21),
        ("cuMemAddressFree", ("pointer", 4096), 1 << 22),
        ("cuMemRelease", "handle"),
    ]


def test_a_refusal_has_the_drivers_own_name() -> None:
    memory = CudaMemory(GPU, Bindings(cuMemCreate=(Code.CUDA_ERROR_OUT_OF_MEMORY, None)))
    with pytest.raises(DriverError, match="cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY") as told:
        memory.create(1 << 21)
    assert told.value.name == "CUDA_ERROR_OUT_OF_MEMORY"


def test_a_device_without_virtual_memory_is_refused_by_its_name() -> None:
    with pytest.raises(PagesUnavailable, match="a GPU: its driver offers no virtual memory"):
        CudaMemory(GPU, Bindings(cuDeviceGetAttribute=(Code.CUDA_SUCCESS, 0)))


def test_without_the_bindings_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(PagesUnavailable, match="cuda-bindings"):
        CudaMemory(GPU)


def test_no_other_kind_of_device_has_pages() -> None:
    with pytest.raises(PagesUnavailable, match="weights on cpu"):
        CudaMemory(torch.device("cpu"), Bindings())
