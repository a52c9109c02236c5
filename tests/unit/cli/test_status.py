"""``status`` and ``rounds``, of a daemon that runs and of one that is down: real files, real sockets."""

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from command_line import cli, process
from credentials import TOKENS
from weightsync.orchestrator.cli.certs import make_certificates
from weightsync.orchestrator.core.records import (
    Committed,
    EpochBegan,
    LiveDirty,
    Record,
    RoundBegan,
    RoundEnded,
    encode_record,
)
from weightsync.orchestrator.daemon.access.access import Access
from weightsync.orchestrator.daemon.access.tls import ServerTls
from weightsync.orchestrator.daemon.admin import routes as admin
from weightsync.orchestrator.daemon.admin.views import (
    EngineView,
    LayoutsView,
    ProblemView,
    RoundRow,
    RoundsView,
    StatusView,
)
from weightsync.orchestrator.daemon.hub.connection import HubTiming
from weightsync.orchestrator.daemon.hub.hub import Hub
from weightsync.orchestrator.daemon.journal import Journal
from weightsync.orchestrator.protocol.names import RoundName, Version
from weightsync.orchestrator.settings.settings import load


class Views:
    """A daemon's views, fixed."""

    problems: tuple[ProblemView, ...] = ()

    async def status(self) -> StatusView:
        engine = EngineView(name="a", url="http://a", role="both", state="serving", paused=False)
        return StatusView(run="glm", state="step 40 is served", epoch=3, engines=(engine,), problems=self.problems)

    async def rounds(self, last: int) -> RoundsView:
        row = RoundRow(round="3.1", step=40, generation=7, attempt=1, outcome="committed", total_ms=float(last))
        return RoundsView(run="glm", rounds=(row,))

    async def layouts(self) -> LayoutsView | None:
        return None

    async def metrics(self) -> bytes:
        return b""

    async def obstacle(self) -> str:
        return ""

    async def ready(self, engine: str) -> tuple[bool, str] | None:
        return {"a": (True, "serving"), "b": (False, "torn")}.get(engine)


@contextlib.asynccontextmanager
async def daemon(config: Path) -> AsyncIterator[str]:
    app = web.Application()
    Access(config.parent / "credentials", "glm", str).guard.install(app)
    app.router.add_routes(admin.routes(Views()))
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
        round=RoundName(1, number), version=Version(7, 40 + number), attempt=1, engines=("a",), left_out=(),
        outcome=outcome, reason=reason, bytes=2_000_000, descriptors=3,
        times={"pausing": 0.03, "wire": 0.001, "stall": 0.2, "verifying": 0.02, "total": 0.25},
    )  # fmt: skip


def write_journal(config: Path, *records: Record) -> None:
    with Journal.open(load(config, {}).journal_path) as journal:
        journal.append([(type(record).__name__, encode_record(record)) for record in records])


async def test_status_and_rounds_of_a_running_daemon(config: Path) -> None:
    async with daemon(config) as url:
        table = await process("status", "--config", config)
        data = await cli("status", "--json", WEIGHTSYNC_CONFIG=str(config))
        viewer = config.parent / "credentials" / "viewer.token"
        by_url = await cli("rounds", "--last", "7", "--url", url, "--token-file", viewer, "--json")
        rounds = await cli("rounds", "--config", config)
    assert (table.code, table.err) == (0, "")
    assert "step 40 is served" in table.out
    assert "ENGINE" in table.out
    assert json.loads(data.out)["engines"][0]["state"] == "serving"
    assert json.loads(by_url.out)["rounds"][0]["total_ms"] == 7
    assert "committed" in rounds.out


async def test_a_wrong_token_is_77_and_not_shown(config: Path) -> None:
    async with daemon(config):
        (config.parent / "credentials" / "viewer.token").write_text("another-token-of-20c")
        done = await cli("status", "--config", config)
        trainers = await cli("status", "--config", config, "--token-file", config.parent / "credentials/trainer.token")
    assert done.code == 77
    assert "refuses the token" in done.err
    assert "another-token" not in done.err
    assert trainers.code == 77
    assert "needs the credential of role operator or viewer, and this one is of role trainer" in trainers.err
    assert TOKENS["trainer"] not in trainers.err


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


