"""The command of the demo, as far as it goes without its children."""

from pathlib import Path

import pytest
from weightsync.orchestrator.demo import command as demo
from weightsync.orchestrator.demo.setup import Vllm


def test_a_directory_in_use_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "find_vllm", lambda: Vllm("1.0", "vllm", None))
    (tmp_path / "file").touch()
    assert demo.main(["--directory", str(tmp_path)]) == 2
    assert "name a new one" in capsys.readouterr().err
