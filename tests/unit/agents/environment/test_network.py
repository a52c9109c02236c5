"""Ports that are down, far, slow, without an address or in the wrong network, and hosts where all is well."""

import dataclasses
import ipaddress
from pathlib import Path

import pytest
from pci_tree import pci_device
from weightsync.agents.environment import network
from weightsync.agents.environment.links import Interface, links
from weightsync.agents.memory.nic import Gpu
from weightsync.orchestrator.protocol.findings import Finding


def port(name: str, *, up: bool = True, gbits: float = 400, layer: str = "InfiniBand", at: str = "") -> Interface:
    address = ipaddress.IPv4Interface(at) if at else None
    return Interface(name, True, up, "ACTIVE" if up else "DOWN", layer, gbits, f"net{name}", address)


def interface(name: str, at: str = "", *, virtual: bool = False, up: bool = True) -> Interface:
    address = ipaddress.IPv4Interface(at) if at else None
    return Interface(name, False, up, "up" if up else "down", netdev=name, network=address, virtual=virtual)


def told(found: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.level, finding.check) for finding in found]


def test_ports_in_good_order() -> None:
    assert told(list(network.ports([port("a"), port("b")]))) == [("ok", "network")]
    assert told(list(network.ports([interface("eth0")]))) == []


@pytest.mark.parametrize(
    ("ports", "findings"),
    [
        ([port("a", up=False), port("b", up=False)], [("error", "network")]),
        ([port("a"), port("b", up=False)], [("note", "b"), ("ok", "network")]),
        ([port("a", layer="Ethernet")], [("warning", "a"), ("ok", "network")]),
        ([port("a"), port("b", gbits=100)], [("note", "b"), ("ok", "network")]),
        ([port("a"), port("b", gbits=100, layer="Ethernet", at="10.0.0.1/24")], [("ok", "network")]),
    ],
)
def test_ports_by_themselves(ports: list[Interface], findings: list[tuple[str, str]]) -> None:
    assert told(list(network.ports(ports))) == findings


def test_of_ports_that_nobody_uses_an_agent_says_nothing() -> None:
    bare = port("a", layer="Ethernet")
    assert told(list(network.ports([bare, port("b", up=False), port("c")], used=["c"]))) == [("ok", "network")]
    assert told(list(network.ports([bare, port("c")], used=["a"]))) == [("warning", "a"), ("ok", "network")]


def test_an_ipv6_address_is_an_address() -> None:
    six = [dataclasses.replace(link, routed6=True) for link in (port("a", layer="Ethernet"), interface("eth0"))]
    assert told(list(network.ports(six))) == [("ok", "network")]
    [found] = network.by_tcp(six[1:], chosen=False)
    assert (found.level, found.what) == ("ok", "writes to other hosts go over TCP: eth0 IPv6")


@pytest.mark.parametrize(
    ("interfaces", "chosen", "levels"),
    [
        ([interface("eth0", "10.0.0.7/24")], False, ["ok"]),
        (
            [interface("eth0", "10.0.0.7/24"), interface("docker0", "172.17.0.1/16", virtual=True)],
            False,
            ["warning", "ok"],
        ),
        ([interface("eth0", "10.0.0.7/24"), interface("docker0", "172.17.0.1/16", virtual=True)], True, ["ok"]),
        ([interface("eth0", "10.0.0.7/24", up=False), interface("eth1")], False, ["warning"]),
        ([port("a"), interface("docker0", "172.17.0.1/16", virtual=True)], False, []),
    ],
)
def test_tcp_and_bridges(interfaces: list[Interface], chosen: bool, levels: list[str]) -> None:
    found = list(network.by_tcp(interfaces, chosen))
    assert [finding.level for finding in found] == levels
    assert all("UCX_NET_DEVICES=eth0" in finding.fix for finding in found[:1] if finding.level == "warning" and chosen)


def test_this_host_is_looked_at_without_harm() -> None:
    here = links()
    assert [f.level for f in network.by_tcp(here, chosen=False)] != [] or any(link.rdma for link in here)


