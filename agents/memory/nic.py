"""Which network ports a GPU should use: its nearest ACTIVE InfiniBand or RoCE ones, by PCI distance.

UCX's own choice may be a port that is down or at the far end of the machine; vLLM's KV connector presets one port
for all GPUs. So each agent is pinned to its GPU's ports. Everything is read from sysfs and, for the order of the
GPUs, from NVML or the driver's proc files.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Final

from weightsync.agents.errors import AgentError
from weightsync.orchestrator.protocol.messages import Fault

SYSFS: Final = Path("/sys")
PROC_GPUS: Final = Path("/proc/driver/nvidia/gpus")

_ACTIVE: Final = 4
"""IB_PORT_ACTIVE in the port's ``state`` file, as in ``4: ACTIVE``."""


class NicError(AgentError):
    """A GPU that cannot be found on this machine. The configuration's fault."""


class NetDeviceMissing(AgentError):
    """A network device of the settings that this host does not have."""

    fault: Fault = "config"


@dataclass(frozen=True, slots=True)
class Gpu:
    """``bus``: PCI address as sysfs writes it (``0000:1b:00.0``)."""

    uuid: str
    bus: str


@dataclass(frozen=True, slots=True, order=True)
class Port:
    """One ACTIVE port, named as UCX_NET_DEVICES wants it (``mlx5_0:1``), and the real path of its PCI device."""

    name: str
    path: Path


def chosen_devices(wanted: Sequence[str], *, sysfs: Path = SYSFS) -> str:
    """UCX_NET_DEVICES for the devices of the settings: interfaces (``eth1``) and ports of RDMA devices (``mlx5_0:1``).

    Raises:
        NetDeviceMissing: names the one that this host does not have, and those that it has.
    """
    interfaces = sorted(name for _, name in socket.if_nameindex())  # of this thread's network namespace, unlike sysfs
    ports = sorted(f"{port.parent.parent.name}:{port.name}" for port in sysfs.glob("class/infiniband/*/ports/*"))
    for name in wanted:
        if name not in interfaces and name not in ports:
            there = ", ".join((*interfaces, *ports)) or "none"
            host = socket.gethostname()
            raise NetDeviceMissing(
                f"transport.net_devices names {name!r}, which {host} does not have; it has {there}. Fix: name one of"
                " these, or leave transport.net_devices empty and set UCX_NET_DEVICES where agents run"
            )
    return ",".join(wanted)


