"""Trainers of the documents, as they stand: each block runs in processes of its own before a real daemon and engine."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from fleet import Fleet, fleet
from ports import HOST, free_port
from reference import plain, reference_answers
from serving import Serve, answers, tiny_qwen3

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]


def block(page: str) -> str:
    """The one fenced Python block of a page."""
    (found,) = re.findall(r"^ *```python\n(.*?)^ *```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return textwrap.dedent(found)


def environment(whole: Fleet, **more: str) -> dict[str, str]:
    """What the documents say that a trainer rank's environment has."""
    return {
        **os.environ,
        "WEIGHTSYNC_HUB_URL": f"ws://{HOST}:{whole.port}/agents",
        "WEIGHTSYNC_TOKEN_FILE": str(whole.token),
        "WEIGHTSYNC_RUN_ID": whole.run_id,
        "WEIGHTSYNC_RUN_DIR": str(whole.directory / "run"),
        "UCX_TLS": "tcp,self,sm",
        **more,
    }


def test_the_block_publishes_what_a_fresh_engine_would_answer(serve: Serve, qwen3: Path, tmp_path: Path) -> None:
    trained = tiny_qwen3(tmp_path / "path" / "to" / "model", seed=2)
    server = serve(qwen3, log=tmp_path / "vllm.log")
    with fleet(tmp_path / "fleet", {"engine": server}) as whole:
        server.wait_ready()
        command = [sys.executable, "-c", block("README.md")]
        ran = subprocess.run(
            command, cwd=tmp_path, env=environment(whole), capture_output=True, text=True, timeout=300, check=False
        )
        assert ran.returncode == 0, ran.stderr[-4000:]
        for step in (1, 2):
            assert (whole.directory / "run" / "broadcasts" / f"step_{step}" / "COMMITTED").exists()
        said = plain(answers(server))
    assert [said] == reference_answers(qwen3, [trained], tmp_path / "shim")


@pytest.mark.long
def test_the_block_of_fsdp2_publishes_from_two_ranks(serve: Serve, qwen3: Path, tmp_path: Path) -> None:
    """As it stands, but on the CPU, and with two steps instead of a thousand."""
    trained = tiny_qwen3(tmp_path / "path" / "to" / "model", seed=3)
    code = block("docs/how-to/fsdp2.md")
    for said, tried in (('init_device_mesh("cuda"', 'init_device_mesh("cpu"'), ("range(1, 1000)", "range(1, 3)")):
        assert code.count(said) == 1
        code = code.replace(said, tried)
    server = serve(qwen3, log=tmp_path / "vllm.log")
    with fleet(tmp_path / "fleet", {"engine": server}) as whole:
        server.wait_ready()
        of_job = {"WORLD_SIZE": "2", "MASTER_ADDR": HOST, "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
        ranks = []
        for rank in range(2):
            log = tmp_path / f"rank-{rank}.log"
            with log.open("wb") as out:
                variables = environment(whole, RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1", **of_job)
                command = [sys.executable, "-c", code]
                ranks.append((subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=out, stderr=out), log))
        try:
            for process, log in ranks:
                assert process.wait(300) == 0, log.read_text()[-4000:]
        finally:
            for process, _ in ranks:
                process.kill()
        for step in (0, 1, 2):
            assert (whole.directory / "run" / "broadcasts" / f"step_{step}" / "COMMITTED").exists()
        said = plain(answers(server))
    assert [said] == reference_answers(qwen3, [trained], tmp_path / "shim")
