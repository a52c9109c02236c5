"""Which ports writes take, and what is wrong with them: down, far, slow, without an address, in another network."""

import ipaddress
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Final

from weightsync.agents.environment.links import Interface
from weightsync.agents.memory.nic import SYSFS, Gpu, distance
from weightsync.orchestrator.protocol.findings import Finding, Level

ARP_IGNORE: Final = "/proc/sys/net/ipv4/conf/{}/arp_ignore"

CHECK: Final = "network"


def ports(links: Sequence[Interface], used: Collection[str] | None = None) -> Iterator[Finding]:
    """RDMA ports by themselves. ``used``: names of those that matter; None: all of them."""
    rdma = [link for link in links if link.rdma]
    active = [link for link in rdma if link.up]
    if rdma and not active:
        told = ", ".join(f"{link.name} {link.state}" for link in rdma)
        yield Finding("error", f"no RDMA port is ACTIVE ({told}): writes go over TCP", "mend the links", CHECK)
        return
    active = [link for link in active if used is None or link.name in used]
    for link in rdma:
        if not link.up and (used is None or link.name in used):
            yield Finding(
                "note", f"is {link.state}; agents leave it out", "mend the link, if it is to be used", link.name
            )
    for link in active:
        if link.layer == "Ethernet" and link.network is None and not link.routed6:
            where = link.netdev or "its interface"
            what = f"RoCE without an address on {where} that is routed: peers in other networks are not reached"
            yield Finding("warning", what, f"give {where} an address", link.name)
    fastest = max((link.gbits for link in active), default=0.0)
    for link in active:
        if 0 < link.gbits < fastest and _is_data(link, active):
            what = f"runs at {link.gbits:g} Gb/s, and the fastest port here at {fastest:g}"
            yield Finding("note", what, "if they are alike, look at cable, transceiver and switch", link.name)
    if active:
        told = ", ".join(f"{link.name} {link.gbits:g} Gb/s {link.layer}" for link in active)
        yield Finding("ok", f"ACTIVE: {told}", check=CHECK)


def _is_data(link: Interface, active: Sequence[Interface]) -> bool:
    """Of the same layer as the fastest: a slower Ethernet port beside InfiniBand is there for storage or for people."""
    fastest = max(active, key=lambda each: each.gbits)
    return link.layer == fastest.layer


def by_tcp(links: Sequence[Interface], chosen: bool) -> Iterator[Finding]:
    """Without RDMA ports: which interfaces UCX has. ``chosen``: UCX_NET_DEVICES names some."""
    if any(link.rdma and link.up for link in links):
        return
    real = [link for link in links if not link.rdma and link.up and not link.loopback]
    usable = [link for link in real if link.network is not None or link.routed6]
    if not usable:
        what = "no interface but the loopback has an address that is routed: no other host can be reached"
        fix = "one host is enough, or give an interface an address"
        yield Finding("warning", what, fix, CHECK, several_hosts=True)
        return
    bridges = [link for link in usable if link.virtual]
    if bridges and not chosen:
        told = ", ".join(_with_address(link) for link in bridges)
        what = f"UCX may offer peers the addresses of bridges of this host alone ({told}), where nobody can answer"
        plain = ",".join(link.name for link in usable if not link.virtual) or "the right interface"
        yield Finding("warning", what, f"UCX_NET_DEVICES={plain}", CHECK, several_hosts=True)
    told = ", ".join(_with_address(link) for link in usable if not link.virtual)
    yield Finding("ok" if told else "note", f"writes to other hosts go over TCP: {told or 'bridges only'}", check=CHECK)


def _with_address(link: Interface) -> str:
    return f"{link.name} {link.network or 'IPv6'}"


def one_network_twice(links: Sequence[Interface], arp_ignore: Callable[[str], str] | None = None) -> Iterator[Finding]:
    """RoCE ports of one network: without arp_ignore the kernel answers for one by the other."""
    ask = arp_ignore or _arp_ignore
    at: dict[ipaddress.IPv4Network, list[Interface]] = defaultdict(list)
    for link in links:
        if link.rdma and link.up and link.layer == "Ethernet" and link.network is not None:
            at[link.network.network].append(link)
    for network, there in at.items():
        loose = [link for link in there if ask(link.netdev) == "0" and ask("all") == "0"]
        if len(there) > 1 and loose:
            what = f"{', '.join(link.name for link in there)} are all in {network}: packets for one may come to another"
            fix = "sysctl net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.arp_announce=2, or a network for each"
            yield Finding("warning", what, fix, CHECK)


