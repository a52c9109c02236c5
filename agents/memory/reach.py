"""Whether a NIC or another process can reach a range of device memory, and if not, why.

Asked before registering, because nothing later says so: cuda_ipc falls back to copies through the host at a
five-thousandth of the rate, and InfiniBand registers the memory and then fails the first write as if the peer had
gone.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from weightsync.agents.memory.cuda import Pointer, dma_buf_supported
from weightsync.agents.memory.errors import MemoryPlacementError
from weightsync.orchestrator.protocol.layout import Region

_PEER_MEMORY_MODULES: Final = ("nvidia_peermem", "nv_peer_mem")


def check_reachable(regions: Iterable[Region], look: Callable[[int], Pointer] = Pointer) -> None:
    """Refuse VRAM regions that cannot be exported; DRAM regions pass (see ``transport.nixl.regions`` for those).

    Raises:
        MemoryPlacementError: with the region, the reason and the way out.
    """
    for region in regions:
        if region.memory != "VRAM":
            continue
        name = f"VRAM {region.device} [{region.base:#x}, +{region.length})"
        pointer = look(region.base)
        if not pointer.device_memory:
            raise MemoryPlacementError(f"{name}: this is host or managed memory")
        if not pointer.legacy_ipc:
            raise MemoryPlacementError(
                f"{name}: allocated by virtual memory management (expandable_segments:True or vLLM's sleep mode),"
                " which neither another process nor a NIC can map; take the arena from"
                " weightsync.agents.memory.arena, use shadow targets, or turn that option off"
            )
        end = region.base + region.length
        if region.base < pointer.start or end > pointer.start + pointer.size:
            raise MemoryPlacementError(
                f"{name}: the allocation there is [{pointer.start:#x}, +{pointer.size}), so the range leaves it"
            )


def why_not_by_nic(
    device: int, modules: Path = Path("/sys/module"), dma_buf: Callable[[int], bool] = dma_buf_supported
) -> str | None:
    """Why an InfiniBand or RoCE NIC cannot write into the device's memory directly; None if it can.

    It needs a peer-memory kernel module, or a driver that exports dma-buf (with rdma-core and a kernel that take it).
    """
    if any((modules / name).is_dir() for name in _PEER_MEMORY_MODULES) or dma_buf(device):
        return None
    return (
        "GPUDirect RDMA is not available: load nvidia_peermem, or use the open GPU kernel modules with dma-buf;"
        " until then writes pass through host memory"
    )
