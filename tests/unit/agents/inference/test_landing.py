"""Where versions land in a worker, and how much memory it takes for that."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from weightsync.agents.inference import landing
from weightsync.agents.inference.landing import (
    ALONE,
    LANDING_VARIABLE,
    MIB,
    LandingChoice,
    Peers,
    choose_landing,
    free_bytes,
)
from weightsync.agents.inference.modes import MODE_VARIABLE, ModeRefused
from weightsync.orchestrator.protocol.landing import arena_bytes
from weightsync.orchestrator.protocol.layout import Layout, Region, Tensor, row

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def layout(mib: int = 64) -> Layout:
    """One tensor of so many MiB."""
    rows = np.array([row(0, 0, 0, (0,), (mib * MIB // 2,), (2,))], dtype="<i8")
    tensor = Tensor("w", "bfloat16", (mib * MIB // 2,))
    return Layout((tensor,), (Region(4096, mib * MIB, "DRAM", 0),), rows.tobytes())


NO_PAGES = "pages are of CUDA devices"
NEEDED = arena_bytes(layout())
NEEDED_MIB = -(-NEEDED // MIB)


@pytest.fixture(autouse=True)
def _plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LANDING_VARIABLE, raising=False)
    monkeypatch.setattr(landing, "free_bytes", lambda: 4096 * MIB)


class Ranks:
    """Some ranks, of which the others say ``said`` one after the other."""

    def __init__(self, count: int = 2, said: Iterable[int] = ()) -> None:
        self.count = count
        self._said = iter(said)

    def least(self, value: int) -> int:
        return min(value, next(self._said, value))


def chosen(
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    budget: int | None = None,
    device: torch.device = CPU,
    no_flip: str = NO_PAGES,
    peers: Peers = ALONE,
    mib: int = 64,
) -> LandingChoice:
    monkeypatch.setenv(MODE_VARIABLE, mode)
    if budget is not None:
        monkeypatch.setenv(LANDING_VARIABLE, str(budget))
    return choose_landing(layout(mib), device, no_flip, peers)


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
    short = f"a whole version needs {NEEDED_MIB} MiB in this rank, and WEIGHTSYNC_LANDING_MIB is 60"
    assert found.why == f"no flip: {NO_PAGES}; no copy: {short}"


def test_what_is_live_for_want_of_more_takes_no_more_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, "auto", NEEDED_MIB - 1).bytes == 64 * MIB
    assert chosen(monkeypatch, "auto", 0).bytes == 0


def test_a_version_that_would_take_half_of_what_the_host_has_left_lands_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landing, "free_bytes", lambda: 2 * NEEDED)
    assert chosen(monkeypatch, "auto").lands == "copy"
    monkeypatch.setattr(landing, "free_bytes", lambda: 2 * NEEDED - 2)
    found = chosen(monkeypatch, "auto")
    assert (found.lands, found.bytes) == ("live", 64 * MIB)
    assert "more than half of the" in found.why
    assert chosen(monkeypatch, "copy").lands == "copy", "whoever asks for it gets it"


def test_ranks_take_from_one_host_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landing, "free_bytes", lambda: 4 * NEEDED)
    assert chosen(monkeypatch, "auto", peers=Ranks(2)).lands == "copy"
    found = chosen(monkeypatch, "auto", peers=Ranks(3))
    assert found.lands == "live"
    assert "MiB in 3 ranks, more than half of the" in found.why


@pytest.mark.parametrize("mode", ["auto", "copy", "live"])
def test_what_one_rank_cannot_have_none_takes(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = chosen(monkeypatch, mode, peers=Ranks(2, [0]))
    assert found.lands == {"auto": "live", "copy": "copy", "live": "live"}[mode]
    if mode == "auto":
        assert found.why.endswith("no copy: another rank of this engine cannot, and its log says why")


def test_a_reason_says_what_did_not_fit_before(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, "auto").why == f"no flip: {NO_PAGES}; {NEEDED_MIB} MiB for a whole version are there"
    assert chosen(monkeypatch, "copy").why == "WEIGHTSYNC_MODE=copy"


def test_device_memory_is_taken_only_as_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, "auto", None, CUDA).lands == "live"
    assert chosen(monkeypatch, "copy", None, CUDA).lands == "copy"
    assert chosen(monkeypatch, "auto", NEEDED_MIB, CUDA).lands == "copy"


def test_pages_are_flipped_and_need_only_a_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("auto", "flip"):
        found = chosen(monkeypatch, mode, None, CUDA, no_flip="", mib=4000)
        assert (found.lands, found.bytes) == ("flip", 2048 * MIB)
    rest = chosen(monkeypatch, "auto", 8000, CUDA, no_flip="", mib=4000)
    assert rest.bytes == 2048 * MIB, "the rest of the budget is standby's"
    assert chosen(monkeypatch, "flip", 4000, CUDA, no_flip="").bytes == 4000 * MIB
    with pytest.raises(ModeRefused, match="WEIGHTSYNC_MODE=flip: the weights do not lie in pages: pages are of CUDA"):
        chosen(monkeypatch, "flip")


@pytest.mark.parametrize("mode", ["live", "flip"])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_no_ring_is_longer_than_what_a_version_needs(
    mode: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = chosen(monkeypatch, mode, None, device, no_flip="", mib=16)
    assert small.bytes == arena_bytes(layout(16)) < 20 * MIB
    assert chosen(monkeypatch, mode, 100, device, no_flip="", mib=16).bytes == 100 * MIB, "unless somebody asks for it"


@pytest.mark.parametrize("budget", ["many", "-1", "1.5", "9" * 10])
def test_a_budget_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, budget: str) -> None:
    monkeypatch.setenv(LANDING_VARIABLE, budget)
    monkeypatch.setenv(MODE_VARIABLE, "live")
    with pytest.raises(ModeRefused, match=f"WEIGHTSYNC_LANDING_MIB is '{budget}'; give whole MiB"):
        choose_landing(layout(), CPU, NO_PAGES)


def test_free_memory_is_what_linux_says(tmp_path: Path) -> None:
    meminfo, none = tmp_path / "meminfo", tmp_path / "none"
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:  512 kB\nHugePages_Total:  0\n")
    assert free_bytes(meminfo, none) == 512 * 1024
    meminfo.write_text("MemTotal:  9000 kB\n")
    assert free_bytes(meminfo, none) == 0
    assert free_bytes(none, none) == 0


def test_a_container_has_what_its_limits_leave(tmp_path: Path) -> None:
    """As in a pod of a unit: each control group may have a limit, and cached files are given back."""
    meminfo, own, cgroups = tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "fs"
    meminfo.write_text("MemAvailable:  512 kB\n")
    own.write_text("1:name=systemd:/elsewhere\n0::/pod/engine\n")
    assert free_bytes(meminfo, own, cgroups) == 512 * 1024, "groups without files have no limit"
    for group, limit, used, cached in (("pod/engine", "max", 9, 9), ("pod", "300000", 280000, 60000)):
        (cgroups / group).mkdir(parents=True, exist_ok=True)
        (cgroups / group / "memory.max").write_text(f"{limit}\n")
        (cgroups / group / "memory.current").write_text(f"{used}\n")
        (cgroups / group / "memory.stat").write_text(f"anon 7\ninactive_file {cached}\n")
    assert free_bytes(meminfo, own, cgroups) == 80000
    (cgroups / "pod/engine/memory.max").write_text("5\n")
    (cgroups / "pod/engine/memory.stat").write_text("inactive_file 0\n")
    assert free_bytes(meminfo, own, cgroups) == 0, "it has taken more than it may"
