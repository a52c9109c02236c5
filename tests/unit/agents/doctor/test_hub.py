"""The way to a daemon on real sockets, and a run directory on a real disk."""

import socket
import time
from pathlib import Path

import pytest
from aiohttp import web
from servers_here import only, served, speaking
from weightsync.agents.doctor import hub
from weightsync.orchestrator.protocol.findings import Finding

TOKEN = "0123456789abcdef0123"


@pytest.fixture
def token(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    return file


def daemon(run: str = "glm") -> web.Application:
    """What the daemon answers, so far as it is asked."""

    async def health(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def rounds(request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return web.Response(status=401, text="wrong or missing token\n")
        return web.Response(body=f'{{"run":"{run}","rounds":[]}}'.encode(), content_type="application/json")

    return only(healthz=health, rounds=rounds)


async def asked(url: str, token: Path, seconds: float = 10) -> Finding:
    [found] = await hub.daemon(url, token, "glm", seconds)
    return found


async def test_a_daemon_that_answers(token: Path) -> None:
    async with served(daemon()) as url:
        assert (await asked(url.replace("http", "ws") + "/agents", token)).level == "ok"


async def test_a_daemon_that_is_not_ours(token: Path) -> None:
    async with served(daemon("other")) as url:
        assert "another run than 'glm'" in (await asked(url, token)).what
    async with served(only(index=_ok)) as url:
        assert "answers 404: it is no daemon" in (await asked(url, token)).what
    async with speaking(b"SSH-2.0-OpenSSH_9.6\r\n") as url:
        assert "is no daemon" in (await asked(url, token)).what


async def _ok(_: web.Request) -> web.Response:
    return web.Response(text="ok")


async def test_a_wrong_token_is_told(token: Path) -> None:
    token.write_text("another token of some length".replace(" ", "-"))  # noqa: ASYNC240
    async with served(daemon()) as url:
        assert (await asked(url, token)).what == f"{url} refuses the token"


async def test_nobody_there(token: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"ws://127.0.0.1:{free.getsockname()[1]}/agents"
        assert "cannot be reached" in (await asked(url, token)).what
        free.listen()
        assert "does not answer within 0.1 s" in (await asked(url, token, 0.1)).what
    assert "is no URL" in (await asked("head:7410", token)).what


def test_a_token_file(token: Path) -> None:
    assert [f.level for f in hub.token(token)] == ["ok"]
    token.chmod(0o644)
    assert [(f.level, f.fix) for f in hub.token(token)] == [("warning", f"chmod 600 {token}")]
    token.unlink()
    assert [f.level for f in hub.token(token)] == ["error"]


def test_clocks() -> None:
    now = time.mktime(time.strptime("Thu, 26 Nov 2026 12:00:00", "%a, %d %b %Y %H:%M:%S")) - time.timezone
    date = "Thu, 26 Nov 2026 12:00:00 GMT"
    assert list(hub.clock(date, now)) == []
    [ahead], [behind] = list(hub.clock(date, now - 60)), list(hub.clock(date, now + 61))
    assert ("60 s ahead of" in ahead.what, "60 s behind" in behind.what) == (True, True)
    assert list(hub.clock("yesterday", now)) == []


def test_a_run_directory(tmp_path: Path) -> None:
    assert [f.level for f in hub.run_directory(tmp_path)] == ["ok"]
    assert list(tmp_path.iterdir()) == []
    assert [f.level for f in hub.run_directory(Path("/proc/sys"))] == ["error"]  # as root, too
    assert [f.level for f in hub.run_directory(tmp_path / "none")] == ["error"]
