"""What sysfs and the kernel say of a host's network: RDMA ports, interfaces, their states, rates and addresses."""

import dataclasses
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

from weightsync.agents.memory.nic import SYSFS

_SIOCGIFADDR: Final = 0x8915
_SIOCGIFNETMASK: Final = 0x891B
"""From linux/sockios.h; both work on the interface's first IPv4 address."""

_GLOBAL: Final = "00"
"""IPV6_ADDR_ANY of net/ipv6.h, as the table of addresses has it for those of global scope."""

_LOOPBACK: Final = "772"
"""ARPHRD_LOOPBACK in the interface's ``type`` file."""


@dataclasses.dataclass(frozen=True, slots=True)
class Interface:
    """A port or an interface, as ``UCX_NET_DEVICES`` names it.

    ``rdma``: the port of an InfiniBand or RoCE device, whose own interface is ``netdev``; ``state``: the kernel's word;
    ``gbits``: 0 where it is not told; ``network``: of its IPv4 address; ``routed6``: it has an IPv6 one that routers
    take; ``path``: real sysfs path of its PCI device.
    """

    name: str
    rdma: bool
    up: bool
    state: str
    layer: str = "Ethernet"
    gbits: float = 0.0
    netdev: str = ""
    network: ipaddress.IPv4Interface | None = None
    virtual: bool = False
    loopback: bool = False
    routed6: bool = False
    path: Path | None = None


Addresses = Callable[[str], ipaddress.IPv4Interface | None]


def address_of(interface: str) -> ipaddress.IPv4Interface | None:
    """The interface's first IPv4 address and its network; None where it has none."""
    request = struct.pack("256s", interface.encode()[:15])
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as kernel:
            parts = [fcntl.ioctl(kernel.fileno(), ask, request)[20:24] for ask in (_SIOCGIFADDR, _SIOCGIFNETMASK)]
    except OSError:
        return None
    return ipaddress.IPv4Interface("/".join(socket.inet_ntoa(part) for part in parts))


def routed_by_ipv6(table: Path = Path("/proc/net/if_inet6")) -> frozenset[str]:
    """Interfaces with an IPv6 address of global scope."""
    rows = [line.split() for line in _read(table).splitlines()]
    return frozenset(row[5] for row in rows if len(row) == 6 and row[3] == _GLOBAL)


def links(
    sysfs: Path = SYSFS, address: Addresses = address_of, ipv6: Callable[[], frozenset[str]] = routed_by_ipv6
) -> list[Interface]:
    """All RDMA ports, up or not, and all interfaces."""
    routed = ipv6()
    return [
        dataclasses.replace(link, routed6=link.netdev in routed)
        for link in (*_ports(sysfs, address), *_interfaces(sysfs, address))
    ]


def _ports(sysfs: Path, address: Addresses) -> list[Interface]:
    found = []
    for device in sorted((sysfs / "class/infiniband").glob("*")):
        if not (device / "device").exists():
            continue  # software over another interface (rxe, siw)
        place = (device / "device").resolve()
        netdev = next(iter(sorted(path.name for path in (place / "net").glob("*"))), "")
        for port in sorted((device / "ports").glob("*")):
            number, _, word = _read(port / "state").partition(":")
            found.append(
                Interface(
                    name=f"{device.name}:{port.name}",
                    rdma=True,
                    up=number.strip() == "4",
                    state=word.strip() or "unknown",
                    layer=_read(port / "link_layer") or "InfiniBand",
                    gbits=_number(_read(port / "rate")),
                    netdev=netdev,
                    network=address(netdev) if netdev else None,
                    path=place,
                )
            )
    return found


def _interfaces(sysfs: Path, address: Addresses) -> list[Interface]:
    found = []
    for interface in sorted((sysfs / "class/net").glob("*")):
        if not interface.is_dir():
            continue  # bonding_masters is a file
        state = _read(interface / "operstate") or "unknown"
        loopback = _read(interface / "type") == _LOOPBACK
        found.append(
            Interface(
                name=interface.name,
                rdma=False,
                # A loopback, a tunnel and some virtual interfaces never tell.
                up=state in ("up", "unknown"),
                state=state,
                gbits=max(0.0, _number(_read(interface / "speed"))) / 1000,
                netdev=interface.name,
                network=address(interface.name),
                virtual=(interface / "bridge").exists(),
                loopback=loopback,
            )
        )
    return found


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(text: str) -> float:
    try:
        return float(text.split()[0])
    except (IndexError, ValueError):
        return 0.0
