"""An operator's command, and every way in which it may not be done: real HTTP."""

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from command_line import cli
from credentials import TOKENS
from weightsync.orchestrator.settings.settings import load


@contextlib.asynccontextmanager
async def daemon(config: Path, status: int = 200, text: str = "", kind: str = "text/plain") -> AsyncIterator[list[str]]:
    """Answers each verb so; what was asked for."""
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == f"Bearer {TOKENS['operator']}"
        asked.append(f"{request.path} {await request.text()}")
        return web.Response(status=status, text=text, content_type=kind)

    app = web.Application()
    app.router.add_post("/verbs/{verb}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    listen = load(config, {}).listen
    await web.TCPSite(runner, listen.host, listen.port).start()
    try:
        yield asked
    finally:
        await runner.cleanup()


ANSWER = '{"verb":"hold","target":"a","says":"a is paused now","schema":2}'


async def test_what_happens_now_is_printed(config: Path) -> None:
    async with daemon(config, text=ANSWER, kind="application/json") as asked:
        done = await cli("hold", "a", "--reason", "new driver", "--config", config)
        data = await cli("hold", "a", "--json", "--config", config)
    assert (done.code, done.out, done.err) == (0, "a is paused now\n", "")
    assert json.loads(data.out)["says"] == "a is paused now"
    path, _, body = asked[0].partition(" ")
    order = json.loads(body)
    assert (path, order["target"], order["reason"]) == ("/verbs/hold", "a", "new driver")
    assert "@" in order["by"]


@pytest.mark.parametrize(
    ("status", "text", "kind", "code", "said"),
    [
        (404, "there is no engine 'b'; engines are: a\n", "text/plain", 65, "there is no engine 'b'; engines are: a"),
        (409, "trainer/1 is \x1b[31malive\n", "text/plain", 65, "trainer/1 is \\x1b[31malive"),
        (401, "wrong or missing token\n", "text/plain", 77, "refuses the token"),
        (404, "<html>", "text/html", 75, "answered 404"),
        (200, "<html>", "text/html", 75, "not the daemon's"),
        (200, '{"says": 1}', "application/json", 75, "not the daemon's"),
    ],
)
async def test_what_is_not_done_has_a_code_and_a_reason(
    config: Path, status: int, text: str, kind: str, code: int, said: str
) -> None:
    async with daemon(config, status, text, kind):
        done = await cli("declare-dead", "trainer/1", "--config", config)
    assert (done.code, done.out) == (code, "")
    assert said in done.err


async def test_a_daemon_that_is_down(config: Path) -> None:
    done = await cli("abort", "--config", config)
    assert (done.code, done.out) == (75, "")
    assert "cannot be reached" in done.err


async def test_a_long_reason_and_no_daemon_are_wrong_usage(config: Path) -> None:
    long = await cli("retry", "--config", config, "--reason", "x" * 301)
    nowhere = await cli("retry")
    assert (long.code, nowhere.code) == (2, 2)
    assert "at most 300" in long.err
    assert "give --config PATH" in nowhere.err
