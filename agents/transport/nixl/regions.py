"""Proof that a range of memory may be registered. NIXL itself accepts overlapping and unmapped ranges silently, and
the first write into them fails on the other machine, or lands where nobody looks."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import structlog
from weightsync.agents.memory.reach import why_not_by_nic
from weightsync.agents.transport.nixl.errors import RegionError
from weightsync.orchestrator.protocol.layout import Region

_MAPS = Path("/proc/self/maps")

log = structlog.get_logger(__name__)


def check_regions(new: Sequence[Region], registered: Iterable[Region] = ()) -> None:
    """Refuse ranges that are empty, overlap each other or one in ``registered``, or are not mapped readable and
    writable (DRAM only; see ``memory.reach`` for device memory).

    Raises:
        RegionError: with the range and the reason.
    """
    for region in new:
        if region.length <= 0 or region.base <= 0:
            raise RegionError(f"{describe(region)}: empty or without an address")
    _refuse_overlaps([*registered, *new])
    host = [region for region in new if region.memory == "DRAM"]
    if host and _MAPS.exists():
        _refuse_unmapped(host, _writable_ranges(_MAPS.read_text()))


def describe(region: Region) -> str:
    """A region as errors name it."""
    return f"{region.memory} {region.device} [{region.base:#x}, +{region.length})"


def warn_without_gpu_direct(rank: str, regions: Sequence[Region]) -> None:
    """Say of each GPU with memory in ``regions`` that ports cannot reach it directly."""
    for device in sorted({region.device for region in regions if region.memory == "VRAM"}):
        if reason := why_not_by_nic(device):
            log.warning("gpu_direct_unavailable", rank=rank, device=device, reason=reason)


def _refuse_overlaps(regions: Sequence[Region]) -> None:
    ordered = sorted(regions, key=lambda r: (r.memory, r.device, r.base))
    for left, right in pairwise(ordered):
        same = (left.memory, left.device) == (right.memory, right.device)
        if same and left.base + left.length > right.base:
            raise RegionError(f"{describe(right)} overlaps {describe(left)}")


def _refuse_unmapped(regions: Sequence[Region], ranges: Sequence[tuple[int, int]]) -> None:
    starts = [low for low, _ in ranges]
    for region in regions:
        place = bisect_right(starts, region.base) - 1
        if place < 0 or region.base + region.length > ranges[place][1]:
            raise RegionError(f"{describe(region)}: not mapped readable and writable in this process")


def _writable_ranges(maps: str) -> list[tuple[int, int]]:
    """Address ranges of /proc/<pid>/maps with ``rw`` permissions, neighbours joined."""
    ranges: list[tuple[int, int]] = []
    for line in maps.splitlines():
        span, permissions, *_ = line.split(maxsplit=2)
        if not permissions.startswith("rw"):
            continue
        low, high = (int(part, 16) for part in span.split("-"))
        if ranges and ranges[-1][1] == low:
            ranges[-1] = (ranges[-1][0], high)
        else:
            ranges.append((low, high))
    return ranges
