"""The command line as a user meets it: real processes, real files, real sockets."""

import asyncio
import contextlib
import io
import json
import os
import socket
import stat
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from aiohttp import web
from weightsync.orchestrator.cli import config as cli_config
from weightsync.orchestrator.cli.config import findings_of
from weightsync.orchestrator.cli.main import main
from weightsync.orchestrator.cli.tables import rounds_text, status_text
from weightsync.orchestrator.core.records import (
    Committed,
    EpochBegan,
    LiveDirty,
    Record,
    RoundBegan,
    RoundEnded,
    encode_record,
)
from weightsync.orchestrator.daemon.admin import routes as admin
from weightsync.orchestrator.daemon.admin.views import EngineView, LayoutsView, RoundRow, RoundsView, StatusView
from weightsync.orchestrator.daemon.journal import Journal
from weightsync.orchestrator.protocol.names import RoundName, Version
from weightsync.orchestrator.settings.settings import load

TOKEN = "0123456789abcdef0123"
NOW = 100_000.0


@dataclass
class Done:
    code: int
    out: str
    err: str


async def process(*arguments: str | Path) -> Done:
    """Runs the command line as a process of its own."""
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "weightsync.orchestrator.cli.main", *map(str, arguments),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={key: value for key, value in os.environ.items() if not key.startswith("WEIGHTSYNC")},
    )  # fmt: skip
    out, err = await started.communicate()
    assert started.returncode is not None
    return Done(started.returncode, out.decode(), err.decode())


async def cli(*arguments: str | Path, **environ: str) -> Done:
    """Runs the command line in a thread of this process, which is quicker by half a second."""

    def run() -> int:
        try:
            return main([str(argument) for argument in arguments])
        except SystemExit as error:
            return int(str(error.code))

    out, err = io.StringIO(), io.StringIO()
    with mock.patch.dict(os.environ, environ), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = await asyncio.to_thread(run)
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A good configuration, its token file, and a port that nobody listens on."""
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    token.chmod(0o600)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = tmp_path / "config.yaml"
    path.write_text(
        f"run: {{id: glm, directory: run}}\nstate_directory: state\nlisten: {{port: {port}, token_file: token}}\n"
        "engines:\n  - {name: a, url: 'http://127.0.0.1:8000'}\n"
    )
    return path


class Views:
    """A daemon's views, fixed."""

    async def status(self) -> StatusView:
        engine = EngineView(name="a", url="http://a", role="both", state="serving", paused=False)
        return StatusView(run="glm", state="step 40 is served", epoch=3, engines=(engine,))

    async def rounds(self, last: int) -> RoundsView:
        row = RoundRow(round="3.1", step=40, generation=7, attempt=1, outcome="committed", total_ms=float(last))
        return RoundsView(run="glm", rounds=(row,))

    async def layouts(self) -> LayoutsView | None:
        return None


@contextlib.asynccontextmanager
async def daemon(config: Path, token: str = TOKEN) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_routes(admin.routes(Views(), token))
    runner = web.AppRunner(app)
    await runner.setup()
    listen = load(config, {}).listen
    await web.TCPSite(runner, listen.host, listen.port).start()
    try:
        yield f"http://{listen.host}:{listen.port}"
    finally:
        await runner.cleanup()


def ended(number: int, outcome: str = "committed", reason: str = "") -> RoundEnded:
    return RoundEnded(
        round=RoundName(1, number), version=Version(7, 40 + number), attempt=1, engines=("a",), evicted=(),
        outcome=outcome, reason=reason, bytes=2_000_000, descriptors=3,
        times={"pausing": 0.03, "wire": 0.001, "stall": 0.2, "verifying": 0.02, "total": 0.25},
    )  # fmt: skip


def write_journal(config: Path, *records: Record) -> None:
    with Journal.open(load(config, {}).journal_path) as journal:
        journal.append([(type(record).__name__, encode_record(record)) for record in records])


# ------------------------------------------------------------------------------------------------ a running daemon
async def test_status_and_rounds_of_a_running_daemon(config: Path) -> None:
    async with daemon(config) as url:
        table = await process("status", "--config", config)
        data = await cli("status", "--json", WEIGHTSYNC_CONFIG=str(config))
        by_url = await cli("rounds", "--last", "7", "--url", url, "--token-file", config.parent / "token", "--json")
        rounds = await cli("rounds", "--config", config)
    assert (table.code, table.err) == (0, "")
    assert "step 40 is served" in table.out
    assert "ENGINE" in table.out
    assert json.loads(data.out)["engines"][0]["state"] == "serving"
    assert json.loads(by_url.out)["rounds"][0]["total_ms"] == 7
    assert "committed" in rounds.out


