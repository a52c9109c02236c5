"""A sysfs tree of PCI devices, as the kernel lays it out."""

from pathlib import Path


def pci_device(sysfs: Path, path: str, numa: int) -> Path:
    """Make the device at ``path`` from the host bridge down, such as ``pci0000:15/0000:15:01.0/0000:16:00.0``, and the
    link to it by which it is looked up. Returns its real place."""
    place = sysfs / "devices" / path
    place.mkdir(parents=True)
    (place / "numa_node").write_text(f"{numa}\n")
    links = sysfs / "bus/pci/devices"
    links.mkdir(parents=True, exist_ok=True)
    (links / place.name).symlink_to(place)
    return place
