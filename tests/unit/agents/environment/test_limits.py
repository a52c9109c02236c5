"""Limits of this process, set and read back where that can be done, and files as the kernel writes them."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from weightsync.agents.environment import limits

NOBODY = "Name:\tpython\nCapEff:\t0000000000000000\n"
LOCKER = "Name:\tpython\nCapEff:\t0000000000004000\n"


@pytest.mark.parametrize(
    ("status", "soft", "rdma", "level"),
    [
        (NOBODY, 65536, True, "error"),
        (NOBODY, 65536, False, "note"),
        (NOBODY, -1, True, "ok"),
        (NOBODY, resource.RLIM_INFINITY, True, "ok"),
        (LOCKER, 65536, True, "ok"),
        ("", 65536, True, "error"),
    ],
)
def test_locked_memory(tmp_path: Path, status: str, soft: int, rdma: bool, level: str) -> None:
    file = tmp_path / "status"
    file.write_text(status)
    assert [finding.level for finding in limits.locked_memory(rdma, soft, file)] == [level]


def test_a_process_under_a_real_limit() -> None:
    ask = (
        "import resource, pathlib; from weightsync.agents.environment import limits;"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536));"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512));"
        "print([f.level for f in (*limits.locked_memory(True, status=pathlib.Path('/')), *limits.open_files())])"
    )
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "['error', 'warning']"


def test_shared_memory(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert [f.level for f in limits.shared_memory(tmp_path, enough=free // 2)] == ["ok"]
    assert [f.level for f in limits.shared_memory(tmp_path, enough=free * 2)] == ["warning"]
    assert [f.level for f in limits.shared_memory(tmp_path / "none")] == ["error"]


@pytest.mark.parametrize(("scope", "levels"), [("0", []), ("1", []), ("2", ["warning"]), ("3", ["warning"]), ("x", [])])
def test_neighbours(tmp_path: Path, scope: str, levels: list[str]) -> None:
    file = tmp_path / "ptrace_scope"
    file.write_text(f"{scope}\n")
    assert [finding.level for finding in limits.neighbours(file)] == levels
    assert list(limits.neighbours(tmp_path / "none")) == []


def test_open_files() -> None:
    assert [f.level for f in limits.open_files(1024)] == ["warning"]
    assert [f.level for f in limits.open_files(65536)] == ["ok"]
    assert [f.level for f in limits.open_files(-1)] == ["ok"]


def test_room() -> None:
    assert [f.level for f in limits.room(2_000, 1_000, "here", "this")] == ["error"]
    assert [f.level for f in limits.room(1_000, 2_000, "here", "this")] == ["ok"]


def test_free_memory_is_the_machines_or_the_containers(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 2000 kB\nMemFree: 100 kB\nMemAvailable: 1000 kB\n")
    assert limits.free_memory(meminfo, tmp_path) == 1_024_000
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("500000\n")
    assert limits.free_memory(meminfo, tmp_path) == 1_024_000
    (tmp_path / "memory.max").write_text("700000\n")
    assert limits.free_memory(meminfo, tmp_path) == 200_000
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    (tmp_path / "memory/memory.usage_in_bytes").write_text("1\n")
    assert limits.free_memory(meminfo, tmp_path) == 1_024_000
    assert 0 < limits.free_memory() < 2**50
