"""Doubles of CUDA's runtime and driver libraries, for machines without a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any


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
        self.cudaGetLastError = Call(lambda: self._note("forget the error"))
        self.cudaFree = Call(lambda address: self._note("free", address))
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

    @contextmanager
    def on(self, device: int) -> Iterator[None]:
        """As ``torch.cuda.device``, which a build without CUDA has not."""
        before, self.device = self.device, device
        yield
        self.device = before

    def _set(self, device: int) -> int:
        if device >= DEVICES:
            return 101
        self.device = device
        self.bound.append(device)
        return 0


# --------------------------------------------------------------------------------------------------------- arenas