def _arp_ignore(interface: str) -> str:
    try:
        return Path(ARP_IGNORE.format(interface)).read_text().strip()
    except OSError:
        return ""


def peers(addresses: Sequence[str], links: Sequence[Interface]) -> Iterator[Finding]:
    """Whether hosts that writes go to are in a network of this host's ports. ``addresses``: IPv4."""
    up = [link for link in links if link.up and not link.loopback and not link.virtual and link.network is not None]
    data = [link for link in up if link.rdma] or up
    for text in addresses:
        peer = ipaddress.IPv4Address(text)
        if not any(link.network is not None and peer in link.network.network for link in data):
            told = ", ".join(f"{link.name} {link.network}" for link in data) or "none"
            what = f"{peer} is in no network of the ports here ({told}): it is reached by a router, or not at all"
            level: Level = "warning" if any(link.rdma for link in data) else "note"
            yield Finding(level, what, "name ports of its network in UCX_NET_DEVICES, or mend addresses", CHECK)
        else:
            yield Finding("ok", f"{peer} is in a network of the ports here", check=CHECK)


def nearest(gpu: Gpu, links: Sequence[Interface], sysfs: Path = SYSFS) -> list[str]:
    """Names of the ACTIVE ports that agents on ``gpu`` use; empty where sysfs has not got it, or there is none."""
    place = sysfs / "bus/pci/devices" / gpu.bus
    far = {link.name: distance(place.resolve(), link.path) for link in links if link.rdma and link.up and link.path}
    return [name for name in far if far[name] == min(far.values())] if place.exists() else []


def distances(
    gpus: Sequence[Gpu], links: Sequence[Interface], rails: int, sysfs: Path = SYSFS, own: int | None = None
) -> Iterator[Finding]:
    """For each GPU that this process sees, or its ``own``, the nearest port. ``rails``: as ``transport.rails``."""
    found = [link for link in links if link.rdma and link.path is not None]
    for number, gpu in enumerate(gpus):
        if own not in (None, number):
            continue
        place = sysfs / "bus/pci/devices" / gpu.bus
        check = f"GPU {number}"
        if not place.exists():
            what = f"{gpu.uuid} at {gpu.bus} is not in sysfs: agents leave the choice of a port to UCX"
            yield Finding("warning", what, "give the container /sys of its host", check)
            continue
        far = {link.name: distance(place.resolve(), link.path) for link in found if link.path is not None}
        near = nearest(gpu, found, sysfs)
        if not near:
            continue
        least = far[near[0]]
        down = [link for link in found if not link.up and far[link.name] < least]
        if down:
            what = f"its nearest port {down[0].name} is {down[0].state}, so it uses {', '.join(near)}, farther away"
            yield Finding("warning", what, "mend that link", check)
        elif least[0] == 2:
            what = f"no ACTIVE port is on its side of the machine; it uses {', '.join(near)} across sockets"
            yield Finding("warning", what, "place the rank on a GPU beside a port", check)
        elif rails > len(near) and own is None:  # which costs nothing, so that an agent does not speak of it
            what = f"transport.rails is {rails}, and its nearest ports are {', '.join(near)}"
            yield Finding("note", what, f"transport.rails: {len(near)}", check)
        elif len(near) > rails:
            what = f"{len(near)} ports are equally near ({', '.join(near)}), and transport.rails is {rails}"
            yield Finding("note", what, f"transport.rails: {len(near)} uses them all", check)
        else:
            yield Finding("ok", f"uses {', '.join(near)}", check=check)
    yield from _shared(gpus, found, sysfs, own)


def _shared(gpus: Sequence[Gpu], found: Sequence[Interface], sysfs: Path, own: int | None) -> Iterator[Finding]:
    """Ports that several GPUs have as their nearest, while another port is nobody's."""
    users: dict[str, list[int]] = defaultdict(list)
    for number, gpu in enumerate(gpus):
        for name in nearest(gpu, found, sysfs):
            users[name].append(number)
    for name, numbers in users.items():
        if len(numbers) > 1 and (own is None or own in numbers):
            told = ", ".join(map(str, numbers))
            yield Finding("note", f"is shared by GPUs {told}: each has a part of its rate", check=name)
