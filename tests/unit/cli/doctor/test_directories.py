"""The daemon's directories, tried out on real ones."""

import os
from pathlib import Path

import pytest
from weightsync.orchestrator.cli.doctor import directories
from weightsync.orchestrator.cli.doctor.directories import Trial, judged
from weightsync.orchestrator.protocol.findings import Finding

REFUSES = Path("/proc/sys")
"""A real directory that takes no file of anybody, root included, although ``os.access`` may say that it does."""


def levels(found: object) -> list[str]:
    return [finding.level for finding in found if isinstance(finding, Finding)]  # type: ignore[attr-defined]


def test_a_good_directory_takes_a_file_and_keeps_nothing(tmp_path: Path) -> None:
    trial = directories.tried(tmp_path)
    assert trial.seconds > 0
    assert abs(trial.skew) < 1
    assert trial.free == pytest.approx(os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize, rel=0.1)
    assert list(tmp_path.iterdir()) == []
    tmp_path.chmod(0o700)
    quick = [f for f in directories.state_directory(tmp_path) if f.fix != "put it on a faster disk"]
    assert "error" not in levels(quick)


def test_a_directory_that_takes_no_file_is_an_error() -> None:
    [found] = list(directories.run_directory(REFUSES))
    assert (found.level, found.check) == ("error", "run.directory")
    assert "a file cannot be written in /proc/sys: " in found.what
    assert "ReadWritePaths=" in found.fix


def test_what_is_not_there_is_not_tried(tmp_path: Path) -> None:
    assert list(directories.run_directory(tmp_path / "none")) == []
    assert list(directories.state_directory(tmp_path / "none")) == []


@pytest.mark.parametrize(
    ("trial", "texts"),
    [
        (Trial(0.001, 0.0, 10**12), ["takes a file in 1.0 ms"]),
        (Trial(0.2, 0.0, 10**12), ["takes 200 ms to be durable"]),
        (Trial(0.001, -60.0, 10**12), ["its file system's clock is 60 s behind"]),
        (Trial(0.001, 60.0, 10**8), ["its file system's clock is 60 s ahead", "0.1 GB are free"]),
    ],
)
def test_a_slow_a_skewed_and_a_full_disk(trial: Trial, texts: list[str], tmp_path: Path) -> None:
    found = list(judged(trial, tmp_path, "state_directory", 0.05, "a round waits", 10**9))
    assert [text in finding.what for text, finding in zip(texts, found, strict=True)] == [True] * len(texts)


def test_room_for_checkpoints(tmp_path: Path) -> None:
    assert list(directories.room_for_checkpoints(tmp_path, 1000)) == []
    assert list(directories.room_for_checkpoints(tmp_path, 0)) == []
    [found] = directories.room_for_checkpoints(tmp_path, 2**60)
    assert found.level == "error"
    assert "GB are free" in found.what
