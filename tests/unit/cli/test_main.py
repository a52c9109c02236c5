"""What every command has in common: usage, help, a wrong configuration."""

from pathlib import Path

import pytest
from command_line import cli, process


@pytest.fixture
def mistaken(config: Path) -> Path:
    config.write_text(config.read_text() + "rescan: 1\n")
    return config


async def test_a_missing_or_broken_configuration_is_78(mistaken: Path) -> None:
    config = mistaken
    for run, command in ((process, "run"), (cli, "status"), (cli, "rounds")):
        done = await run(command, "--config", config)
        assert done.code == 78
        assert f"{config}: line 6: rescan: unknown key (found 1). Fix: did you mean rescan_seconds?" in done.err
        assert done.out == ""
    done = await cli("config", "check", config.parent / "absent.yaml")
    assert done.code == 78
    assert "No such file" in done.err


async def test_wrong_usage_is_2(config: Path) -> None:
    assert (await cli()).code == 2
    assert (await cli("status")).code == 2
    assert (await cli("rounds", "--last", "0", "--config", config)).code == 2
    assert "WEIGHTSYNC_CONFIG" in (await cli("status")).err


async def test_help_lists_commands_and_exit_codes() -> None:
    done = await process("--help")
    assert done.code == 0
    for word in ("run", "status", "rounds", "config", "plan", "demo", "75", "77", "78"):
        assert word in done.out
