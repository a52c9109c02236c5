"""Settings: what loads, and what each mistake is told."""

from pathlib import Path

import pytest
from weightsync.orchestrator.protocol.messages import FilesystemSettings, NixlSettings
from weightsync.orchestrator.settings.document import MAX_CONFIG_BYTES
from weightsync.orchestrator.settings.settings import (
    ConfigError,
    FilesystemTransport,
    HubRendezvous,
    NixlTransport,
    Settings,
    TcpStoreRendezvous,
    load,
    read_secret,
)

MINIMAL = """\
run:
  id: glm
  directory: runs/glm
state_directory: state
listen:
  token_file: token
engines:
  - name: a
    url: http://127.0.0.1:8000
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    return path


def loaded(path: Path, text: str = "", **environ: str) -> Settings:
    path.write_text(MINIMAL + text)
    return load(path, {f"WEIGHTSYNC__{key}": value for key, value in environ.items()})


def refusal(path: Path, text: str, environ: dict[str, str] | None = None) -> ConfigError:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path, environ or {})
    return caught.value


def test_defaults_and_paths_relative_to_the_file(config: Path, tmp_path: Path) -> None:
    settings = load(config, {})
    assert settings.run.directory == tmp_path / "runs/glm"
    assert settings.listen.token_file == tmp_path / "token"
    assert settings.journal_path == tmp_path / "state" / "journal.sqlite"
    assert settings.agents_url == "http://127.0.0.1:7410"
    assert settings.agents_token_path == str(tmp_path / "token")
    assert settings.transport == NixlTransport(backends=("UCX",), flush_every=100, rails=2)
    assert settings.rendezvous == HubRendezvous()
    assert settings.pause.mode == "keep"
    assert settings.pause.clear_cache
    assert settings.deadlines.update_seconds == 60 + 300 + 120 + 60


def test_absolute_paths_stay(config: Path) -> None:
    assert loaded(config, "", RUN__DIRECTORY="/shared/run").run.directory == Path("/shared/run")


def test_unions(config: Path) -> None:
    settings = loaded(config, "transport: {type: filesystem}\nrendezvous: {type: tcpstore, host: head, port: 29502}\n")
    assert settings.transport == FilesystemTransport()
    assert settings.transport.message() == FilesystemSettings()
    assert settings.rendezvous == TcpStoreRendezvous(host="head", port=29502, timeout_seconds=1200)
    assert NixlTransport().message() == NixlSettings()


def test_every_value_can_come_from_the_environment(config: Path) -> None:
    settings = loaded(
        config, "", LISTEN__PORT="9", TRANSPORT__FLUSH_EVERY="7", TRANSPORT__BACKENDS="[UCX, GDS]",
        ENGINES__0__URL="http://other:1", ENGINES__1="{name: b, url: http://b:1, role: decode}",
        PAUSE__CLEAR_CACHE="false", DEADLINES__PROBE_SECONDS="1.5", RUN__ID="77", ADVERTISE_URL="null",
    )  # fmt: skip
    assert settings.listen.port == 9
    assert settings.transport == NixlTransport(backends=("UCX", "GDS"), flush_every=7)
    assert [engine.url for engine in settings.engines] == ["http://other:1", "http://b:1"]
    assert not settings.pause.clear_cache
    assert settings.deadlines.probe_seconds == 1.5
    assert settings.run.id == "77"
    assert loaded(config, "agents_token_file: /else/where\n").agents_token_path == "/else/where"


def test_the_environment_beats_the_file(config: Path) -> None:
    assert loaded(config, "rescan_seconds: 3\n", RESCAN_SECONDS="4").rescan_seconds == 4


def test_other_variables_are_none_of_our_business(config: Path) -> None:
    assert load(config, {"WEIGHTSYNC_URL": "x", "PATH": "y"}).run.id == "glm"


@pytest.mark.parametrize(
    ("addition", "line", "key", "says"),
    [
        ("rescan_secnds: 1\n", 10, "rescan_secnds", "did you mean rescan_seconds"),
        ("log: {level: loud}\n", 10, "log.level", "'loud'"),
        ("retry: {attempts: 0}\n", 10, "retry.attempts", "greater than or equal to 1"),
        ("deadlines:\n  probe_seconds: soon\n", 11, "deadlines.probe_seconds", "'soon'"),
        ("deadlines:\n  probe_seconds: .inf\n", 11, "deadlines.probe_seconds", "finite"),
        ("deadlines: {probe_seconds: 1.0e+9}\n", 10, "deadlines.probe_seconds", "86400"),
        ("  - name: a\n    url: http://b:1\n", 7, "engines", "the same name 'a'"),
        ("  - {name: b, url: 'http://127.0.0.1:8000/'}\n", 7, "engines", "the same url"),
        ("  - {name: b, url: 'ftp://b'}\n", 10, "engines[1].url", "^https?"),
        ("  - {name: b, url: 'http://me:pw@b'}\n", 10, "engines[1].url", "^https?"),
        ("  - {name: 'b/../c', url: 'http://b'}\n", 10, "engines[1].name", "pattern"),
        ("  - {name: b}\n", 10, "engines[1].url", "missing"),
        ("  - {name: b, url: 'http://b', role: prefill, pair: p}\n", 7, "engines", "needs an engine of role prefill"),
        ("mode: shadow\n", 10, "mode", "'live'"),
        ("transport: {type: rdma}\n", 10, "transport.type", "one of 'nixl', 'filesystem'"),
        ("rendezvous: {type: tcpstore}\n", 10, "rendezvous.host", "missing"),
        ("run: {id: other, directory: x}\n", 10, "run", "given twice (first at line 1)"),
        ("_env_file: x\n", None, "_env_file", "unknown key"),
        ("transport:\n\tx: 1\n", 11, "", "no valid YAML"),
        ("log: !!python/object:os.system {}\n", 10, "", "no valid YAML"),
        ("1: x\n", None, "1", "unknown key"),
    ],
)
def test_mistakes_name_line_key_and_fix(config: Path, addition: str, line: int | None, key: str, says: str) -> None:
    error = refusal(config, MINIMAL + addition)
    assert [(problem.line, problem.key) for problem in error.problems] == [(line, key)]
    assert says in str(error)
    assert str(config) in str(error)
    assert error.problems[0].fix


@pytest.mark.parametrize(
    ("addition", "key", "says"),
    [
        (
            "transport:\n  type: filesystem\n  flush_every: 5\n",
            "transport.flush_every",
            "belongs to transport type nixl, and this transport is of type filesystem",
        ),
        ("rendezvous:\n  port: 5\n", "rendezvous.port", "belongs to rendezvous type tcpstore"),
        ("rendezvous:\n  type: hub\n  host: h\n", "rendezvous.host", "set rendezvous.type to tcpstore"),
    ],
)
def test_a_key_of_another_type_says_whose_it_is(config: Path, addition: str, key: str, says: str) -> None:
    error = refusal(config, MINIMAL + addition)
    assert [problem.key for problem in error.problems] == [key]
    assert error.problems[0].line in (11, 12)
    assert says in str(error)


def test_all_problems_are_told_at_once(config: Path) -> None:
    error = refusal(config, MINIMAL + "a: 1\nb: 2\nlog: {format: xml}\n")
    assert {problem.key for problem in error.problems} == {"a", "b", "log.format"}


def test_a_secret_is_refused_and_not_shown(config: Path) -> None:
    error = refusal(config, MINIMAL.replace("token_file: token", "token_file: token\n  token: hunter2"))
    assert "hunter2" not in str(error)
    assert "put it into a file and name that in token_file" in str(error)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("LISTN__PORT", "1", "listn: unknown key"),
        ("LISTEN__PORT", "http", "listen.port"),
        ("ENGINES__7__URL", "http://x", "fits nowhere"),
        ("RUN__ID__X", "1", "run.id"),
        ("LISTEN____PORT", "1", "names no key"),
        ("", "1", "names no key"),
    ],
)
def test_a_wrong_variable_is_named(config: Path, name: str, value: str, says: str) -> None:
    error = refusal(config, MINIMAL, {f"WEIGHTSYNC__{name}": value})
    assert f"environment variable WEIGHTSYNC__{name}" in str(error)
    assert says in str(error)


def test_a_wildcard_needs_an_advertised_url(config: Path) -> None:
    wildcard = MINIMAL.replace("  token_file", "  host: 0.0.0.0\n  token_file")
    assert "advertise_url" in str(refusal(config, wildcard))
    config.write_text(wildcard + "advertise_url: http://head:7410/\n")
    assert load(config, {}).agents_url == "http://head:7410"


@pytest.mark.parametrize("content", [b"", b"- a\n- b\n", b"just text", b"\xff\xfe", b"x" * (MAX_CONFIG_BYTES + 1)])
def test_files_that_are_no_configuration(config: Path, content: bytes) -> None:
    config.write_bytes(content)
    with pytest.raises(ConfigError, match=str(config)):
        load(config, {})


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "absent.yaml", {})


def test_settings_cannot_be_changed(config: Path) -> None:
    settings = load(config, {})
    with pytest.raises(ValueError, match="frozen"):
        settings.rescan_seconds = 1
    with pytest.raises(ValueError, match="frozen"):
        settings.run.id = "x"


def test_secrets(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("abc-123\n")
    assert read_secret(path) == "abc-123"
    for bad in ("", "\n", "two\nlines", "with blank", "ä" * 10, "x" * 5000):
        path.write_text(bad)
        with pytest.raises(ConfigError, match="no secret"):
            read_secret(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_secret(tmp_path / "absent")
