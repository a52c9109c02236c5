"""Each fenced block of the documents is tried: run as it stands, read by the parser of what it is for, or a drawing.

A block's language says what it is: ``bash`` commands, ``console`` a command with its output, ``text`` an output or a
drawing, ``python``, ``yaml``.
"""

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import kubernetes_validate
import pytest
import yaml
from torch import nn
from weightsync.agents.trainer.adapters.trl import WeightsyncTransfer
from weightsync.agents.trainer.adapters.vllm import WeightsyncTrainerEngine
from weightsync.orchestrator.cli.main import main, parser
from weightsync.orchestrator.forecast.explain import explain
from weightsync.orchestrator.forecast.published_models import GEOMETRIES
from weightsync.orchestrator.forecast.synthetic_fleets import EngineFleet, TrainerFleet, engine_parties, trainer_parties
from weightsync.orchestrator.forecast.text import explanation_text
from weightsync.orchestrator.planner import make_plan
from weightsync.orchestrator.settings.settings import load

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")), *(ROOT / "docs").rglob("*.md")]
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)

RUN_BY = {
    ("README.md", "python"): "tests/e2e/test_readme.py",
    ("docs/how-to/fsdp2.md", "python"): "tests/e2e/test_readme.py",
    ("docs/adding-a-model.md", "python"): "tests/unit/agents/trainer/models/test_models.py",
    ("docs/tutorial.md", "bash"): "tests/e2e/test_tutorial.py",
}
"""Blocks that another test runs as they stand."""

DRAWINGS = {"README.md": 1, "docs/architecture.md": 2, "docs/protocol.md": 2}
"""How many of a document's blocks are drawings."""

NOT_RUN = {
    "useradd": "makes a user of the machine",
    "systemctl": "needs a running systemd",
    "python3": "makes an environment outside of the tree",
    "less": "somebody reads it",
}
"""Programs that are nobody's here to try, and why."""


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str


def _blocks() -> Iterator[Block]:
    for document in DOCUMENTS:
        text, page = document.read_text(), str(document.relative_to(ROOT))
        for found in FENCE.finditer(text):
            yield Block(page, text.count("\n", 0, found.start()) + 1, found[2], textwrap.dedent(found[3]))


BLOCKS = sorted(_blocks())


def of(language: str) -> list[Any]:
    """Parameters: the blocks of a language that no other test runs."""
    return [
        pytest.param(block, id=f"{block.page}:{block.line}")
        for block in BLOCKS
        if block.language == language and (block.page, language) not in RUN_BY
    ]


def test_every_block_says_what_it_is_and_every_drawing_is_counted() -> None:
    assert {block.language for block in BLOCKS} == {"bash", "console", "python", "yaml", "text"}
    drawn = [block.page for block in BLOCKS if block.language == "text" and block.page != "docs/plan.md"]
    assert {page: drawn.count(page) for page in drawn} == DRAWINGS
    assert {(block.page, block.language) for block in BLOCKS} >= set(RUN_BY)


@pytest.mark.parametrize(("page", "test"), [(page, test) for (page, _), test in RUN_BY.items()])
def test_what_another_test_runs_is_named_by_it(page: str, test: str) -> None:
    assert page in (ROOT / test).read_text()


