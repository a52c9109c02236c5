"""The job script on a real slurmctld and real slurmds: ``make test-slurm``."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from reference import reference_answers
from serving import KV_CACHE_BYTES, MODEL, environment, tiny_qwen3

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(1200)]

HERE = Path(__file__).resolve().parent
JOB = HERE.parents[1] / "deploy" / "slurm" / "weightsync.sbatch"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "ip")
ENGINE = (
    f"--served-model-name {MODEL} --dtype bfloat16 --max-model-len 256 --max-num-seqs 8 --skip-tokenizer-init"
    f" --kv-cache-memory-bytes {KV_CACHE_BYTES} --enforce-eager --no-enable-prefix-caching"
)


@pytest.fixture(autouse=True)
def _slurm() -> None:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    missing += ["root's rights"] if os.geteuid() != 0 else []
    if missing and "WEIGHTSYNC_SLURM" not in os.environ:
        pytest.skip(f"not here: {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge iproute2)")
    assert not missing


def submitted(tmp_path: Path, trainer: str, **more: str) -> subprocess.CompletedProcess[str]:
    """``sbatch --wait`` of the job, whose components are cut to a trainer rank and one engine, without GPUs."""
    head = "\n".join(
        line for line in JOB.read_text().splitlines() if not re.match("#SBATCH --(gpus|excl|nodes|nta)", line)
    )
    head = head.replace("#SBATCH hetjob", "#SBATCH --nodes=1 --ntasks=1\n#SBATCH hetjob\n#SBATCH --nodes=1 --ntasks=1")
    job = tmp_path / "job.sbatch"
    job.write_text(head)
    wanted = {
        **environment(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RUN_ID": "slurm", "RUN_DIRECTORY": str(tmp_path / "run"), "STATE_DIRECTORY": str(tmp_path / "states"),
        "TRAINER": trainer, "TENSOR_PARALLEL": "1", "ENGINE_ARGUMENTS": ENGINE, **more,
    }  # fmt: skip
    wanted["PYTHONPATH"] += f":{HERE}"
    (tmp_path / "states").mkdir(mode=0o700)
    cluster = [str(HERE / "slurm_cluster.sh"), str(tmp_path / "cluster"), "2"]
    batch = ["sbatch", "--wait", f"--output={tmp_path}/log", f"--chdir={tmp_path}", str(job)]
    return subprocess.run([*cluster, *batch], env=wanted, capture_output=True, text=True, timeout=1100, check=False)


def told(tmp_path: Path, done: subprocess.CompletedProcess[str]) -> str:
    log = (tmp_path / "log").read_text(errors="replace") if (tmp_path / "log").exists() else ""
    return f"{done.stdout}{done.stderr}{log[-6000:]}"


def test_a_job_goes_on_after_its_vllm_and_its_daemon_were_killed(tmp_path: Path) -> None:
    served = tiny_qwen3(tmp_path / "served", seed=1)
    trained = tiny_qwen3(tmp_path / "trained", seed=2)
    done = submitted(
        tmp_path, f"{sys.executable} {HERE / 'slurm_trainer.py'}", MODEL=str(served), TRAINED=str(trained),
        ANSWERS=str(tmp_path / "answers.json"),
    )  # fmt: skip
    assert done.returncode == 0, told(tmp_path, done)
    broadcasts = tmp_path / "run" / "broadcasts"
    assert sorted(path.parent.name for path in broadcasts.glob("*/COMMITTED")) == ["step_0", "step_1", "step_2"]
    log = (tmp_path / "log").read_text()
    assert log.count("vllm ended with 137") == 1
    assert log.count("weightsync-orchestrator ended with 137") == 1
    assert [json.loads((tmp_path / "answers.json").read_text())] == reference_answers(
        served, [trained], tmp_path / "shim"
    )
    ours = [path for path in (tmp_path / "run").rglob("*") if broadcasts not in (path, *path.parents)]
    assert {path.name for path in ours} >= {"weightsync.yaml", "engine.token", "daemon.key"}
    assert [path for path in ours if path.stat().st_mode & 0o077] == []


def test_a_job_ends_when_its_vllm_cannot_be_kept(tmp_path: Path) -> None:
    model = tmp_path / "there is no such model"
    done = submitted(tmp_path, "sleep 1000", MODEL=str(model), ENGINE_STARTS="1")
    assert done.returncode != 0
    log = (tmp_path / "log").read_text()
    assert "vllm ended with" in log
    assert "is not started any more" in log
    assert "the daemon or the vLLM servers ended with" in log
