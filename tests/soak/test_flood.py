"""Strangers beside a running fleet, for a few seconds; ``make flood`` measures what they cost."""

from pathlib import Path

import pytest
from flood import BOUNDS, Besieged, Crowds

PUSHES = 10


@pytest.mark.e2e
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("with_tls", "places"), [(False, 2048), (True, 1024)])
def test_a_fleet_goes_on_while_all_places_of_strangers_are_taken(tmp_path: Path, with_tls: bool, places: int) -> None:
    """Every push is committed on both engines, the log is short and the memory bounded."""
    besieged = Besieged(tmp_path, Crowds(half=1500, idle=1500, wrong=200, with_tls=with_tls))
    try:
        before = besieged.memory()
        block = besieged.block(PUSHES, besieged.strangers)
        assert besieged.memory() - before < BOUNDS["flood_rss_mb"]
        besieged.soak.committed = PUSHES
        besieged.soak._all_serve()
    finally:
        besieged.close()
    assert len(block.seconds) == PUSHES
    assert 0 < len(block.warnings) < 100, block.warnings
    held = sum(block.told[kind]["at_once"] + block.told[kind].get("ended", 0) for kind in ("half_open", "idle"))
    assert held >= places, f"there were too few of them to show anything: {block.told}"
    assert block.told["wrong_token"]["401"] > 0
