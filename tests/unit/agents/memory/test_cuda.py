"""CUDA's runtime through ctypes, on a double of its library."""

import pytest
from cuda_doubles import DEVICES, FakeCudart
from weightsync.agents.memory import cuda, preload
from weightsync.agents.memory.errors import MemoryPlacementError


def test_a_thread_is_bound_also_to_the_device_that_is_current() -> None:
    """A new thread says that device 0 is current and has no context of it."""
    library = FakeCudart()
    cuda.Runtime(library).bind(0)  # type: ignore[arg-type]
    assert library.bound == [0]


def test_a_device_that_is_not_there_cannot_be_bound() -> None:
    with pytest.raises(MemoryPlacementError, match=f"device {DEVICES} cannot be used"):
        cuda.Runtime(FakeCudart()).bind(DEVICES)  # type: ignore[arg-type]


def test_without_libcudart_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preload, "cudart", lambda: None)
    with pytest.raises(MemoryPlacementError, match="CUDA build of torch"):
        cuda.Runtime()
