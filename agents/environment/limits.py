"""What the kernel or the container lets this process have: locked memory, shared memory, open files, memory."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from weightsync.orchestrator.protocol.findings import Finding

_IPC_LOCK: Final = 14
"""CAP_IPC_LOCK, from linux/capability.h: whoever has it may lock any amount."""

SMALL_SHM_BYTES: Final = 1024**3
"""Docker gives 64 MiB, which UCX's queues of a few peers fill."""

FEW_FILES: Final = 4096
"""UCX opens a socket for each peer and several for each device."""

_NO_LIMIT: Final = 1 << 62
"""Of a cgroup of version 1, whose unlimited is a number near 2^63."""


def locked_memory(rdma: bool, soft: int | None = None, status: Path = Path("/proc/self/status")) -> Iterator[Finding]:
    """Whether RDMA can pin memory. ``soft``: the limit in bytes, -1 for none; None: this process's."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if soft is None else soft
    if limit == resource.RLIM_INFINITY or limit < 0 or _may_lock(status):
        yield Finding("ok", "no limit", check="memlock")
        return
    what = f"at most {limit // 1024} kB of memory may be locked"
    fix = "ulimit -l unlimited (LimitMEMLOCK=infinity, docker run --ulimit memlock=-1)"
    if rdma:
        yield Finding("error", f"{what}, and an RDMA port pins all that it writes", fix, "memlock")
    else:
        yield Finding("note", f"{what}; without RDMA ports nothing pins any", fix, "memlock")


def _may_lock(status: Path) -> bool:
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return False
    effective = next((line.split()[1] for line in lines if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) >> _IPC_LOCK & 1)


def shared_memory(place: Path = Path("/dev/shm"), enough: int = SMALL_SHM_BYTES) -> Iterator[Finding]:
    """Whether processes of this host can meet in shared memory."""
    fix = "docker run --shm-size=16g, or --ipc=host; in Kubernetes an emptyDir of medium Memory at /dev/shm"
    try:
        found = os.statvfs(place)
    except OSError as error:
        yield Finding("error", f"{place} cannot be used: {error.strerror}", fix, "shared memory")
        return
    size, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    if free < enough:
        what = f"{free / 1e6:.0f} MB of {size / 1e6:.0f} MB are free in {place}"
        yield Finding("warning", what, fix, "shared memory")
    else:
        yield Finding("ok", f"{free / 1e9:.1f} GB are free in {place}", check="shared memory")


def neighbours(scope: Path = Path("/proc/sys/kernel/yama/ptrace_scope")) -> Iterator[Finding]:
    """Whether a process may write into a neighbour's memory, as UCX does within a host (cma)."""
    try:
        value = int(scope.read_text())
    except (OSError, ValueError):
        return  # no such restriction
    if value >= 2:
        what = f"ptrace_scope is {value}: processes of this host exchange through shared memory, copied twice"
        yield Finding("warning", what, "sysctl kernel.yama.ptrace_scope=1, or CAP_SYS_PTRACE", "cma")


def open_files(soft: int | None = None) -> Iterator[Finding]:
    """``soft``: the limit, -1 for none; None: this process's."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if soft is None else soft
    if 0 <= limit < FEW_FILES:
        what = f"at most {limit} open files: a socket for each peer may find none"
        yield Finding("warning", what, "ulimit -n 65536 (LimitNOFILE=65536)", "open files", several_hosts=True)
    else:
        yield Finding("ok", "no limit" if limit < 0 else str(limit), check="open files")


def room(needed: int, free: int, where: str, why: str) -> Iterator[Finding]:
    """Whether ``needed`` bytes are free ``where``."""
    told = f"{why} takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free {where}"
    if free < needed:
        yield Finding("error", told, "fewer weights on each rank, or more memory", "memory")
    else:
        yield Finding("ok", told, check="memory")


def free_memory(meminfo: Path = Path("/proc/meminfo"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of host memory that this process may still take: the machine's, or its container's if that has fewer."""
    lines = meminfo.read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    for most, used in (
        (cgroups / "memory.max", cgroups / "memory.current"),
        (cgroups / "memory/memory.limit_in_bytes", cgroups / "memory/memory.usage_in_bytes"),
    ):
        try:
            limit, taken = int(most.read_text()), int(used.read_text())
        except (OSError, ValueError):  # ValueError: "max"
            continue
        if limit < _NO_LIMIT:
            available = min(available, max(0, limit - taken))
    return available