def net_devices(
    device_index: int,
    *,
    wanted: Sequence[str] = (),
    sysfs: Path = SYSFS,
    gpus: Sequence[Gpu] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> str | None:
    """UCX_NET_DEVICES for the process's CUDA device ``device_index``.

    Args:
        wanted: of these only, if it names any.

    Returns:
        Comma-separated ports, several when they are equally near; None when no port is ACTIVE, so that UCX chooses.

    Raises:
        NicError: CUDA_VISIBLE_DEVICES does not make such a device visible, or sysfs does not have it.
    """
    ports = [port for port in active_ports(sysfs) if not wanted or port.name in wanted]
    if not ports:
        return None
    visible = visible_gpus(all_gpus() if gpus is None else gpus, environ.get("CUDA_VISIBLE_DEVICES"))
    if not 0 <= device_index < len(visible):
        raise NicError(f"CUDA device {device_index} of {len(visible)} visible ones has no PCI address")
    return ",".join(port.name for port in nearest(visible[device_index], ports, sysfs))


def active_ports(sysfs: Path = SYSFS) -> list[Port]:
    """All ACTIVE InfiniBand and RoCE ports of PCI devices, in the order of their names."""
    found = []
    for device in sorted((sysfs / "class/infiniband").glob("*")):
        if not (device / "device").exists():
            continue
        for port in sorted((device / "ports").glob("*")):
            if _state(port) == _ACTIVE:
                found.append(Port(f"{device.name}:{port.name}", (device / "device").resolve()))
    return found


def nearest(gpu: Gpu, ports: Sequence[Port], sysfs: Path = SYSFS) -> list[Port]:
    """The ports at the smallest distance from the GPU, all of them.

    Raises:
        NicError: sysfs does not have the GPU.
    """
    link = sysfs / "bus/pci/devices" / gpu.bus
    if not link.exists():
        raise NicError(f"GPU {gpu.uuid} at {gpu.bus} is not in {link.parent}")
    place = link.resolve()
    distances = [distance(place, port.path) for port in ports]
    return [port for port, far in zip(ports, distances, strict=True) if far == min(distances)]


def distance(one: Path, other: Path) -> tuple[int, int]:
    """How far apart two PCI devices are, given their real sysfs paths.

    Below one host bridge: (0, hops through the bridges between them). Otherwise the hops mean nothing, and only the
    NUMA node tells: (1, 0) for the same, (2, 0) for another or an unknown one.
    """
    left, right = _bridges(one), _bridges(other)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
    if common:
        return (0, len(left) + len(right) - 2 * common)
    nodes = _numa(one), _numa(other)
    return (1, 0) if nodes[0] == nodes[1] != -1 else (2, 0)


def visible_gpus(gpus: Sequence[Gpu], setting: str | None) -> list[Gpu]:
    """The GPUs in the order of the process's CUDA indices, as CUDA reads CUDA_VISIBLE_DEVICES.

    Args:
        gpus: all of the machine, by PCI address; where GPUs differ, CUDA numbers them so only with
            CUDA_DEVICE_ORDER=PCI_BUS_ID.
        setting: None: all of them. Numbers, or UUIDs or unambiguous beginnings of them; CUDA ignores what follows
            the first entry that names no GPU, and so does this.
    """
    if setting is None:
        return list(gpus)
    visible: list[Gpu] = []
    for entry in setting.split(","):
        chosen = _named(gpus, entry.strip())
        if chosen is None or chosen in visible:
            break
        visible.append(chosen)
    return visible


def all_gpus(proc: Path = PROC_GPUS) -> list[Gpu]:
    """The machine's GPUs by PCI address, from NVML (the optional pynvml), else from the driver's proc files."""
    return sorted(_from_nvml() or _from_proc(proc), key=lambda gpu: gpu.bus)


def _named(gpus: Sequence[Gpu], entry: str) -> Gpu | None:
    if entry.isdecimal():
        return gpus[int(entry)] if int(entry) < len(gpus) else None
    matches = [gpu for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def _from_nvml() -> list[Gpu]:
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [Gpu(pynvml.nvmlDeviceGetUUID(h), bus_address(pynvml.nvmlDeviceGetPciInfo(h).busId)) for h in handles]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def _from_proc(proc: Path) -> list[Gpu]:
    """One folder per GPU with a file of ``Key:  value`` lines."""
    found = []
    for file in sorted(proc.glob("*/information")):
        facts = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
        uuid, bus = facts.get("GPU UUID", "").strip(), facts.get("Bus Location", "").strip()
        if bus:
            found.append(Gpu(uuid, bus_address(bus)))
    return found


def bus_address(written: str | bytes) -> str:
    """A PCI address as sysfs writes it; NVML pads the domain to eight digits and writes capitals."""
    text = written.decode() if isinstance(written, bytes) else written
    domain, rest = text.lower().split(":", 1)
    return f"{domain[-4:]}:{rest}"


def _state(port: Path) -> int:
    try:
        return int((port / "state").read_text().split(":", 1)[0])
    except (OSError, ValueError):
        return 0


def _bridges(path: Path) -> list[str]:
    """Names from the host bridge (``pci0000:00``) down to the device."""
    parts = path.parts
    roots = [index for index, part in enumerate(parts) if part.startswith("pci")]
    return list(parts[roots[0] :]) if roots else []


def _numa(path: Path) -> int:
    try:
        return int((path / "numa_node").read_text())
    except (OSError, ValueError):
        return -1
