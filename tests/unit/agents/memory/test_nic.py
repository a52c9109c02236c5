"""NIC choice on sysfs trees as real machines have them, rebuilt under tmp_path."""

from pathlib import Path

import pytest
from pci_tree import pci_device
from weightsync.agents.memory import nic
from weightsync.agents.memory.nic import Gpu, NetDeviceMissing, NicError


class Machine:
    """A sysfs tree: PCI devices at real paths, links to them, and InfiniBand devices with ports."""

    def __init__(self, root: Path) -> None:
        self.sysfs = root
        self.gpus: list[Gpu] = []

    def gpu(self, path: str, numa: int = 0) -> None:
        place = pci_device(self.sysfs, path, numa)
        self.gpus.append(Gpu(f"GPU-{len(self.gpus):08x}-aaaa", place.name))

    def nic(self, name: str, path: str, numa: int = 0, state: str = "4: ACTIVE", link: str = "InfiniBand") -> None:
        place = pci_device(self.sysfs, path, numa)
        device = self.sysfs / "class/infiniband" / name
        port = device / "ports/1"
        port.mkdir(parents=True)
        (device / "device").symlink_to(place)
        (port / "state").write_text(f"{state}\n")
        (port / "link_layer").write_text(f"{link}\n")

    def choice(self, index: int, visible: str | None = None, wanted: tuple[str, ...] = ()) -> str | None:
        environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        return nic.net_devices(index, wanted=wanted, sysfs=self.sysfs, gpus=self.gpus, environ=environ)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "sys")


