"""What the commands say of a server that is not the daemon, or does not answer."""

import socket
import ssl
from pathlib import Path

import pytest
from aiohttp import web
from command_line import cli
from credentials import TOKENS
from weightsync.orchestrator.cli.certs import make_certificates
from weightsync.orchestrator.cli.client import Denied, Unreachable, fetch, token_for
from weightsync.orchestrator.settings.problems import ConfigError
from weightsync.orchestrator.settings.settings import load
from weightsync.orchestrator.settings.tls import client_context


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
    with socket.create_server((listen.host, listen.port)):
        done = await cli("status", "--config", config, "--timeout", "0.2")
    assert done.code == 75
    assert "did not answer within 0.2 s" in done.err


def test_the_token_file_that_is_given_beats_that_of_the_configuration(config: Path, tmp_path: Path) -> None:
    (tmp_path / "other").touch(mode=0o600)
    (tmp_path / "other").write_text("another-token")
    settings = load(config, {})
    assert token_for(None, settings) == TOKENS["viewer"]
    assert token_for(None, settings, "operator") == TOKENS["operator"]
    (tmp_path / "credentials" / "viewer.token").unlink()
    assert token_for(None, settings) == TOKENS["operator"]
    (tmp_path / "credentials" / "operator.token").unlink()
    with pytest.raises(ConfigError, match=r"operator.token: secret cannot be read"):
        token_for(None, settings)
    assert token_for(tmp_path / "other", settings) == "another-token"
    assert token_for(None, None) is None


async def test_an_answer_above_the_limit_and_a_redirect_are_refused(config: Path) -> None:
    async def large(_: web.Request) -> web.Response:
        return web.Response(body=b"x" * 1001)

    async def elsewhere(_: web.Request) -> web.Response:
        raise web.HTTPFound("/status")

    app = web.Application()
    app.router.add_get("/status", large)
    app.router.add_get("/rounds", elsewhere)
    runner = web.AppRunner(app)
    await runner.setup()
    port = load(config, {}).listen.port
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        assert len(await fetch(f"http://127.0.0.1:{port}/status", None, 10, 1001)) == 1001
        with pytest.raises(Unreachable, match="more than 1000 bytes"):
            await fetch(f"http://127.0.0.1:{port}/status", None, 10, 1000)
        with pytest.raises(Unreachable, match="answered 302"):
            await fetch(f"http://127.0.0.1:{port}/rounds?last=1", None, 10)
    finally:
        await runner.cleanup()


async def test_each_way_of_not_being_reached_is_told_with_what_to_do(tmp_path: Path) -> None:
    """Nobody there, http to https and back, another authority, another name: of real servers."""
    make_certificates(tmp_path, ["127.0.0.1"], [], 2)
    make_certificates(tmp_path / "other", ["127.0.0.1"], [], 2)
    secure = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    secure.load_cert_chain(tmp_path / "daemon.pem", tmp_path / "daemon.key")
    runner = web.AppRunner(web.Application(), shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=secure).start()
        plain, tls = (port for _, port in runner.addresses)
        ours, other = (client_context(at / "ca.pem", None, None) for at in (tmp_path, tmp_path / "other"))
        for url, context, fix in (
            (f"http://127.0.0.1:{tls}", None, "write https://"),
            (f"https://127.0.0.1:{plain}", ours, "write http://"),
            (f"https://127.0.0.1:{tls}", other, "WEIGHTSYNC_CA_FILE must name"),
            (f"https://localhost:{tls}", ours, "a name that certs was given"),
            (f"http://127.0.0.1:{plain}", None, "without a path"),
        ):
            with pytest.raises(Unreachable, match=f"Fix: .*{fix}"):
                await fetch(f"{url}/status", None, 10, tls=context)
    finally:
        await runner.cleanup()
    with pytest.raises(Unreachable, match=r"Fix: start it \(weightsync-orchestrator run\), or give the address"):
        await fetch(f"http://127.0.0.1:{plain}/status", None, 10)


@pytest.mark.parametrize(
    ("token", "fix"), [(None, "give --token-file, or --config"), ("x", "--token-file must name a file of that role")]
)
async def test_who_gave_no_token_is_told_so(token: str | None, fix: str) -> None:
    async def refuse(_: web.Request) -> web.Response:
        return web.Response(status=401, text="wrong or missing token\n")

    app = web.Application()
    app.router.add_get("/status", refuse)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        [(_, port)] = runner.addresses
        with pytest.raises(Denied, match=f"wrong or missing token. Fix: {fix}"):
            await fetch(f"http://127.0.0.1:{port}/status", token, 10)
    finally:
        await runner.cleanup()
