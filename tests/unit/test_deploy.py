"""The files under deploy/: they parse, agree with the program, and the job script does what it says."""

import configparser
import json
import os
import re
import shutil
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
        echo "$*" >> "$CALLS"
        case "$*" in
            *"weightsync-orchestrator run"*)
                count=$(cat "$COUNT" 2> /dev/null || echo 0)
                echo $((count + 1)) > "$COUNT"
                [ "$count" -ge 1 ] && exit 78; exit 70 ;;
            *"vllm serve"*) exit 0 ;;
            *) while [ "$(cat "$COUNT" 2> /dev/null)" != 2 ]; do command sleep 0.02; done ;;
        esac""",
    "sleep": "exit 0",
    "weightsync-orchestrator": 'echo "$*" >> "$CALLS"',
}


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, body in STUBS.items():
        (stubs / name).write_text(f"#!/bin/bash\n{body.replace('command sleep', '/bin/sleep')}\n")
        (stubs / name).chmod(0o755)
    return {
        "PATH": f"{stubs}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "COUNT": str(tmp_path / "count"),
        "RUN_ID": "glm", "RUN_DIRECTORY": str(tmp_path / "run"), "MODEL": "/m", "TRAINER": "python -m trainer",
        "SLURM_JOB_NODELIST_HET_GROUP_0": "zero", "SLURM_JOB_NODELIST_HET_GROUP_1": "one", "SLURM_JOB_ID": "5",
        "SLURM_NTASKS_HET_GROUP_0": "16",
    }  # fmt: skip


def run(environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(JOB)], env=environ, capture_output=True, text=True, timeout=60, check=False)


def test_the_job_writes_a_configuration_that_loads_and_restarts_the_daemon(job: dict[str, str], tmp_path: Path) -> None:
    done = run(job)
    assert done.returncode == 0, done.stderr
    assert "ended with 70 and is started again" in done.stderr
    settings = load(tmp_path / "run" / "weightsync.yaml", {})
    assert settings.run.id == "glm"
    assert settings.agents_url == "https://n0:7410"
    assert settings.trainer.world == 16
    assert [(engine.name, engine.url) for engine in settings.engines] == [
        ("engine-0", "http://e0:8000"), ("engine-1", "http://e1:8000"),
    ]  # fmt: skip
    assert settings.credentials == tmp_path / "run" / ".weightsync-credentials"
    assert settings.listen.tls is not None
    certificates = tmp_path / "run" / ".weightsync-certificates"
    assert settings.listen.tls.ca_file == certificates / "ca.pem"
    assert any(call == f"certs {certificates} --host n0" for call in (tmp_path / "calls").read_text().splitlines())
    assert any(call == f"tokens {settings.credentials}" for call in (tmp_path / "calls").read_text().splitlines())
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sum("weightsync-orchestrator run" in call for call in calls) == 2
    assert any(call.endswith("python -m trainer") for call in calls)
    assert any('--weight-transfer-config {"backend": "weightsync"}' in call for call in calls)


def test_the_job_names_what_it_needs(job: dict[str, str]) -> None:
    done = run(job | {"MODEL": ""})
    assert done.returncode != 0
    assert "model directory for vLLM" in done.stderr


IMAGE = DEPLOY / "container"


def test_the_image_runs_the_daemon_as_a_number_and_asks_it_by_its_configuration() -> None:
    text = (IMAGE / "Containerfile").read_text()
    assert 'ENTRYPOINT ["weightsync-orchestrator"]' in text
    assert re.search(r"^USER \d+:\d+$", text, re.MULTILINE), "Kubernetes' runAsNonRoot wants a number"
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == ["${PYTHON}"] * 2, "one argument pins both by digest"
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
    assert str(example.relative_to(DEPLOY.parent)) in allowed, "a link in the package leads there"
    assert not allowed & {".git", ".venv", "tests"}
