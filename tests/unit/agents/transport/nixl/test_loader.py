"""The endpoint's parts that need no peer: loader, environment, chunks, and the look at the memory map."""

import importlib
import itertools
import os
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weightsync.agents.transport.nixl import chunks as nixl_chunks
from weightsync.agents.transport.nixl import loader as nixl_loader
from weightsync.agents.transport.nixl import regions as nixl_regions
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.agents.transport.nixl.environment import environment
from weightsync.agents.transport.nixl.errors import NixlMissingError, RegionError
from weightsync.orchestrator.protocol.layout import Region
from weightsync.orchestrator.protocol.messages import NixlSettings


# --------------------------------------------------------------------------------------------------------- loader
@pytest.fixture
def fresh_loader() -> Iterator[None]:
    nixl_loader.load.cache_clear()
    yield
    nixl_loader.load.cache_clear()


@pytest.mark.usefixtures("fresh_loader")
@pytest.mark.parametrize("present", [["nixl", "nixl_cu12"], ["nixl_cu13", "nixl_cu12"], ["nixl_cu12"]])
def test_the_first_package_that_imports_is_taken(monkeypatch: pytest.MonkeyPatch, present: list[str]) -> None:
    def find(name: str) -> types.ModuleType:
        package, _, part = name.partition(".")
        if package not in present or part != "_api":
            raise ModuleNotFoundError(f"No module named {package!r}")
        module = types.ModuleType(name)
        module.nixlBind = types.ModuleType("bindings")  # type: ignore[attr-defined]
        return module

    monkeypatch.setattr(importlib, "import_module", find)
    assert nixl_loader.load().package == present[0]


@pytest.mark.usefixtures("fresh_loader")
def test_without_nixl_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> types.ModuleType:
        raise ImportError("libucp.so: cannot open")

    monkeypatch.setattr(importlib, "import_module", nothing)
    with pytest.raises(NixlMissingError, match="nixl, nixl-cu13 or nixl-cu12") as caught:
        nixl_loader.load()
    assert "libucp.so" in str(caught.value)
    assert not caught.value.retry


def test_the_bindings_know_the_error_types() -> None:
    bindings = nixl_loader.load()
    assert bindings.disconnected in bindings.errors
    assert len(bindings.errors) >= 10


# ---------------------------------------------------------------------------------------------------- environment
def test_the_environment_is_put_back_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_NET_DEVICES", "mlx5_9:1")
    monkeypatch.setenv("UCX_LOG_LEVEL", "error")
    monkeypatch.delenv("UCX_TLS", raising=False)
    before = dict(os.environ)
    seen: dict[str, str] = {}

    def make() -> None:
        with environment({"UCX_NET_DEVICES": "mlx5_0:1", "UCX_TLS": "tcp", "UCX_LOG_LEVEL": None}):
            seen.update(os.environ)
            raise RuntimeError("no agent")

    with pytest.raises(RuntimeError, match="no agent"):
        make()
    assert seen["UCX_NET_DEVICES"] == "mlx5_0:1"
    assert seen["UCX_TLS"] == "tcp"
    assert "UCX_LOG_LEVEL" not in seen
    assert dict(os.environ) == before


