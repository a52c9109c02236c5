"""The hooks of pre-commit are the checks of the Makefile, run by the tools of .venv and without a network."""

import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


def test_each_hook_is_a_tool_of_the_venv_that_the_makefile_runs_too() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    makefile = (ROOT / "Makefile").read_text()
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    hooks = config["repos"][0]["hooks"]
    assert [hook["name"] for hook in hooks] == ["ruff check", "ruff format", "mypy", "lint-imports"]
    for hook in hooks:
        assert hook["language"] == "system"
        assert hook["entry"].startswith(f".venv/bin/{hook['name']}")
        assert f"$(BIN)/{hook['name']}" in makefile


def test_every_tool_for_developers_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {name.partition(">")[0].lower() for name in project["optional-dependencies"]["dev"]}
    pins = (ROOT / "tests" / "requirements-dev.txt").read_text().splitlines()
    assert names <= {pin.partition("==")[0].lower() for pin in pins}
