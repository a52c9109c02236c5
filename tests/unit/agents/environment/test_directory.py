"""A run directory on a real disk."""

from pathlib import Path

from weightsync.agents.environment.directory import run_directory


def test_a_run_directory(tmp_path: Path) -> None:
    assert [f.level for f in run_directory(tmp_path)] == ["ok"]
    assert list(tmp_path.iterdir()) == []
    assert [f.level for f in run_directory(Path("/proc/sys"))] == ["error"]  # as root, too
    [missing] = run_directory(tmp_path / "none" / "yet")
    assert (missing.level, "the first publish makes it" in missing.what) == ("note", True)
    assert list(tmp_path.iterdir()) == []
    assert [f.level for f in run_directory(Path("/proc/sys/none"))] == ["error"]
    file = tmp_path / "file"
    file.touch()
    assert [f.level for f in run_directory(file)] == ["error"]