def test_agents_are_made_one_at_a_time() -> None:
    inside, leave, second = threading.Event(), threading.Event(), []

    def first() -> None:
        with environment({"WEIGHTSYNC_TEST": "first"}):
            inside.set()
            leave.wait(10)

    def other() -> None:
        with environment({"WEIGHTSYNC_TEST": "second"}):
            second.append(os.environ["WEIGHTSYNC_TEST"])

    threads = [threading.Thread(target=first), threading.Thread(target=other)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    assert os.environ["WEIGHTSYNC_TEST"] == "first"
    leave.set()
    for thread in threads:
        thread.join(10)
    assert second == ["second"]
    assert "WEIGHTSYNC_TEST" not in os.environ


def test_our_settings_reach_our_agent_and_no_other_in_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transports an agent offers show in the size of its card: a TCP-only one is shorter. A second agent of the
    process, as vLLM's KV connector has one, keeps what its own environment says."""
    monkeypatch.delenv("UCX_TLS", raising=False)

    def foreign() -> int:
        bindings = nixl_loader.load()
        agent = bindings.agent("foreign", backends=("UCX",), progress_thread=False, threads=0)
        return len(agent.get_agent_metadata())

    before = foreign()
    ours = NixlEndpoint("writer", NixlSettings(), net_devices="lo", variables={"UCX_TLS": "tcp"})
    assert foreign() == before
    free = NixlEndpoint("writer", NixlSettings())
    assert len(ours.metadata()) < len(free.metadata())
    assert "UCX_TLS" not in os.environ
    ours.close()
    free.close()


def test_each_incarnation_has_its_own_name() -> None:
    first, second = NixlEndpoint("trainer/0", NixlSettings()), NixlEndpoint("trainer/0", NixlSettings())
    assert first.name.startswith("trainer/0-")
    assert first.name != second.name
    first.close()
    second.close()


# --------------------------------------------------------------------------------------------------------- chunks
@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 2000), min_size=1, max_size=400), st.integers(100, 3000))
def test_chunks_cover_every_byte_once_and_keep_their_limits(lengths: list[int], limit: int) -> None:
    size = np.array(lengths)
    ends = np.cumsum(size)
    total = int(ends[-1])
    runs = np.stack([size * 0, size * 0, ends - size, size * 0, total - ends, size], axis=1)
    [lane] = nixl_chunks.lanes(runs, [Region(1 << 20, total)], [Region(1 << 30, total, device=3)], limit)
    position = 0
    for chunk in lane.chunks:
        assert chunk.first == position
        assert chunk.bytes == lane.local[chunk.first : chunk.last, 1].sum() <= limit
        assert 0 < chunk.last - chunk.first <= nixl_chunks.CHUNK_DESCRIPTORS
        position = chunk.last
    assert position == len(lane.local)
    assert lane.local[:, 0].tolist() == (np.cumsum(lane.local[:, 1]) - lane.local[:, 1] + (1 << 20)).tolist()
    assert np.array_equal(lane.local[:, 1], lane.remote[:, 1])
    assert set(lane.remote[:, 2].tolist()) == {3}
    covered = sorted((int(a) - (1 << 30), int(a + n) - (1 << 30)) for a, n, _ in lane.remote.tolist())
    assert covered[0][0] == 0
    assert covered[-1][1] == total
    assert all(left[1] == right[0] for left, right in itertools.pairwise(covered))


def test_each_pair_of_memories_has_its_own_lane_and_limit() -> None:
    size = 3 * nixl_chunks.HOST_CHUNK_BYTES
    local = [Region(1 << 40, size), Region(2 << 40, size, "VRAM", 1)]
    remote = [Region(3 << 40, size, "VRAM", 5), Region(4 << 40, size)]
    runs = np.array([[0, a, 0, b, 0, size] for a in (0, 1) for b in (0, 1)])
    lanes = nixl_chunks.lanes(runs, local, remote)
    pairs = {(lane.local_memory, lane.remote_memory): len(lane.chunks) for lane in lanes}
    assert pairs == {("DRAM", "VRAM"): 3, ("DRAM", "DRAM"): 3, ("VRAM", "VRAM"): 1, ("VRAM", "DRAM"): 3}


# -------------------------------------------------------------------------------------------------------- regions
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
    monkeypatch.setattr(nixl_regions, "_MAPS", maps)
    region = Region(0x7F0000000000 + offset, length)
    if fits:
        nixl_regions.check_regions([region])
    else:
        with pytest.raises(RegionError, match="not mapped"):
            nixl_regions.check_regions([region])


def test_ranges_of_different_devices_do_not_overlap() -> None:
    nixl_regions.check_regions([Region(1 << 40, 100, "VRAM", 0), Region(1 << 40, 100, "VRAM", 1)])
    with pytest.raises(RegionError, match="overlaps"):
        nixl_regions.check_regions([Region(1 << 40, 100, "VRAM", 0), Region(1 << 40, 1, "VRAM", 0)])
