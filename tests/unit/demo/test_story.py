"""What the demo says when it cannot go on, and what it says while it waits."""

import subprocess
from pathlib import Path

import pytest
from weightsync.orchestrator.demo.children import Child
from weightsync.orchestrator.demo.story import DemoFailed, starting


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


def test_what_is_awaited_is_said_in_a_sentence_of_ours(tmp_path: Path) -> None:
    def said(log: str) -> str:
        return starting(child(tmp_path, log))

    assert said("") == "engine: step 1 of 5, its API server imports vLLM"
    began = "(APIServer pid=1) INFO 11-27 03:08:37 [api_utils.py:286] non-default args: {}\n"
    core = "(EngineCore pid=2) INFO 11-27 03:08:46 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config\n"
    assert said(began) == "engine: step 2 of 5, its engine core imports vLLM"
    assert (
        said(began + core + "(EngineCore pid=2) \treserved_cpus=[]") == "engine: step 3 of 5, its worker imports vLLM"
    )
    assert said(began + core + "Starting to load model /m") == "engine: step 4 of 5, its worker makes the model"
    assert (
        said("init engine (profile, create kv cache) took 0.1 s")
        == "engine: step 5 of 5, its API server opens the port"
    )
