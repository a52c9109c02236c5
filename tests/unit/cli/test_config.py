"""``config check`` and ``config schema``."""

import json
import re
import socket
import stat
from pathlib import Path

import pytest
from command_line import cli, process
from credentials import TOKENS
from weightsync.orchestrator.cli import config as cli_config
from weightsync.orchestrator.cli.certs import make_certificates
from weightsync.orchestrator.cli.config import findings_of
from weightsync.orchestrator.cli.main import main
from weightsync.orchestrator.daemon.access import tls as daemon_tls
from weightsync.orchestrator.settings.settings import load


async def test_config_check_of_a_good_one(config: Path) -> None:
    done = await process("config", "check", config)
    assert done.code == 0, done.out
    assert "run glm, 1 engine (a), transport nixl, rendezvous hub" in done.out
    assert "does not exist yet and can be made" in done.out
    assert "is free" in done.out
    assert not [token for token in TOKENS.values() if token in done.out]
    assert "/credentials (engine, operator, trainer, viewer)" in done.out
    assert not (config.parent / "state").exists()


async def test_config_check_as_json(config: Path) -> None:
    done = await cli("config", "check", config, "--json")
    told = json.loads(done.out)
    assert {finding["level"] for finding in told["findings"]} == {"ok"}
    assert "credentials" in {finding["check"] for finding in told["findings"]}


async def test_config_example_is_the_file_that_explains_every_key(tmp_path: Path) -> None:
    done = await process("config", "example")
    example = Path(__file__).parents[3] / "deploy" / "config.example.yaml"
    assert done.out == example.read_text()


async def test_config_schema_is_json_schema() -> None:
    done = await cli("config", "schema")
    schema = json.loads(done.out)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["transport"]["discriminator"]["propertyName"] == "type"


