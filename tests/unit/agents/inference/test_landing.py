"""Where versions land in a worker, and how much memory it takes for that."""

from pathlib import Path

import numpy as np
import pytest
import torch
from weightsync.agents.inference import landing
from weightsync.agents.inference.landing import LANDING_VARIABLE, MIB, LandingChoice, choose_landing, free_bytes
from weightsync.agents.inference.modes import MODE_VARIABLE, ModeRefused
from weightsync.orchestrator.protocol.landing import arena_bytes
from weightsync.orchestrator.protocol.layout import Layout, Region, Tensor, row

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def layout() -> Layout:
    """One tensor of 64 MiB."""
    rows = np.array([row(0, 0, 0, (0,), (32 * MIB,), (2,))], dtype="<i8")
    tensor = Tensor("w", "bfloat16", (32 * MIB,))
    return Layout((tensor,), (Region(4096, 64 * MIB, "DRAM", 0),), rows.tobytes())


NEEDED = arena_bytes(layout())
NEEDED_MIB = -(-NEEDED // MIB)


@pytest.fixture(autouse=True)
def _plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LANDING_VARIABLE, raising=False)
    monkeypatch.setattr(landing, "free_bytes", lambda: 4096 * MIB)


def chosen(
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    budget: int | None = None,
    device: torch.device = CPU,
    paged: bool = False,
) -> LandingChoice:
    monkeypatch.setenv(MODE_VARIABLE, mode)
    if budget is not None:
        monkeypatch.setenv(LANDING_VARIABLE, str(budget))
    return choose_landing(layout(), device, paged)


@pytest.mark.parametrize(("budget", "size"), [(None, 64 * MIB), (0, 0), (3, 3 * MIB)])
def test_live_takes_its_budget_and_little_without_one(
    monkeypatch: pytest.MonkeyPatch, budget: int | None, size: int
) -> None:
    assert chosen(monkeypatch, "live", budget) == LandingChoice("live", size, "WEIGHTSYNC_MODE=live")


@pytest.mark.parametrize("mode", ["copy", "auto"])
@pytest.mark.parametrize("budget", [None, NEEDED_MIB, 4000])
def test_an_arena_is_as_long_as_a_version_needs_whatever_the_budget(
    monkeypatch: pytest.MonkeyPatch, mode: str, budget: int | None
) -> None:
    found = chosen(monkeypatch, mode, budget)
    assert (found.lands, found.bytes) == ("copy", NEEDED)
    assert NEEDED > 64 * MIB


def test_a_budget_that_is_too_small_is_refused_or_avoided(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModeRefused, match=f"WEIGHTSYNC_LANDING_MIB is 60, and .*copy needs {NEEDED_MIB} in this rank"):
        chosen(monkeypatch, "copy", 60)
    found = chosen(monkeypatch, "auto", 60)
    assert (found.lands, found.bytes) == ("live", 60 * MIB)
    assert found.why == f"a whole version needs {NEEDED_MIB} MiB, and WEIGHTSYNC_LANDING_MIB is 60"


def test_a_version_that_would_take_half_of_what_the_host_has_left_lands_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landing, "free_bytes", lambda: 2 * NEEDED)
    assert chosen(monkeypatch, "auto").lands == "copy"
    monkeypatch.setattr(landing, "free_bytes", lambda: 2 * NEEDED - 2)
    found = chosen(monkeypatch, "auto")
    assert (found.lands, found.bytes) == ("live", 64 * MIB)
    assert "more than half of the" in found.why
    assert chosen(monkeypatch, "copy").lands == "copy", "whoever asks for it gets it"


def test_device_memory_is_taken_only_as_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, "auto", None, CUDA).lands == "live"
    assert chosen(monkeypatch, "copy", None, CUDA).lands == "copy"
    assert chosen(monkeypatch, "auto", NEEDED_MIB, CUDA).lands == "copy"


def test_pages_are_flipped_and_need_only_a_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("auto", "flip"):
        found = chosen(monkeypatch, mode, None, CUDA, paged=True)
        assert (found.lands, found.bytes) == ("flip", 64 * MIB)
    with pytest.raises(ModeRefused, match="WEIGHTSYNC_MODE=flip: the weights do not lie in pages"):
        chosen(monkeypatch, "flip")


@pytest.mark.parametrize("budget", ["many", "-1", "1.5", "9" * 10])
def test_a_budget_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, budget: str) -> None:
    monkeypatch.setenv(LANDING_VARIABLE, budget)
    monkeypatch.setenv(MODE_VARIABLE, "live")
    with pytest.raises(ModeRefused, match=f"WEIGHTSYNC_LANDING_MIB is '{budget}'; give whole MiB"):
        choose_landing(layout(), CPU, False)


def test_free_memory_is_what_linux_says(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:  512 kB\nHugePages_Total:  0\n")
    assert free_bytes(meminfo) == 512 * 1024
    meminfo.write_text("MemTotal:  9000 kB\n")
    assert free_bytes(meminfo) == 0
    assert free_bytes(tmp_path / "none") == 0
