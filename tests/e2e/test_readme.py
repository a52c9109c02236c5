"""The README's trainer, as it stands: its block runs in a process of its own before a real daemon and a real engine."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from fleet import fleet
from reference import plain, reference_answers
from serving import HOST, Serve, answers, tiny_qwen3

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

README = Path(__file__).resolve().parents[2] / "README.md"


def block() -> str:
    """The one fenced Python block."""
    (found,) = re.findall(r"^ *```python\n(.*?)^ *```$", README.read_text(), re.MULTILINE | re.DOTALL)
    return textwrap.dedent(found)


def test_the_block_publishes_what_a_fresh_engine_would_answer(serve: Serve, qwen3: Path, tmp_path: Path) -> None:
    trained = tiny_qwen3(tmp_path / "path" / "to" / "model", seed=2)
    server = serve(qwen3, log=tmp_path / "vllm.log")
    with fleet(tmp_path / "fleet", {"engine": server}) as whole:
        server.wait_ready()
        environment = {
            **os.environ,
            "WEIGHTSYNC_HUB_URL": f"ws://{HOST}:{whole.port}/agents",
            "WEIGHTSYNC_TOKEN_FILE": str(whole.token),
            "WEIGHTSYNC_RUN_ID": whole.run_id,
            "WEIGHTSYNC_RUN_DIR": str(whole.directory / "run"),
            "UCX_TLS": "tcp,self,sm",
        }
        command = [sys.executable, "-c", block()]
        ran = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert ran.returncode == 0, ran.stderr[-4000:]
        for step in (1, 2):
            assert (whole.directory / "run" / "broadcasts" / f"step_{step}" / "COMMITTED").exists()
        said = plain(answers(server))
    assert [said] == reference_answers(qwen3, [trained], tmp_path / "shim")