def test_config_check_finds_what_is_wrong_outside_the_file(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = config.parent / "credentials" / "engine.token"
    (config.parent / "run").write_text("a file")
    token.chmod(0o644)
    assert main(["config", "check", str(config)]) == 78
    out = capsys.readouterr().out
    assert f"has mode 0644, so others can read it. Fix: chmod 600 {token}" in out
    assert "is no directory" in out
    token.chmod(0o600)
    token.write_text("short")
    assert main(["config", "check", str(config)]) == 78
    assert "can be guessed" in capsys.readouterr().out
    token.unlink()
    assert main(["config", "check", str(config)]) == 78
    assert "has no engine.token, so no agent could come in" in capsys.readouterr().out


def test_config_check_says_that_a_port_is_taken_and_does_not_fail(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listen = load(config, {}).listen
    with socket.create_server((listen.host, listen.port)):
        assert main(["config", "check", str(config)]) == 0
    assert "cannot be bound now" in capsys.readouterr().out


def test_config_check_refuses_a_journal_on_a_network_file_system(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_config, "file_system_of", lambda path: "nfs4")
    assert main(["config", "check", str(config)]) == 78
    assert "is on nfs4, a network file system" in capsys.readouterr().out
    monkeypatch.setattr(cli_config, "file_system_of", lambda path: "tmpfs")
    assert main(["config", "check", str(config)]) == 0
    assert "is lost when the machine restarts" in capsys.readouterr().out


def test_config_check_warns_of_tokens_in_the_clear_and_of_pickles(config: Path) -> None:
    environ = {"WEIGHTSYNC__LISTEN__HOST": "0.0.0.0", "WEIGHTSYNC__LISTEN__INSECURE": "true",
               "WEIGHTSYNC__ADVERTISE_URL": "http://head:7410",
               "WEIGHTSYNC__RENDEZVOUS": "{type: tcpstore, host: head}"}  # fmt: skip
    texts = [finding.text for finding in findings_of(load(config, environ)) if finding.level == "warning"]
    assert any("tokens can be read there" in text for text in texts)
    assert any("unpickles" in text for text in texts)


def test_config_check_warns_of_a_key_whose_handshakes_are_dear(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config.parent / "certificates"
    make_certificates(made, ["127.0.0.1"], (), 2)
    files = f"{{certificate_file: {made}/daemon.pem, key_file: {made}/daemon.key, ca_file: {made}/ca.pem}}"
    settings = load(config, {"WEIGHTSYNC__LISTEN__TLS": files, "WEIGHTSYNC__ADVERTISE_URL": "https://127.0.0.1:7410"})

    def told() -> list[tuple[str, str]]:
        return [(finding.level, finding.text) for finding in findings_of(settings) if finding.check == "listen.tls"]

    assert told() == [("ok", f"listen.tls: {made}/daemon.pem")]
    monkeypatch.setattr(daemon_tls, "handshake_seconds", lambda _: 0.0052)
    ((level, text),) = told()
    assert level == "warning"
    assert "takes 5.2 ms, in which the daemon hears nobody" in text
    assert text.endswith("Fix: take a key of the curve P-256")


def test_config_check_names_the_kinds_of_engine_that_there_are(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = "engines:\n  - {name: odd, kind: abacus, url: 'http://127.0.0.1:1'}"
    config.write_text(config.read_text().replace("engines:", odd))
    assert main(["config", "check", str(config), "--probe"]) == 78
    told = capsys.readouterr().out
    assert "engine odd: unknown engine kind 'abacus'. Fix: set kind of this engine to one of: vllm" in told


def test_config_check_probe_tells_of_unreachable_engines(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        config.write_text(config.read_text().replace(":8000", f":{closed.getsockname()[1]}"))
        assert main(["config", "check", str(config), "--probe"]) == 0
    assert "cannot be reached: Connect" in capsys.readouterr().out


def test_token_files_keep_their_mode(config: Path) -> None:
    findings_of(load(config, {}))
    assert stat.S_IMODE((config.parent / "credentials" / "engine.token").stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["x" * 300, "loop/x"])
def test_config_check_names_a_directory_that_cannot_be(
    config: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (config.parent / "loop").symlink_to(config.parent / "loop")
    text = config.read_text()
    config.write_text(re.sub(r"state_directory: .*", f"state_directory: {config.parent / name}", text))
    assert cli_config.check(config, environ={}) == 78
    assert "state_directory: " in capsys.readouterr().out.partition("error")[2]


def test_config_check_says_who_may_come_and_looks_at_their_key(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    admit = 'engines_admit: {names: ["a*"], hosts: ["h*"], at_most: 3, api_key_file: key}\n'
    config.write_text(config.read_text() + admit)
    assert main(["config", "check", str(config)]) == 78
    out = capsys.readouterr().out
    assert "run glm, 1 engine (a) and at most 3 that come by themselves, transport nixl" in out
    assert "engines_admit.api_key_file" in out
    (config.parent / "key").write_text("0123456789abcdef0123456789abcdef")
    (config.parent / "key").chmod(0o600)
    assert main(["config", "check", str(config)]) == 0


def test_config_check_holds_the_fleet_against_the_descriptors(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_config, "reachable", lambda: 100)
    texts = [finding.text for finding in findings_of(load(config, {})) if finding.level == "error"]
    assert texts == [
        "open files: this process may open 100 files, and 1 engines and some trainer ranks need 131 at the least. Fix:"
        " LimitNOFILE=65536 in the systemd unit, or ulimit -Hn"
    ]


def spoil(state: Path, how: str) -> str:
    """Make the state directory one that somebody else could have written, and say what is to be said of it."""
    state.mkdir(mode=0o700)
    journal = state / "journal.sqlite"
    if how == "open directory":
        state.chmod(0o777)
        return f"{state}: has mode 0777, so others can write it. Fix: chmod go-w {state}"
    if how == "open journal":
        journal.touch()
        journal.chmod(0o666)
        return f"{journal}: has mode 0666, so others can write it"
    if how == "linked journal":
        journal.symlink_to(state.parent / "elsewhere")
        return f"{journal}: is a symbolic link"
    state.rmdir()
    (state.parent / "elsewhere").mkdir()
    state.symlink_to(state.parent / "elsewhere")
    return f"{state}: is a symbolic link"


@pytest.mark.parametrize("how", ["open directory", "open journal", "linked journal", "linked directory"])
async def test_a_state_directory_that_others_could_have_written_is_refused_by_check_and_by_run(
    config: Path, how: str
) -> None:
    says = spoil(load(config, {}).state_directory, how)
    checked = await cli("config", "check", config)
    assert (checked.code, says in checked.out) == (78, True), checked.out
    started = await process("run", "--config", config)
    assert (started.code, says in started.err) == (78, True), started.err
    assert not (config.parent / "elsewhere" / "journal.sqlite").exists()


async def test_run_refuses_what_check_refuses(config: Path) -> None:
    """Here a token that others may have put there."""
    token = config.parent / "credentials" / "engine.token"
    token.chmod(0o620)
    started = await process("run", "--config", config)
    assert (started.code, f"{token}: has mode 0620, so others can write it" in started.err) == (78, True)
