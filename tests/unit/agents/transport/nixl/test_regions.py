"""Memory that must not be registered is refused before NIXL, which takes it silently."""

from pathlib import Path

import pytest
from weightsync.agents.transport.nixl import regions as region_checks
from weightsync.agents.transport.nixl.errors import RegionError
from weightsync.orchestrator.protocol.layout import Region

MAPS = """\
7f0000000000-7f0000001000 rw-p 00000000 00:00 0
7f0000001000-7f0000003000 rw-s 00000000 00:05 12    /dev/shm/x
7f0000003000-7f0000004000 r--p 00000000 08:01 99    /lib/x.so
7f0000004000-7f0000005000 rw-p 00001000 08:01 99    /lib/x.so
"""


@pytest.mark.parametrize(
    ("offset", "length", "fits"),
    [(0, 0x3000, True), (0x800, 0x1000, True), (0x2FFF, 2, False), (0x3000, 1, False), (0x4000, 0x1000, True),
     (0x4FFF, 2, False), (-1, 2, False)],
)  # fmt: skip
def test_only_mapped_writable_memory_is_registered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, offset: int, length: int, fits: bool
) -> None:
    maps = tmp_path / "maps"
    maps.write_text(MAPS)
    monkeypatch.setattr(region_checks, "_MAPS", maps)
    region = Region(0x7F0000000000 + offset, length)
    if fits:
        region_checks.check_regions([region])
    else:
        with pytest.raises(RegionError, match="not mapped"):
            region_checks.check_regions([region])


def test_ranges_of_different_devices_do_not_overlap() -> None:
    region_checks.check_regions([Region(1 << 40, 100, "VRAM", 0), Region(1 << 40, 100, "VRAM", 1)])
    with pytest.raises(RegionError, match="overlaps"):
        region_checks.check_regions([Region(1 << 40, 100, "VRAM", 0), Region(1 << 40, 1, "VRAM", 0)])