def switched(machine: Machine) -> Machine:
    """Four PCI switches, two a socket, each with two GPUs and one NIC; a storage NIC on a bridge of its own."""
    for switch in range(4):
        bridge = f"pci0000:{switch}0/0000:{switch}0:01.0/0000:{switch}1:00.0"
        for slot in range(2):
            machine.gpu(f"{bridge}/0000:{switch}2:0{slot}.0/0000:{switch}{3 + slot}:00.0", switch // 2)
        machine.nic(f"mlx5_{switch}", f"{bridge}/0000:{switch}2:10.0/0000:{switch}5:00.0", switch // 2)
    machine.nic("mlx5_9", "pci0000:90/0000:90:01.0/0000:91:00.0", 0, link="Ethernet")
    return machine


def test_gpus_of_one_switch_share_its_nic(machine: Machine) -> None:
    switched(machine)
    assert [machine.choice(index) for index in range(8)] == [f"mlx5_{index // 2}:1" for index in range(8)]


def test_a_port_that_is_down_is_passed_over_for_the_next_nearest(machine: Machine) -> None:
    switched(machine)
    port = machine.sysfs / "class/infiniband/mlx5_1/ports/1/state"
    for state in ("1: DOWN", "2: INIT", "garbage"):
        port.write_text(state)
        assert machine.choice(2) == "mlx5_0:1,mlx5_9:1"
    assert machine.choice(0) == "mlx5_0:1"


def test_all_rails_at_the_same_distance_are_taken_and_not_the_one_that_is_down(machine: Machine) -> None:
    """The reference system's GPU 4: three NICs on its switch, one of them DOWN."""
    switch = "pci0000:a0/0000:a0:01.0/0000:a1:00.0"
    machine.gpu(f"{switch}/0000:a2:00.0/0000:a3:00.0")
    machine.nic("mlx5_4", f"{switch}/0000:a2:10.0/0000:a4:00.0")
    machine.nic("mlx5_5", f"{switch}/0000:a2:11.0/0000:a5:00.0", state="1: DOWN")
    machine.nic("mlx5_6", f"{switch}/0000:a2:12.0/0000:a6:00.0")
    machine.nic("mlx5_0", "pci0000:a0/0000:a0:02.0/0000:b1:00.0")
    assert machine.choice(0) == "mlx5_4:1,mlx5_6:1"


def test_two_ports_of_one_card_are_two_rails(machine: Machine) -> None:
    machine.gpu("pci0000:00/0000:00:01.0/0000:01:00.0")
    machine.nic("mlx5_0", "pci0000:00/0000:00:02.0/0000:02:00.0")
    second = machine.sysfs / "class/infiniband/mlx5_0/ports/2"
    second.mkdir()
    (second / "state").write_text("4: ACTIVE\n")
    assert machine.choice(0) == "mlx5_0:1,mlx5_0:2"


def test_across_host_bridges_the_socket_decides(machine: Machine) -> None:
    """RoCE NICs with a host bridge each: none below the GPU's, so those of its NUMA node, all of them."""
    machine.gpu("pci0000:10/0000:10:01.0/0000:11:00.0", numa=1)
    machine.nic("roce_0", "pci0000:20/0000:20:01.0/0000:21:00.0", numa=0, link="Ethernet")
    machine.nic("roce_1", "pci0000:30/0000:30:01.0/0000:31:00.0", numa=1, link="Ethernet")
    machine.nic("roce_2", "pci0000:40/0000:40:01.0/0000:41:00.0", numa=1, link="Ethernet")
    assert machine.choice(0) == "roce_1:1,roce_2:1"


def test_an_unknown_numa_node_is_nobodys_neighbour(machine: Machine) -> None:
    """A virtual machine shows -1 everywhere: everything is equally far."""
    machine.gpu("pci0000:10/0000:11:00.0", numa=-1)
    machine.nic("mlx5_0", "pci0000:20/0000:21:00.0", numa=-1)
    machine.nic("mlx5_1", "pci0000:30/0000:31:00.0", numa=0)
    assert machine.choice(0) == "mlx5_0:1,mlx5_1:1"


def test_without_an_active_port_ucx_chooses(machine: Machine, tmp_path: Path) -> None:
    machine.gpu("pci0000:00/0000:00:01.0/0000:01:00.0")
    assert machine.choice(0) is None
    machine.nic("mlx5_0", "pci0000:00/0000:00:02.0/0000:02:00.0", state="1: DOWN")
    assert machine.choice(0) is None
    assert nic.net_devices(7, sysfs=tmp_path / "nothing", gpus=[], environ={}) is None


def test_a_software_device_without_pci_is_no_candidate(machine: Machine) -> None:
    switched(machine)
    ports = machine.sysfs / "class/infiniband/rxe0/ports/1"
    ports.mkdir(parents=True)
    (ports / "state").write_text("4: ACTIVE\n")
    assert "rxe0:1" not in [port.name for port in nic.active_ports(machine.sysfs)]


@pytest.mark.parametrize(
    ("setting", "index", "expected"),
    [
        ("6,1", 0, "mlx5_3:1"),
        ("6,1", 1, "mlx5_0:1"),
        ("GPU-00000004-aaaa", 0, "mlx5_2:1"),
        ("GPU-00000004, GPU-00000000", 1, "mlx5_0:1"),
        ("3,-1,0", 0, "mlx5_1:1"),
    ],
)
def test_visible_devices_are_counted_as_cuda_counts_them(
    machine: Machine, setting: str, index: int, expected: str
) -> None:
    assert switched(machine).choice(index, setting) == expected


@pytest.mark.parametrize(
    ("setting", "index"), [("3,-1,0", 1), ("", 0), ("99", 0), ("GPU-0000000", 0), ("MIG-abc", 0), ("2,2", 1)]
)
def test_a_device_that_cuda_would_not_show_is_an_error(machine: Machine, setting: str, index: int) -> None:
    with pytest.raises(NicError, match="visible"):
        switched(machine).choice(index, setting)


def test_a_gpu_that_sysfs_lacks_is_an_error(machine: Machine) -> None:
    switched(machine).gpus[0] = Gpu("GPU-x", "0000:ee:00.0")
    with pytest.raises(NicError, match="0000:ee:00"):
        machine.choice(0)


def test_gpus_from_the_drivers_proc_files_are_in_pci_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nic, "_from_nvml", list)
    for bus, uuid in (("0000:c1:00.0", "GPU-bbb"), ("0000:1B:00.0", "GPU-aaa")):
        folder = tmp_path / bus
        folder.mkdir()
        (folder / "information").write_text(
            f"Model: \t\t NVIDIA H200\nIRQ:   \t\t 77\nGPU UUID: \t {uuid}\nBus Location: \t {bus}\n"
        )
    assert nic.all_gpus(tmp_path) == [Gpu("GPU-aaa", "0000:1b:00.0"), Gpu("GPU-bbb", "0000:c1:00.0")]
    assert nic.all_gpus(tmp_path / "none") == []


def test_nvmls_way_of_writing_an_address() -> None:
    assert nic.bus_address(b"00000000:1B:00.0") == nic.bus_address("0000:1b:00.0") == "0000:1b:00.0"


def test_of_the_ports_that_are_wanted_a_gpu_takes_the_nearest(machine: Machine) -> None:
    switched(machine)
    wanted = ("mlx5_0:1", "mlx5_3:1", "eth0")
    assert [machine.choice(index, wanted=wanted) for index in (0, 7)] == ["mlx5_0:1", "mlx5_3:1"]
    assert machine.choice(0, wanted=("eth0",)) is None


def test_devices_that_are_there_are_taken_as_they_are_named(machine: Machine) -> None:
    switched(machine)
    assert nic.chosen_devices(("lo", "mlx5_1:1"), sysfs=machine.sysfs) == "lo,mlx5_1:1"


@pytest.mark.parametrize("missing", ["eth77", "mlx5_1:2", "mlx5_1"])
def test_a_device_that_is_not_there_is_named_beside_those_that_are(machine: Machine, missing: str) -> None:
    switched(machine)
    words = rf"transport.net_devices names '{missing}', which .* does not have; it has .*lo.*mlx5_0:1"
    with pytest.raises(NetDeviceMissing, match=words) as caught:
        nic.chosen_devices(("lo", missing), sysfs=machine.sysfs)
    assert (caught.value.fault, caught.value.retry) == ("config", False)
