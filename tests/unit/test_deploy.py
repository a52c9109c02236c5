"""The files under deploy/: they parse, agree with the program, and the job script does what it says."""

import configparser
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from weightsync.orchestrator.cli.common import Exit
from weightsync.orchestrator.cli.main import parser
from weightsync.orchestrator.daemon.outbox import STUCK_SECONDS
from weightsync.orchestrator.daemon.runner import STOP_SECONDS
from weightsync.orchestrator.settings.credentials import ROLES
from weightsync.orchestrator.settings.sections import DeadlinesSection
from weightsync.orchestrator.settings.settings import load

DEPLOY = Path(__file__).parents[2] / "deploy"
UNIT = DEPLOY / "systemd" / "weightsync-orchestrator@.service"
JOB = DEPLOY / "slurm" / "weightsync.sbatch"


def unit() -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return parser


def test_the_unit_does_not_restart_what_cannot_get_better() -> None:
    service = unit()["Service"]
    assert service["Restart"] == "always"
    assert set(service["RestartPreventExitStatus"].split()) == {str(Exit.USAGE.value), str(Exit.CONFIG.value)}
    assert unit()["Unit"]["StartLimitIntervalSec"] == "0"
    assert int(service["LimitNOFILE"]) >= 65536
    loaded = re.findall(r"^LoadCredential=(\S+):/etc/weightsync/credentials/(\S+)$", UNIT.read_text(), re.MULTILINE)
    assert loaded == [(f"{role}.token",) * 2 for role in ROLES]
    for hardening in ("NoNewPrivileges", "ProtectHome", "PrivateDevices", "RestrictSUIDSGID"):
        assert service[hardening] == "yes"


def test_the_unit_is_told_when_the_daemon_serves_and_that_it_works() -> None:
    service = unit()["Service"]
    assert (service["Type"], service["NotifyAccess"]) == ("notify", "main")
    # What may be slow without being broken: a batch that waits for the disk, of which /readyz tells after this time.
    assert float(service["WatchdogSec"]) > 4 * STUCK_SECONDS
    assert float(service["TimeoutStopSec"]) > DeadlinesSection().stop_seconds + STOP_SECONDS
    assert service["LimitCORE"] == "0"
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"


ANALYSE = shutil.which("systemd-analyze")


