"""What is installed is what is in the folders: setuptools is told every package by name, for they are mapped."""

import configparser
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("orchestrator", "agents", "kernels")
SHARE = ".data/data/share/weightsync-orchestrator/"
HEAVY = ("aiohttp", "numpy", "torch", "vllm")


def test_every_package_of_the_folders_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        "weightsync." + ".".join(init.parent.relative_to(ROOT).parts)
        for folder in FOLDERS
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert listed == found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel that setuptools builds, without a network, of what the container's build is given (.dockerignore)."""
    copy = tmp_path_factory.mktemp("source")
    for name in (line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("wheel")
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(out)], cwd=copy, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_module_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    due = {
        f"weightsync/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for pattern in ("*.py", "py.typed", "example.yaml", "static/*")
        for path in (ROOT / folder).rglob(pattern)
    }
    assert "weightsync/orchestrator/settings/example.yaml" in due
    assert "weightsync/orchestrator/daemon/page/static/index.html" in due
    assert {f"weightsync/{folder}/py.typed" for folder in FOLDERS} <= due
    assert "weightsync/orchestrator/cli/main.py" in due
    assert {name for name in wheel.namelist() if ".dist-info/" not in name and SHARE not in name} == due


def test_the_wheel_holds_what_an_operator_deploys(wheel: zipfile.ZipFile) -> None:
    """All of deploy/ but the container file, which needs the sources."""
    shared = {name.partition(SHARE)[2] for name in wheel.namelist() if SHARE in name}
    due = {path.relative_to(ROOT / "deploy").as_posix() for path in (ROOT / "deploy").rglob("*") if path.is_file()}
    assert shared == {name for name in due if not name.startswith("container/")}
    assert {"slurm/weightsync.sbatch", "kubernetes/kustomization.yaml", "monitoring/alerts.yaml"} <= shared


def test_the_wheel_says_where_the_project_is(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    assert "Project-URL: Homepage, https://" in wheel.read(name).decode()


def test_the_wheel_offers_the_command_and_the_plugin(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    points = configparser.ConfigParser(delimiters=("=",))
    points.read_string(wheel.read(name).decode())
    assert dict(points["console_scripts"]) == {"weightsync-orchestrator": "weightsync.orchestrator.cli.main:main"}
    assert dict(points["vllm.general_plugins"]) == {"weightsync": "weightsync.agents.vllm.plugin:register"}
    for group in points.sections():
        for target in points[group].values():
            module = target.partition(":")[0].replace(".", "/")
            assert f"{module}.py" in wheel.namelist()


def test_importing_the_package_is_light() -> None:
    """Trainers and engines import it beside the agents: it must bring none of the daemon's or their own libraries."""
    ask = f"import sys, weightsync.orchestrator; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