def test_one_network_twice() -> None:
    twice = [port("a", layer="Ethernet", at="10.0.0.1/24"), port("b", layer="Ethernet", at="10.0.0.2/24")]
    apart = [port("a", layer="Ethernet", at="10.0.0.1/24"), port("b", layer="Ethernet", at="10.0.1.2/24")]
    assert told(list(network.one_network_twice(twice, lambda name: "0"))) == [("warning", "network")]
    assert told(list(network.one_network_twice(twice, lambda name: "1" if name == "all" else "0"))) == []
    assert told(list(network.one_network_twice(apart, lambda name: "0"))) == []
    assert network._arp_ignore("lo") in ("0", "1", "2")


def test_peers_in_and_out_of_the_ports_networks() -> None:
    roce = [port("a", layer="Ethernet", at="10.0.0.1/24"), interface("eth0", "192.168.0.7/24")]
    found = list(network.peers(["10.0.0.9", "192.168.0.9"], roce))
    assert [finding.level for finding in found] == ["ok", "warning"]  # the second is reached by eth0 alone
    assert [f.level for f in network.peers(["10.0.0.9"], [interface("eth0", "192.168.0.7/24")])] == ["note"]


class Host:
    """A sysfs tree with GPUs and ports at real PCI paths."""

    def __init__(self, root: Path) -> None:
        self.sysfs, self.gpus, self.ports = root, list[Gpu](), list[Interface]()

    def gpu(self, path: str, numa: int = 0) -> None:
        self.gpus.append(Gpu(f"GPU-{len(self.gpus)}", pci_device(self.sysfs, path, numa).name))

    def nic(self, name: str, path: str, numa: int = 0, *, up: bool = True) -> None:
        place = pci_device(self.sysfs, path, numa)
        self.ports.append(Interface(name, True, up, "ACTIVE" if up else "DOWN", "InfiniBand", 400, path=place))

    def found(self, rails: int = 1) -> list[tuple[str, str]]:
        return told(list(network.distances(self.gpus, self.ports, rails, self.sysfs)))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_gpu_beside_its_port(host: Host) -> None:
    host.gpu("pci0000:10/0000:10:01.0/0000:11:00.0")
    host.nic("near", "pci0000:10/0000:10:02.0/0000:12:00.0")
    assert host.found() == [("ok", "GPU 0")]
    assert host.found(rails=2) == [("note", "GPU 0")]
    assert told(list(network.distances(host.gpus, host.ports, 2, host.sysfs, own=0))) == [("ok", "GPU 0")]


def test_a_far_port(host: Host) -> None:
    host.gpu("pci0000:10/0000:10:01.0/0000:11:00.0", numa=0)
    host.nic("far", "pci0000:90/0000:90:02.0/0000:92:00.0", numa=1)
    assert host.found() == [("warning", "GPU 0")]


def test_a_near_port_that_is_down(host: Host) -> None:
    host.gpu("pci0000:10/0000:10:01.0/0000:11:00.0")
    host.nic("near", "pci0000:10/0000:10:02.0/0000:12:00.0", up=False)
    host.nic("other", "pci0000:20/0000:20:02.0/0000:22:00.0")
    [found] = network.distances(host.gpus, host.ports, 1, host.sysfs)
    assert (found.level, found.what) == ("warning", "its nearest port near is DOWN, so it uses other, farther away")


def test_two_near_ports_and_a_shared_one(host: Host) -> None:
    for slot in (1, 2):
        host.gpu(f"pci0000:10/0000:10:0{slot}.0/0000:1{slot}:00.0")
    host.nic("a", "pci0000:10/0000:10:04.0/0000:14:00.0")
    host.nic("b", "pci0000:10/0000:10:05.0/0000:15:00.0")
    assert host.found(rails=1) == [("note", "GPU 0"), ("note", "GPU 1"), ("note", "a"), ("note", "b")]
    assert host.found(rails=2) == [("ok", "GPU 0"), ("ok", "GPU 1"), ("note", "a"), ("note", "b")]
    own = list(network.distances(host.gpus, host.ports, 2, host.sysfs, own=1))
    assert told(own) == [("ok", "GPU 1"), ("note", "a"), ("note", "b")]
    assert network.nearest(host.gpus[0], host.ports, host.sysfs) == ["a", "b"]


def test_a_gpu_that_sysfs_does_not_have(host: Host) -> None:
    host.gpus.append(Gpu("GPU-x", "0000:ff:00.0"))
    assert host.found() == [("warning", "GPU 0")]