@pytest.mark.parametrize(
    ("severities", "code", "line"),
    [
        ((), 0, "ok: nothing is committed, 1 of 1 engines serve"),
        (("degraded",), 1, "degraded: e0: left out"),
        (("critical", "degraded"), 2, "critical: e0: left out (and 1 more)"),
    ],
)
async def test_a_monitor_gets_a_code_and_one_line(
    config: Path, monkeypatch: pytest.MonkeyPatch, severities: tuple[Any, ...], code: int, line: str
) -> None:
    monkeypatch.setattr(Views, "problems", tuple(ProblemView(severity=s, what="e0: left out") for s in severities))
    async with daemon(config):
        done = await cli("status", "--check", "--config", config)
        told = await cli("status", "--check", "--json", "--config", config)
    assert (done.code, done.out, done.err) == (code, line + "\n", "")
    view = json.loads(told.out)
    assert (told.code, view["exit"], view["says"], len(view["problems"])) == (code, code, line, len(severities))


async def test_a_monitor_of_a_daemon_that_is_down(config: Path) -> None:
    write_journal(config, EpochBegan(epoch=1))
    done = await cli("status", "--check", "--config", config)
    assert (done.code, done.out) == (75, "critical: the daemon is not running; no version was ever committed\n")


async def test_a_health_check_needs_no_token(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    down = await cli("status", "--ready", "--config", config)
    assert (down.code, down.out) == (75, "")
    assert "cannot be reached" in down.err
    async with daemon(config):
        for token in (config.parent / "credentials").glob("[ov]*.token"):
            token.unlink()
        done = await cli("status", "--ready", "--config", config)
        assert (done.code, done.out) == (0, "ready\n")
        told = await cli("status", "--ready", "--json", "--config", config)
        assert (told.code, json.loads(told.out)) == (0, {"ready": True, "says": "ready"})

        async def stuck(_: Views) -> str:
            return "the journal's disk has not answered for 9 s"

        monkeypatch.setattr(Views, "obstacle", stuck)
        done = await cli("status", "--ready", "--config", config)
        assert done.code == 75
        assert "answered 503: the journal's disk has not answered for 9 s" in done.err
        told = await cli("status", "--ready", "--json", "--config", config)
        assert (told.code, told.err, json.loads(told.out)["ready"]) == (75, "", False)
        assert "has not answered for 9 s" in json.loads(told.out)["says"]


async def test_one_round_in_full(config: Path) -> None:
    async with daemon(config) as url:
        there = ("--url", url, "--token-file", config.parent / "credentials" / "viewer.token")
        done = await cli("rounds", "show", "3.1", *there)
        assert done.code == 0, done.err
        assert "committed" in done.out
        told = await cli("rounds", "show", "3.1", "--json", *there)
        assert json.loads(told.out)["round"] == "3.1"
        none = await cli("rounds", "show", "9.9", *there)
        assert (none.code, none.err) == (65, "no round 9.9 has ended; there are 3.1 to 3.1\n")
        assert (await cli("rounds", "3.1", *there)).code == 2


async def test_a_daemon_with_tls_is_asked_by_the_authority_of_its_configuration(config: Path, tmp_path: Path) -> None:
    certificates = tmp_path / "certificates"
    make_certificates(certificates, ["127.0.0.1"], ["viewer"], 2)
    make_certificates(tmp_path / "others", ["127.0.0.1"], ["viewer"], 2)
    names = {"certificate_file": "daemon.pem", "key_file": "daemon.key", "ca_file": "ca.pem"}
    files = ", ".join(f"{key}: {certificates / name}" for key, name in names.items())
    text = config.read_text()  # noqa: ASYNC240
    config.write_text(text.replace("listen: {", f"listen: {{tls: {{{files}, client_certificates: true}}, "))  # noqa: ASYNC240
    settings = load(config, {})
    assert settings.listen.tls is not None
    access = Access(settings.credentials, "glm", str, ServerTls(settings.listen.tls))
    hub = Hub(access=access, post=lambda _: None, next_id=lambda: 1, timing=HubTiming(5, 3, 5, 0.1))

    def configure(app: web.Application) -> None:
        app.router.add_routes(admin.routes(Views()))

    await hub.start(settings.listen.host, settings.listen.port, configure)
    shown = {
        "WEIGHTSYNC_CERTIFICATE_FILE": str(certificates / "viewer.pem"),
        "WEIGHTSYNC_KEY_FILE": str(certificates / "viewer.key"),
    }
    done = await cli("status", "--config", config, "--json", **shown)
    assert (done.code, json.loads(done.out)["engines"][0]["state"]) == (0, "serving")
    without = await cli("status", "--config", config)
    assert (without.code, "needs a client certificate" in without.err) == (77, True)
    stranger = await cli("status", "--config", config, WEIGHTSYNC_CA_FILE=str(tmp_path / "others" / "ca.pem"))
    assert (stranger.code, "certificate verify failed" in stranger.err) == (75, True)
    await hub.close()
