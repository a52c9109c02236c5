"""Links of this very host, and of sysfs trees as RDMA hosts have them."""

import ipaddress
from pathlib import Path

from weightsync.agents.environment.links import Interface, address_of, links, routed_by_ipv6


def test_this_hosts_loopback() -> None:
    assert address_of("lo") == ipaddress.IPv4Interface("127.0.0.1/8")
    assert address_of("nothing0") is None
    [lo] = [link for link in links() if link.name == "lo"]
    assert (lo.rdma, lo.up, lo.loopback, lo.network) == (False, True, True, ipaddress.IPv4Interface("127.0.0.1/8"))


def test_interfaces_that_ipv6_routers_reach(tmp_path: Path) -> None:
    table = tmp_path / "if_inet6"
    table.write_text(
        "fe80000000000000be241100fefa0001 02 40 20 80     eth0\n"
        "20010db8000000000000000000000007 03 40 00 80     eth1\n"
        "00000000000000000000000000000001 01 80 10 80       lo\n"
        "garbled\n"
    )
    assert routed_by_ipv6(table) == {"eth1"}
    assert routed_by_ipv6(tmp_path / "none") == frozenset()


def write(root: Path, **files: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name).write_text(f"{text}\n")


def test_ports_and_interfaces_of_a_host_with_roce(tmp_path: Path) -> None:
    place = tmp_path / "devices/pci0000:15/0000:15:01.0/0000:16:00.0"
    (place / "net/ens1np0").mkdir(parents=True)
    device = tmp_path / "class/infiniband/mlx5_0"
    write(device / "ports/1", state="4: ACTIVE", link_layer="Ethernet", rate="400 Gb/sec (4X NDR)")
    write(device / "ports/2", state="1: DOWN", link_layer="Ethernet", rate="garbled")
    (device / "device").symlink_to(place)
    write(tmp_path / "class/infiniband/rxe0/ports/1", state="4: ACTIVE")
    write(tmp_path / "class/net/docker0", operstate="up", type="1", speed="-1")
    (tmp_path / "class/net/docker0/bridge").mkdir()
    write(tmp_path / "class/net/ens1np0", operstate="down", type="1", speed="400000")
    write(tmp_path / "class/net", bonding_masters="")
    network = ipaddress.IPv4Interface("10.0.0.7/24")
    found = links(tmp_path, lambda name: network if name == "ens1np0" else None, lambda: frozenset(["docker0"]))
    assert found == [
        Interface("mlx5_0:1", True, True, "ACTIVE", "Ethernet", 400.0, "ens1np0", network, path=place),
        Interface("mlx5_0:2", True, False, "DOWN", "Ethernet", 0.0, "ens1np0", network, path=place),
        Interface("docker0", False, True, "up", netdev="docker0", virtual=True, routed6=True),
        Interface("ens1np0", False, False, "down", gbits=400.0, netdev="ens1np0", network=network),
    ]