# ------------------------------------------------------------------------------------------------------------- commands
def commands(text: str) -> Iterator[tuple[dict[str, str], list[str]]]:
    """The variables and the words of each simple command."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|", line):
            words = shlex.split(part, comments=True)
            given = {}
            while words and (assigned := re.fullmatch(r"(\w+)=(.*)", words[0], re.DOTALL)):
                given[assigned[1]] = assigned[2]
                del words[0]
            if words:
                yield given, words


@pytest.mark.parametrize("block", of("bash"))
def test_commands_are_understood_by_what_they_start(block: Block) -> None:
    found = list(commands(block.text))
    assert found
    for given, words in found:
        program = words[0].rpartition("/")[2]
        if program not in NOT_RUN:
            TRIED[program](words[1:], given)
        for name in given:
            assert name in VARIABLES, name


VARIABLES = frozenset(
    name
    for folder in ("agents", "deploy/slurm")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".sbatch")
    for name in re.findall(r"\b[A-Z][A-Z_]{4,}\b", path.read_text())
)


def _make(words: list[str], _: dict[str, str]) -> None:
    assert set(words) <= set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def _ours(words: list[str], _: dict[str, str]) -> None:
    parser(words[0]).parse_args(words)


def _vllm(words: list[str], _: dict[str, str]) -> None:
    """By vLLM's own parser; its model and what the document leaves out (…) are the reader's."""
    pytest.importorskip("vllm.entrypoints.launchers.cli_args")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    assert words[:2] == ["serve", "…"]
    make_arg_parser(FlexibleArgumentParser()).parse_args(words[2:])


def _sbatch(words: list[str], given: dict[str, str]) -> None:
    (script,) = words
    needed = re.findall(r"^: \"\$\{(\w+):\?", (ROOT / "deploy/slurm" / script).read_text(), re.MULTILINE)
    assert set(given) == set(needed)


def _kubectl(words: list[str], _: dict[str, str]) -> None:
    """Its own parser has read a command line before it prints its help."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not here")
    done = subprocess.run(["kubectl", *words, "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def _pip(words: list[str], _: dict[str, str]) -> None:
    assert words == ["install", "weightsync-orchestrator"]


def _cp(words: list[str], _: dict[str, str]) -> None:
    """What pip has put into an environment's share/ is a file of ours."""
    source, _target = words
    installed = re.fullmatch(r"/opt/weightsync/share/weightsync-orchestrator/(.+)", source)
    assert installed is not None
    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    patterns = files[f"share/weightsync-orchestrator/{Path(installed[1]).parent}"]
    assert Path(installed[1]).name in {path.name for pattern in patterns for path in ROOT.glob(pattern)}


TRIED = {
    "make": _make, "weightsync-orchestrator": _ours, "vllm": _vllm, "sbatch": _sbatch, "kubectl": _kubectl, "pip": _pip,
    "cp": _cp,
}  # fmt: skip


@pytest.mark.parametrize(
    "wrong", ["make nothing", "kubectl apply --bogus", "sbatch weightsync.sbatch", "pip install x"]
)
def test_a_command_that_is_wrong_is_found(wrong: str) -> None:
    [(given, words)] = commands(wrong)
    with pytest.raises(AssertionError):
        TRIED[words[0]](words[1:], given)


def test_extras_that_are_installed_are_there() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    asked = re.findall(r"weightsync-orchestrator\[([\w,]+)\]", "".join(page.read_text() for page in DOCUMENTS))
    assert {name for names in asked for name in names.split(",")} <= extras


# -------------------------------------------------------------------------------------------------------------- outputs
@pytest.mark.parametrize("block", of("console"))
def test_a_command_prints_what_is_shown(block: Block) -> None:
    first, _, shown = block.text.partition("\n")
    words = shlex.split(first)
    assert words[:2] == ["$", "weightsync-orchestrator"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(words[2:]) == 0
    assert out.getvalue().rstrip() == shown.rstrip()


def test_the_explanation_that_is_shown_is_that_of_its_fleet() -> None:
    """GLM-5, 64 trainer ranks (FSDP 8 × EP 8) into two engines of 16 ranks."""
    (shown,) = [block.text for block in BLOCKS if (block.page, block.language) == ("docs/plan.md", "text")]
    geometry = GEOMETRIES["glm-5"]
    plan = make_plan(trainer_parties(geometry, TrainerFleet(8, 8)), engine_parties(geometry, EngineFleet(2, 16)))
    assert explanation_text(explain(plan), 6).rstrip() == shown.rstrip()


# --------------------------------------------------------------------------------------------------------------- python
@pytest.mark.parametrize("block", of("python"))
def test_adapters_are_made_as_they_are_in_the_documents(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a script that has what its reader has: a model, a rank, TRL's trainer, the token's file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trainer.token").write_text("0123456789abcdef")
    (tmp_path / "trainer.token").chmod(0o600)
    asked: dict[str, Any] = {}
    sent: list[object] = []

    def send(engine: WeightsyncTrainerEngine) -> None:
        sent.append(engine)

    monkeypatch.setattr(WeightsyncTrainerEngine, "send_weights", send)
    reader = {
        "AsyncGRPOTrainer": lambda *_, **arguments: asked.update(arguments),
        "dist": SimpleNamespace(get_rank=lambda: 0),
        "model": nn.Linear(2, 2),
    }
    exec(compile(block.text.replace("/shared/runs", str(tmp_path)), block.page, "exec"), reader)
    if block.page == "docs/adapters/trl.md":
        assert isinstance(asked["weight_transfer"], WeightsyncTransfer)
    else:
        assert sent == [reader["engine"]]
        assert isinstance(reader["engine"], WeightsyncTrainerEngine)


# ----------------------------------------------------------------------------------------------------------------- yaml
@pytest.mark.parametrize("block", of("yaml"))
def test_documents_of_yaml_are_what_their_reader_takes(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = yaml.safe_load(block.text)
    if block.page == "docs/security.md":
        run = "run: {id: a, directory: run}\nstate_directory: state\ncredentials: credentials\n"
        (tmp_path / "c.yaml").write_text(f"{run}engines: [{{name: a, url: 'http://a:8000'}}]\n{block.text}")
        settings = load(tmp_path / "c.yaml", {})
        assert settings.listen.tls is not None
        assert settings.agents_url == told["advertise_url"]
    elif block.page == "docs/operations.md":
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}}
        pod["spec"] = {"containers": [{"name": "a", "image": "a", **told}]}
        kubernetes_validate.validate(pod, "1.29", strict=True)
        assert {each["name"] for each in told["env"]} - {"POD_NAME", "POD_IP"} <= VARIABLES
    else:
        assert block.page == "docs/adapters/verl.md"
        monkeypatch.syspath_prepend(ROOT / "tests" / "verl_0_9_1")
        from weightsync.agents.trainer.adapters import verl

        rollout = told["actor_rollout_ref"]["rollout"]
        engine = rollout["checkpoint_engine"]
        assert rollout["checkpoint_manager_class"] == f"{verl.__name__}.{verl.WeightsyncManager.__name__}"
        assert engine["custom_backend_module"] == verl.__name__
        assert rollout["engine_kwargs"]["vllm"]["weight_transfer_config"] == {"backend": verl.BACKEND}
        made = verl.CheckpointEngineRegistry.get(engine["backend"])(1, **engine["engine_kwargs"][engine["backend"]])
        assert made._connection.run_id == "ppo"
