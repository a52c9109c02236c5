"""Which memory a peer can reach, on a double of CUDA's driver."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cuda_doubles import Call
from weightsync.agents.memory import cuda, reach
from weightsync.agents.memory.errors import MemoryPlacementError
from weightsync.orchestrator.protocol.layout import Region


def driver_with(facts: dict[int, int], answer: int = 0) -> Any:
    """A libcuda whose pointer attributes are ``facts``."""

    def query(out: Any, attribute: int, address: int) -> int:
        out._obj.value = facts.get(attribute, 0)
        return answer

    return SimpleNamespace(cuPointerGetAttribute=Call(query))


def look_with(facts: dict[int, int], answer: int = 0) -> Callable[[int], cuda.Pointer]:
    library = driver_with(facts, answer)
    return lambda address: cuda.Pointer(address, library)


PLAIN = {2: 2, 10: 1, 11: 1 << 40, 12: 4096}
"""Device memory of 4096 bytes at 1 << 40 that legacy IPC can export."""


def test_plain_device_memory_passes_and_host_memory_is_not_asked_about() -> None:
    reach.check_reachable([Region(1 << 40, 4096, "VRAM"), Region((1 << 40) + 96, 4000, "VRAM")], look_with(PLAIN))
    reach.check_reachable([Region(4096, 4096)], look_with({}, answer=1))


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (PLAIN | {10: 0}, "expandable_segments"),
        (PLAIN | {2: 1}, "host or managed"),
        (PLAIN | {12: 4095}, "leaves it"),
        (PLAIN | {11: (1 << 40) + 1}, "leaves it"),
    ],
)
def test_memory_out_of_reach_is_refused_with_the_reason(facts: dict[int, int], words: str) -> None:
    with pytest.raises(MemoryPlacementError, match=words):
        reach.check_reachable([Region(1 << 40, 4096, "VRAM", 1)], look_with(facts))


def test_an_address_that_cuda_does_not_know_is_refused() -> None:
    with pytest.raises(MemoryPlacementError, match="no CUDA address"):
        reach.check_reachable([Region(1 << 40, 4096, "VRAM")], look_with(PLAIN, answer=1))


def test_without_a_driver_there_is_no_device_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "driver", lambda: None)
    with pytest.raises(MemoryPlacementError, match=r"libcuda\.so\.1"):
        reach.check_reachable([Region(1 << 40, 4096, "VRAM")])
    assert not cuda.dma_buf_supported(0)


def test_a_nic_needs_peer_memory_or_dma_buf(tmp_path: Path) -> None:
    assert "nvidia_peermem" in (reach.why_not_by_nic(0, tmp_path, lambda device: False) or "")
    assert reach.why_not_by_nic(0, tmp_path, lambda device: True) is None
    (tmp_path / "nvidia_peermem").mkdir()
    assert reach.why_not_by_nic(0, tmp_path, lambda device: False) is None
