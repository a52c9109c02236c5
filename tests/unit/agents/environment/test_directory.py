"""A run directory on a real disk."""

from pathlib import Path

from weightsync.agents.environment.directory import run_directory


def test_a_run_directory(tmp_path: Path) -> None:
    assert [f.level for f in run_directory(tmp_path)] == ["ok"]
    assert list(tmp_path.iterdir()) == []
    assert [f.level for f in run_directory(Path("/proc/sys"))] == ["error"]  # as root, too
    assert [f.level for f in run_directory(tmp_path / "none")] == ["error"]
