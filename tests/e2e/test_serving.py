"""What the other e2e tests stand on: answers follow the bytes of the live weights, and nothing else."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import environment, tiny_qwen3

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def offline(shim: Path, *models: Path) -> list[Any]:
    """Answers of each model in turn, from one process whose weights are overwritten in place."""
    script = Path(__file__).with_name("offline.py")
    done = subprocess.run(
        [sys.executable, str(script), *map(str, models)],
        env=environment(shim, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}),
        stdout=subprocess.PIPE,
        timeout=300,
        check=True,
    )
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_bytes_written_into_live_weights_change_the_answers(qwen3: Path, tmp_path: Path) -> None:
    other = tiny_qwen3(tmp_path / "other", seed=2)
    before, written, back = offline(tmp_path, qwen3, other, qwen3)
    (fresh,) = offline(tmp_path, other)
    assert all(old != new for old, new in zip(before, written, strict=True))
    assert written == fresh
    assert back == before