async def test_a_wrong_token_is_77_and_not_shown(config: Path) -> None:
    async with daemon(config, token="another-token-of-20c"):
        done = await cli("status", "--config", config)
    assert done.code == 77
    assert "refuses the token" in done.err
    assert TOKEN not in done.err


async def test_a_server_that_is_not_ours(config: Path) -> None:
    async def other(_: web.Request) -> web.Response:
        return web.json_response({"hello": "world"})

    app = web.Application()
    app.router.add_get("/status", other)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", load(config, {}).listen.port).start()
    try:
        wrong = await cli("status", "--config", config)
        lacking = await cli("rounds", "--config", config)
    finally:
        await runner.cleanup()
    assert (wrong.code, lacking.code) == (75, 75)
    assert "not the daemon's" in wrong.err
    assert "answered 404" in lacking.err


async def test_a_daemon_that_never_answers(config: Path) -> None:
    listen = load(config, {}).listen
    with socket.socket() as silent:
        silent.bind((listen.host, listen.port))
        silent.listen()
        done = await cli("status", "--config", config, "--timeout", "0.2")
    assert done.code == 75
    assert "did not answer within 0.2 s" in done.err


# ----------------------------------------------------------------------------------------- a daemon that is down
async def test_status_of_a_daemon_that_is_down_is_the_journals(config: Path) -> None:
    write_journal(
        config,
        EpochBegan(epoch=1),
        RoundBegan(round=RoundName(1, 1), version=Version(7, 41), attempt=1, engines=("a",)),
        ended(1),
        Committed(round=RoundName(1, 1), version=Version(7, 41), sequence=1),
        ended(2, "failed", "digest of a/0 differs"),
    )
    table = await cli("status", "--config", config)
    data = await cli("status", "--config", config, "--json")
    rounds = await cli("rounds", "--config", config, "--last", "1")
    assert (table.code, data.code, rounds.code) == (75, 75, 75)
    assert "cannot be reached" in table.err
    assert "the daemon does not answer" in table.out
    assert "step 41" in table.out
    assert json.loads(data.out)["source"] == "journal"
    assert json.loads(data.out)["committed"]["step"] == 41
    assert "digest of a/0 differs" in rounds.out
    assert "1.1" not in rounds.out


async def test_status_beside_a_daemon_that_holds_the_journal_but_not_the_port(config: Path) -> None:
    write_journal(config, ended(1))
    with Journal.open(load(config, {}).journal_path):
        done = await cli("rounds", "--config", config)
    assert "1.1" in done.out


async def test_an_open_round_is_pointed_out(config: Path) -> None:
    began = RoundBegan(round=RoundName(1, 1), version=Version(7, 41), attempt=1, engines=("a",))
    write_journal(config, began, LiveDirty(round=RoundName(1, 1), writers={}))
    done = await cli("status", "--config", config)
    assert "may have torn their live weights" in done.out


async def test_neither_daemon_nor_journal(config: Path) -> None:
    done = await cli("status", "--config", config)
    assert done.code == 75
    assert done.out == ""
    assert "nor can the journal be read" in done.err


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


# ------------------------------------------------------------------------------------------------------------ config
async def test_config_check_of_a_good_one(config: Path) -> None:
    done = await process("config", "check", config)
    assert done.code == 0, done.out
    assert "run glm, 1 engine (a), transport nixl, rendezvous hub" in done.out
    assert "does not exist yet and can be made" in done.out
    assert "is free" in done.out
    assert TOKEN not in done.out
    assert not (config.parent / "state").exists()


async def test_config_schema_is_json_schema() -> None:
    done = await cli("config", "schema")
    schema = json.loads(done.out)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["transport"]["discriminator"]["propertyName"] == "type"


