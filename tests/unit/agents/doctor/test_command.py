"""The command as it is typed, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from weightsync.agents.doctor import command
from weightsync.agents.doctor.command import main
from weightsync.agents.memory.nic import Gpu
from weightsync.orchestrator.protocol.findings import WIDTH, Findings


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WEIGHTSYNC", "UCX", "VLLM"))}
    command = [sys.executable, "-m", "weightsync.agents", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=clean | environ)


def test_a_trainer_that_knows_no_daemon() -> None:
    done = run("trainer")
    assert done.returncode == 2, done.stderr
    assert "no hub_url" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= WIDTH


def test_an_engine_as_json(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("0123456789abcdef0123")
    done = run(
        "--json", "--timeout", "5", "--peer", "127.0.0.1",
        WEIGHTSYNC_ENGINE="a", WEIGHTSYNC_RUN_ID="glm", WEIGHTSYNC_TOKEN_FILE=str(token),
        WEIGHTSYNC_HUB_URL="ws://127.0.0.1:9/agents", UCX_TLS="tcp", PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    told = msgspec.json.decode(done.stdout, type=Findings)
    assert told.place.startswith("engine on ")
    levels = {finding.check: finding.level for finding in told.findings}
    assert levels["VLLM_SERVER_DEV_MODE"] == levels["daemon"] == "error"
    assert levels["PYTORCH_CUDA_ALLOC_CONF"] == "warning"
    assert levels["plugin"] == levels["nixl"] == "ok"
    assert levels["token"] == "ok"


def test_a_check_that_breaks_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks() -> list[Gpu]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(command, "all_gpus", breaks)
    assert main(["doctor", "engine", "--json", "--peer", "nowhere.invalid"]) == 2
    found = msgspec.json.decode(capsys.readouterr().out, type=Findings).findings
    told = {finding.check: finding.what for finding in found}
    assert told["GPUs"] == "could not be looked at: PermissionError: [Errno 13] Permission denied"
    assert "nowhere.invalid has no IPv4 address" in [f.what.partition(":")[0] for f in found if f.check == "network"]
    assert {"nixl", "plugin", "settings"} <= told.keys()


def test_room_for_a_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "trainer", "--weights-gb", "3600"]) == 2
    assert "a rank's slots, which hold a version beside what is trained, takes 3600.0 GB" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_wrong_number() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--timeout", "-1"])
    assert ended.value.code == 2