@pytest.mark.skipif(ANALYSE is None, reason="systemd is not here to be asked")
def test_systemd_understands_the_unit_and_finds_it_closed(tmp_path: Path) -> None:
    assert ANALYSE is not None
    program = tmp_path / "weightsync-orchestrator"
    program.write_text("#!/bin/true")
    program.chmod(0o755)
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/weightsync/bin/weightsync-orchestrator", str(program)))
    for question in (["verify", "--man=no"], ["security", "--offline=true", "--threshold=20"]):  # 2.0
        done = subprocess.run([ANALYSE, *question, copy], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Unknown" not in done.stderr


def test_the_units_environment_fits_the_settings(tmp_path: Path) -> None:
    text = (DEPLOY / "config.example.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text)
    given = dict(re.findall(r"^Environment=(WEIGHTSYNC__\w+)=(.*)$", UNIT.read_text(), re.MULTILINE))
    assert len(given) == 3
    settings = load(tmp_path / "config.yaml", {key: value.replace("%d", "/cred") for key, value in given.items()})
    assert settings.credentials == Path("/cred")
    assert settings.log.format == "json"


STUBS = {
    "scontrol": 'case "$3" in zero) printf "n0\\nn1\\n" ;; one) printf "e0\\ne1\\n" ;; esac',
    "srun": """
        echo "srun $*" >> "$CALLS"
        while [[ $1 == --* ]]; do shift; done
        SLURMD_NODENAME=e0 exec "$@" """,
    "sleep": "exit 0",
    # The first words of each line of *_ENDS are what it does at its first start, its second, ….
    "weightsync-orchestrator": """
        echo "weightsync-orchestrator $*" >> "$CALLS"
        [ "$1" != config ] || exit "${CHECK_ENDS:-0}"
        [ "$1" != tokens ] || { mkdir -p "$2"; touch "$2/old.token"; chmod 644 "$2/old.token"; }
        [ "$1" != certs ] || mkdir -p "$2"
        [ "$1" != run ] || exec starts daemon $DAEMON_ENDS """,
    "vllm": """
        echo "vllm $* as $WEIGHTSYNC_ENGINE by $WEIGHTSYNC_TOKEN_FILE" >> "$CALLS"
        exec starts vllm $VLLM_ENDS """,
    "trainer": """
        echo "trainer by $WEIGHTSYNC_TOKEN_FILE to $WEIGHTSYNC_HUB_URL" >> "$CALLS"
        exec starts trainer $TRAINER_ENDS """,
    # starts NAME CODE...: ends with the code of this start; where that is "stays", with 0 when it is told to end; where
    # it is a word, with 0 once somebody of that name stays.
    "starts": """
        name=$1; number=$(cat "$HERE/$1.number" 2> /dev/null || echo 1); echo $((number + 1)) > "$HERE/$1.number"
        shift "$number"; what=${1:?more starts than expected}
        trap 'exit 0' TERM
        case $what in
            [0-9]*) exit "$what" ;;
            stays) touch "$HERE/$name.stays"; while true; do /bin/sleep 0.02; done ;;
            *) for one in ${what//,/ }; do until [ -e "$HERE/$one.stays" ]; do /bin/sleep 0.02; done; done; exit 0 ;;
        esac""",
}


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, body in STUBS.items():
        (stubs / name).write_text(f"#!/bin/bash\n{body}\n")
        (stubs / name).chmod(0o755)
    return {
        "PATH": f"{stubs}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "HERE": str(tmp_path),
        "RUN_ID": "glm", "RUN_DIRECTORY": str(tmp_path / "run"), "MODEL": "/m", "TRAINER": "trainer",
        "SLURM_JOB_NODELIST_HET_GROUP_0": "zero", "SLURM_JOB_NODELIST_HET_GROUP_1": "one", "SLURM_JOB_ID": "5",
        "SLURM_NTASKS_HET_GROUP_0": "16", "DAEMON_ENDS": "stays", "VLLM_ENDS": "stays", "TRAINER_ENDS": "daemon,vllm",
    }  # fmt: skip


def run(environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The job to its end; what it leaves behind ends with it, as SLURM has the steps of a job."""
    command = ["bash", str(JOB)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environ, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as job:
        try:
            out, err = job.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, job.returncode, out, err)


def test_the_job_restarts_what_dies_and_ends_with_its_trainer(job: dict[str, str], tmp_path: Path) -> None:
    done = run(job | {"DAEMON_ENDS": "70 75 stays", "VLLM_ENDS": "1 0 stays"})
    assert done.returncode == 0, done.stderr
    assert "weightsync-orchestrator ended with 70" in done.stderr
    assert "vllm ended with 1" in done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    credentials = tmp_path / "run" / ".weightsync-credentials"
    assert calls.count(f"weightsync-orchestrator run --config {tmp_path / 'run' / 'weightsync.yaml'}") == 3
    served = (
        "vllm serve /m --host e0 --port 15005 --tensor-parallel-size 8 --weight-transfer-config"
        f' {{"backend": "weightsync"}} as engine-e0 by {credentials}/engine.token'
    )
    assert calls.count(served) == 3
    assert f"trainer by {credentials}/trainer.token to wss://n0:10005/agents" in calls


def test_the_jobs_configuration_loads_and_nothing_of_it_is_for_others(job: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "weightsync.yaml").write_text("an old one, for all to read")
    done = run(job)
    assert done.returncode == 0, done.stderr
    settings = load(tmp_path / "run" / "weightsync.yaml", {})
    assert settings.run.id == "glm"
    assert settings.agents_url == "https://n0:10005"
    assert settings.trainer.world == 16
    assert [(engine.name, engine.url) for engine in settings.engines] == [
        ("engine-e0", "http://e0:15005"), ("engine-e1", "http://e1:15005"),
    ]  # fmt: skip
    assert settings.deadlines.stop_seconds < 30
    assert settings.credentials == tmp_path / "run" / ".weightsync-credentials"
    assert settings.listen.tls is not None
    certificates = tmp_path / "run" / ".weightsync-certificates"
    assert settings.listen.tls.ca_file == certificates / "ca.pem"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert f"weightsync-orchestrator certs {certificates} --host n0" in calls
    assert f"weightsync-orchestrator tokens {settings.credentials}" in calls
    for path in (tmp_path / "run").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize(
    ("changed", "code", "says"),
    [
        ({"TRAINER_ENDS": "3"}, 3, ""),
        ({"DAEMON_ENDS": "78", "TRAINER_ENDS": "stays"}, 78, "the daemon or the vLLM servers ended with 78"),
        ({"DAEMON_ENDS": "0", "TRAINER_ENDS": "stays"}, 1, "ended with 0, and with them the job"),
        ({"VLLM_ENDS": "1 1 7", "ENGINE_STARTS": "3", "TRAINER_ENDS": "stays"}, 7, "is not started any more"),
        ({"VLLM_ENDS": "0", "ENGINE_STARTS": "1", "TRAINER_ENDS": "stays"}, 1, "vllm ended with 0"),
        ({"CHECK_ENDS": "78"}, 78, ""),
        ({"MODEL": ""}, 1, "model directory for vLLM"),
        ({"VLLM_PORT": "8000"}, 2, "VLLM_PORT=8000 is a variable of vLLM's own sockets"),
    ],
)
def test_the_job_ends_with_the_code_of_what_cannot_go_on(
    job: dict[str, str], changed: dict[str, str], code: int, says: str
) -> None:
    done = run(job | changed)
    assert done.returncode == code, done.stderr
    assert says in done.stderr


def test_the_job_takes_no_variable_for_its_own_that_vllm_reads() -> None:
    used = set(re.findall(r"\b(VLLM_\w+)", JOB.read_text()))
    assert used == {"VLLM_PORT", "VLLM_SERVER_DEV_MODE"}


IMAGE = DEPLOY / "container"


def test_the_image_runs_the_daemon_as_a_number_and_asks_it_by_its_configuration() -> None:
    text = (IMAGE / "Containerfile").read_text()
    assert 'ENTRYPOINT ["weightsync-orchestrator"]' in text
    assert re.search(r"^USER \d+:\d+$", text, re.MULTILINE), "Kubernetes' runAsNonRoot wants a number"
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == ["${PYTHON}"] * 2, "one argument pins both by digest"
    assert re.findall(r"^ARG (.*)$", text, re.MULTILINE) == ["PYTHON"], "it has no default, which could be a tag alone"
    (check,) = re.findall(r'CMD \["weightsync-orchestrator", (.*)\]$', text, re.MULTILINE)
    options = parser().parse_args([word.strip(' "') for word in check.split(",")])
    assert (options.ready, options.config) == (True, None)
    assert f"WEIGHTSYNC_CONFIG={'/etc/weightsync/config.yaml'}" in text
    for line in re.findall(r"pip .*?install .*?(?:\.txt|\.whl)", text.replace("\\\n", " ")):
        assert "--require-hashes" in line or "--no-deps" in line, line


def pins(file: Path) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==(\S+) \\\n(?:    --hash=sha256:[0-9a-f]{64})", file.read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def test_the_image_has_pinned_what_the_daemon_needs_in_the_releases_that_are_tested() -> None:
    pinned = pins(IMAGE / "requirements.txt")
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
    tested = (DEPLOY.parent / "tests" / "requirements-cpu.txt").read_text()
    releases = {canonicalize_name(n): v for n, v in re.findall(r"^([\w.-]+)==(\S+)", tested, re.MULTILINE)}
    both = pinned.keys() & releases.keys()
    assert {name: pinned[name] for name in both} == {name: releases[name] for name in both}, (
        "run deploy/container/pins.sh"
    )
    assert pins(IMAGE / "build-requirements.txt") == {"setuptools": releases["setuptools"]}


def test_the_bill_of_materials_is_that_of_the_pins() -> None:
    bill = json.loads((IMAGE / "sbom.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    parts = {canonicalize_name(part["name"]): part["version"] for part in bill["components"]}
    assert parts == pins(IMAGE / "requirements.txt"), "run deploy/container/pins.sh"
    assert all(part["purl"].startswith("pkg:pypi/") and part["licenses"] for part in bill["components"])


def test_the_image_is_made_of_what_the_wheel_needs_and_of_nothing_else() -> None:
    allowed = {line[1:] for line in (DEPLOY.parent / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert "*" in (DEPLOY.parent / ".dockerignore").read_text().splitlines()
    assert {"orchestrator", "agents", "kernels", "pyproject.toml", "README.md", "LICENSE"} <= allowed
    example = Path(os.path.realpath(DEPLOY.parent / "orchestrator" / "settings" / "example.yaml"))
    assert example.relative_to(DEPLOY.parent).parts[0] in allowed, "a link in the package leads there"
    assert not allowed & {".git", ".venv", "tests"}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (IMAGE / "Containerfile").read_text(), re.MULTILINE)
    sources = {Path(word) for words in copied for word in words.split() if word != "."}
    assert len(sources) == 3
    for source in sources:
        assert (DEPLOY.parent / source).is_file(), source
        assert source.parts[0] in allowed, source