def test_config_check_finds_what_is_wrong_outside_the_file(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = config.parent / "token"
    (config.parent / "run").write_text("a file")
    token.chmod(0o644)
    assert main(["config", "check", str(config)]) == 78
    out = capsys.readouterr().out
    assert f"mode 0644, others may read it. Fix: chmod 600 {token}" in out
    assert "is no directory" in out
    token.chmod(0o600)
    token.write_text("short")
    main(["config", "check", str(config)])
    assert "can be guessed" in capsys.readouterr().out
    token.unlink()
    assert main(["config", "check", str(config)]) == 78
    assert "secret cannot be read" in capsys.readouterr().out


def test_config_check_says_that_a_port_is_taken_and_does_not_fail(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listen = load(config, {}).listen
    with socket.socket() as taken:
        taken.bind((listen.host, listen.port))
        taken.listen()
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
    environ = {"WEIGHTSYNC__LISTEN__HOST": "0.0.0.0", "WEIGHTSYNC__ADVERTISE_URL": "http://head:7410",
               "WEIGHTSYNC__RENDEZVOUS": "{type: tcpstore, host: head}"}  # fmt: skip
    texts = [finding.text for finding in findings_of(load(config, environ)) if finding.level == "warning"]
    assert any("unencrypted" in text for text in texts)
    assert any("unpickles" in text for text in texts)


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


# ------------------------------------------------------------------------------------------------------------ tables
def test_the_status_table_at_a_glance() -> None:
    from weightsync.orchestrator.daemon.admin.views import ProgressView, TrainerView, VersionView

    version = VersionView(step=40, generation=255, sequence=3, digest="ab" * 16, unix_time=NOW - 90)
    text = status_text(
        StatusView(
            run="glm", state="step 40 is served; waits for the next version", epoch=2, journal_id="cd" * 16,
            started=NOW - 7200, committed=version,
            engines=(
                EngineView(name="prefill-0", url="http://a", role="prefill", state="serving", version=version,
                           ranks_connected=8, ranks_expected=8, paused=False),
                EngineView(name="d", url="http://b", role="decode", state="held", torn=True, error="bad\x1b[31m news"),
            ),
            trainers=tuple(TrainerView(rank=r, host="n", pid=1, state="ready", staged=version) for r in range(10)),
            round=ProgressView(round="2.7", version=version, phase="writing", attempt=2, elapsed_seconds=0.4),
            rounds=(RoundRow(round="2.6", step=39, generation=255, attempt=1, outcome="failed", engines=("d",),
                             evicted=("d",), reason="no CLOSED from trainer/1 within 300 s", bytes=1_500_000_000,
                             wire_gb_per_s=41.234, pause_ms=30.4, stall_ms=210.6, verify_ms=25, total_ms=221,
                             unix_time=NOW - 30),),
            problems=("broadcasts/step_007: wrongly named, ignored",),
        ),
        NOW,
    )  # fmt: skip
    assert (
        text
        == """\
run glm   daemon epoch 2, up 2.0 h   journal cdcdcdcd
step 40 is served; waits for the next version
committed: step 40 (generation ff), commit 3, 2 min ago, digest abababababababab
round 2.7: step 40, attempt 2, writing for 0.4 s

ENGINE     ROLE     STATE        VERSION  RANKS  PAUSED  URL       LAST ERROR
prefill-0  prefill  serving      step 40  8/8    no      http://a
d          decode   held (TORN)  -        0/?    ?       http://b  bad [31m news

TRAINER    STATE  STAGED   PROCESS
trainer/0  ready  step 40  n:1
trainer/1  ready  step 40  n:1
trainer/2  ready  step 40  n:1
trainer/3  ready  step 40  n:1
trainer/4  ready  step 40  n:1
trainer/5  ready  step 40  n:1
trainer/6  ready  step 40  n:1
trainer/7  ready  step 40  n:1
… and 2 more

ROUND  STEP  TRY  OUTCOME  ENGINES   BYTES  WIRE GB/S  PAUSE MS  STALL MS  VERIFY MS  TOTAL MS   AGO
  2.6    39    1  failed   d        1.5 GB      41.23        30       211         25       221  30 s
    no CLOSED from trainer/1 within 300 s
    left out: d

problems:
  broadcasts/step_007: wrongly named, ignored"""
    )


def test_no_rounds_yet() -> None:
    assert rounds_text((), NOW) == "no round has ended yet"


def test_token_files_keep_their_mode(config: Path) -> None:
    findings_of(load(config, {}))
    assert stat.S_IMODE((config.parent / "token").stat().st_mode) == 0o600
