"""The command as it is typed: exit code, table, JSON."""

import os
import socket
from pathlib import Path

import msgspec
import pytest
from command_line import cli, process
from credentials import TOKENS
from servers_here import served, vllm
from weightsync.orchestrator.cli.doctor import running
from weightsync.orchestrator.cli.doctor.command import here
from weightsync.orchestrator.protocol.findings import WIDTH, Findings
from weightsync.orchestrator.settings.settings import load


def with_mode(path: Path, mode: int) -> None:
    path.chmod(mode)


async def test_a_fleet_in_good_order(config: Path) -> None:
    for name in ("run", "state"):
        (config.parent / name).mkdir(mode=0o700)
    with_mode(config, 0o600)
    async with served(vllm()) as url:
        done = await cli("doctor", "--config", config, WEIGHTSYNC__ENGINES__0__URL=url)
    assert f"{url}: vLLM 0.32.0, 2 ranks, weightsync backend" in done.out.replace("\n                            ", " ")
    # A disk of a test machine may be slow or forgetful, and nothing else is wrong.
    assert done.code == (1 if "\nwarning" in f"\n{done.out}" else 0), done.out
    assert "\nerror" not in f"\n{done.out}"
    assert max(map(len, done.out.splitlines())) <= WIDTH
    assert not [token for token in TOKENS.values() if token in done.out]


async def test_warnings_are_1_errors_2_and_json_has_them(config: Path) -> None:
    with_mode(config, 0o666)
    done = await process("doctor", "--config", config, "--json", "--timeout", "5")
    assert done.code == 1, done.out  # nobody answers at the engine's port
    told = msgspec.json.decode(done.out, type=Findings)
    found = {finding.check: finding.level for finding in told.findings if finding.level != "ok"}
    assert found["configuration"] == found["engine a"] == "warning"
    (config.parent / "credentials" / "engine.token").unlink()
    done = await cli("doctor", "--config", config, "--timeout", "5")
    assert done.code == 2
    assert "has no engine.token" in " ".join(done.out.split())


def test_a_port_that_the_running_daemon_has_is_not_noted(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(config)
    with socket.create_server((settings.listen.host, settings.listen.port)):
        taken = [finding for finding in here(config, settings) if finding.check == "listen.port"]
        assert [finding.level for finding in taken] == ["note"], "somebody else's"
        monkeypatch.setattr(running, "daemon_pid", lambda _: os.getpid())
        assert not [finding for finding in here(config, settings) if finding.check == "listen.port"]


async def test_a_configuration_that_cannot_be_read_is_78(tmp_path: Path) -> None:
    assert (await cli("doctor", "--config", tmp_path / "none.yaml")).code == 78


async def test_room_for_versions_is_judged_by_the_journal(config: Path) -> None:
    done = await cli("doctor", "--config", config, "--timeout", "5", WEIGHTSYNC__TRANSPORT="{type: filesystem}")
    assert done.code == 1  # no journal yet: nothing to judge by, and no failure
    assert "could not be looked at" not in done.out
