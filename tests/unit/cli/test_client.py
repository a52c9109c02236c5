"""What the commands say of a server that is not the daemon, or does not answer."""

import socket
from pathlib import Path

from aiohttp import web
from command_line import cli
from weightsync.orchestrator.settings.settings import load


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
