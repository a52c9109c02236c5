"""What every command has in common: usage, help, a wrong configuration."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import cli, process
from credentials import TOKENS
from weightsync.orchestrator.cli.main import parser
from weightsync.orchestrator.protocol.proof import admin_key


@pytest.fixture
def mistaken(config: Path) -> Path:
    config.write_text(config.read_text() + "rescan: 1\n")
    return config


async def test_a_missing_or_broken_configuration_is_78(mistaken: Path) -> None:
    config = mistaken
    for run, command in ((process, "run"), (cli, "status"), (cli, "rounds")):
        done = await run(command, "--config", config)
        assert done.code == 78
        assert f"{config}: line 7: rescan: unknown key (found 1). Fix: did you mean rescan_seconds?" in done.err
        assert done.out == ""
    done = await cli("config", "check", config.parent / "absent.yaml")
    assert done.code == 78
    assert "No such file" in done.err


async def test_wrong_usage_is_2(config: Path) -> None:
    assert (await cli()).code == 2
    assert (await cli("status")).code == 2
    assert (await cli("rounds", "--last", "0", "--config", config)).code == 2
    assert "WEIGHTSYNC_CONFIG" in (await cli("status")).err


def below(top: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its commands."""
    yield top
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                if name != "demo":  # it has a parser of its own
                    yield from below(inner)


NO_JSON = {
    "run": "its log is JSON by log.format",
    "config schema": "prints nothing but JSON",
    "config example": "prints YAML",
    "completion": "prints a script",
}
"""Commands that have no --json, and why."""


def test_every_other_command_has_json() -> None:
    commands = [
        each for each in below(parser()) if not any(isinstance(a, argparse._SubParsersAction) for a in each._actions)
    ]
    without = {each.prog.partition(" ")[2] for each in commands if "--json" not in each._option_string_actions}
    assert without == set(NO_JSON)


def test_every_command_and_each_of_its_arguments_is_explained() -> None:
    for each in below(parser()):
        assert each.description, each.prog
        actions = [action for action in each._actions if not isinstance(action, argparse._SubParsersAction)]
        assert not [(each.prog, action.dest) for action in actions if not action.help]


async def test_help_lists_commands_and_exit_codes() -> None:
    done = await process("--help")
    assert done.code == 0
    for word in ("run", "status", "rounds", "config", "plan", "demo", "75", "77", "78"):
        assert word in done.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("status", "--url", "ht!tp"), "argument --url: 'ht!tp' is no URL such as http://host:8000"),
        (("status", "--url", ""), "argument --url: '' is no URL"),
        (("rounds", "--url", "http://h:99999"), "argument --url: Port out of range"),
        (("status", "--timeout", "nan"), "argument --timeout: 'nan' is no number above 0 and up to 86400"),
        (("status", "--timeout", "0"), "argument --timeout"),
        (("rounds", "--last", "²"), "argument --last: '²' is no number above 0 and up to 10000"),
        (("rounds", "--last", "9" * 5000), "argument --last"),
        (("plan", "explain", "--alpha", "nan"), "argument --alpha"),
        (("plan", "simulate", "--nic-gbps", "0"), "argument --nic-gbps"),
        (("plan", "simulate", "--engines", "-1"), "argument --engines"),
    ],
)
async def test_an_option_that_cannot_be_meant_is_wrong_usage(arguments: tuple[str, ...], says: str) -> None:
    done = await cli(*arguments)
    assert done.code == 2
    assert says in done.err


async def test_the_release() -> None:
    done = await cli("--version")
    assert done.code == 0
    assert done.out.startswith("weightsync-orchestrator ")


async def test_the_key_of_an_engines_admin_routes(config: Path) -> None:
    done = await cli("admin-key", "a", "--config", config)
    key = admin_key(TOKENS["engine"], "glm", "a")
    assert (done.code, done.out) == (0, key + "\n")
    nobody = await cli("admin-key", "nobody", "--config", config)
    assert (nobody.code, nobody.out, "engines are: a" in nobody.err) == (65, "", True)
    told = await cli("admin-key", "a", "--json", "--config", config)
    assert json.loads(told.out) == {"engine": "a", "key": key}
    (config.parent / "credentials" / "engine.token").rename(config.parent / "credentials" / "engine.b.token")
    done = await cli("admin-key", "a", "--config", config)
    assert (done.code, done.out) == (78, "")
    assert "has no token for engine a" in done.err
