"""What the demo says when it cannot go on, and what it shows of a child's log while it waits."""

import subprocess
from pathlib import Path

import pytest
from weightsync.orchestrator.demo.children import Child
from weightsync.orchestrator.demo.story import DemoFailed, _news


def child(tmp_path: Path, log: str) -> Child:
    path = tmp_path / "engine.log"
    path.write_text(log)
    process = subprocess.Popen(["true"])
    process.wait()
    return Child("engine", process, path)


@pytest.mark.parametrize(
    ("log", "remedy"),
    [
        ("OSError: [Errno 98] Address already in use", "run the demo again"),
        ("torch.OutOfMemoryError: CUDA out of memory", "about 4 GB"),
        ("ValueError: nonsense", "ask somebody"),
    ],
)
def test_a_failure_has_the_end_of_the_log_and_a_remedy(tmp_path: Path, log: str, remedy: str) -> None:
    failed = DemoFailed("engine ended", child(tmp_path, f"first\n{log}\n"), "ask somebody")
    assert failed.log == ["first", log]
    assert failed.path == tmp_path / "engine.log"
    assert remedy in failed.remedy


def test_a_failure_of_nobody_has_no_log() -> None:
    failed = DemoFailed("no round ended")
    assert (failed.log, failed.path, failed.remedy) == ([], None, "")


def test_news_are_the_last_message_without_its_prefix() -> None:
    log = ["(EngineCore pid=12) INFO 07-01 12:00:00 [core.py:1] Loading weights", "  3%|#   | a progress bar"]
    assert _news(log) == "Loading weights"
    assert _news(log[1:]) == log[1]
    assert _news([]) == ""
