"""The way to a daemon on real sockets."""

import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from credentials import write_credentials
from servers_here import only, served, speaking
from weightsync.agents.doctor import hub
from weightsync.orchestrator.cli.certs import make_certificates
from weightsync.orchestrator.core.events import Event
from weightsync.orchestrator.daemon.access.access import Access
from weightsync.orchestrator.daemon.access.tls import ServerTls
from weightsync.orchestrator.daemon.hub.connection import HubTiming
from weightsync.orchestrator.daemon.hub.hub import Hub
from weightsync.orchestrator.protocol.findings import Finding
from weightsync.orchestrator.settings.sections import ListenTls


@pytest.fixture
def token(tmp_path: Path) -> Path:
    return write_credentials(tmp_path / "credentials") / "engine.token"


@contextlib.asynccontextmanager
async def daemon(token: Path, run: str = "glm", tls: ServerTls | None = None) -> AsyncIterator[str]:
    """The daemon's own endpoint for agents; its URL for them."""
    access = Access(token.parent, run, str, tls)
    hub_there = Hub(access=access, post=HEARD.append, next_id=lambda: 1, timing=HubTiming(5, 3, 5, 0.1))

    async def health(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    port = await hub_there.start("127.0.0.1", 0, lambda app: app.router.add_routes([web.get("/healthz", health)]))
    try:
        yield f"{'ws' if tls is None else 'wss'}://127.0.0.1:{port}/agents"
    finally:
        await hub_there.close()


HEARD: list[Event] = []


async def asked(url: str, token: Path, seconds: float = 10) -> Finding:
    [found] = await hub.daemon(url, token, "glm", seconds)
    return found


async def test_a_daemon_that_answers_and_hears_of_nobody(token: Path) -> None:
    async with daemon(token) as url:
        found = await asked(url, token)
        assert (found.level, found.what) == ("ok", f"{url} answers, and proves that it holds the token")
    assert HEARD == []


async def test_a_daemon_with_tls(token: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("own", "other"):
        make_certificates(tmp_path / name, ["127.0.0.1"], (), 2)
    own = tmp_path / "own"
    files = ListenTls(certificate_file=own / "daemon.pem", key_file=own / "daemon.key", ca_file=own / "ca.pem")
    async with daemon(token, tls=ServerTls(files)) as url:
        monkeypatch.setenv("WEIGHTSYNC_CA_FILE", str(own / "ca.pem"))
        assert (await asked(url, token)).level == "ok"
        assert "is set, and ws://h:1/agents is not TLS" in (await asked("ws://h:1/agents", token)).what
        monkeypatch.setenv("WEIGHTSYNC_CA_FILE", str(tmp_path / "other" / "ca.pem"))
        found = await asked(url, token)
        assert (found.level, found.check) == ("error", "TLS")
        assert "certificate that is not believed" in found.what
        monkeypatch.setenv("WEIGHTSYNC_CA_FILE", str(tmp_path / "none.pem"))
        assert "WEIGHTSYNC_CA_FILE" in (await asked(url, token)).what


async def test_a_daemon_that_is_not_ours(token: Path, tmp_path: Path) -> None:
    async with daemon(token, "other") as url:
        assert "is the daemon of run 'other'" in (await asked(url, token)).what
    async with served(only(index=_ok)) as url:
        assert "answers 404: it is no daemon" in (await asked(url.replace("http", "ws"), token)).what
    async with served(only(healthz=_ok, agents=_ok)) as url:
        assert "no WebSocket" in (await asked(url.replace("http", "ws") + "/agents", token)).what
    async with speaking(b"SSH-2.0-OpenSSH_9.6\r\n") as url:
        assert "is no daemon" in (await asked(url.replace("http", "ws"), token)).what


async def _ok(_: web.Request) -> web.Response:
    return web.Response(text="ok")


async def test_a_token_that_does_not_serve_is_told(token: Path) -> None:
    async with daemon(token) as url:
        other = token.parent.parent / "other"
        other.touch(mode=0o600)
        other.write_text("another-token-of-some-length")
        assert (await asked(url, other)).what == f"{url} does not know the token"
        found = await asked(url, token.with_name("viewer.token"))
        assert (found.level, "an agent needs the token of role engine or trainer" in found.what) == ("error", True)
        assert (await asked(url, token.with_name("none"))).level == "ok", "which another check tells"


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
    assert [(f.level, f.fix) for f in hub.token(token)] == [("error", f"chmod 600 {token}")]
    token.unlink()
    assert [(f.level, f.fix) for f in hub.token(token)] == [("error", hub.MEND_TOKEN)]
