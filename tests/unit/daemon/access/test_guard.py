"""The guard before a route: which credential it sees, and what it answers."""

from pathlib import Path

import aiohttp
import pytest
import structlog
from aiohttp import web
from credentials import TOKENS, write_credentials
from weightsync.orchestrator.daemon.access.access import Access
from weightsync.orchestrator.daemon.access.guard import CREDENTIAL
from weightsync.orchestrator.settings.credentials import make_tokens
from weightsync.orchestrator.settings.secrets import read_tokens


async def ask(directory: Path, headers: dict[str, str], path: str = "/status") -> tuple[int, str]:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=request.match_info[CREDENTIAL])

    app = web.Application()
    Access(directory, "run", str).guard.install(app)
    app.router.add_get("/status", answer)
    app.router.add_get("/novelty", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}{path}"
    try:
        async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as response:
            return response.status, (await response.text()).strip()
    finally:
        await runner.cleanup()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_credentials(tmp_path / "credentials")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_the_handler_is_told_who_asks(directory: Path, scheme: str) -> None:
    make_tokens(directory, ("viewer.prometheus",))
    named = read_tokens(directory / "viewer.prometheus.token")[0]
    assert await ask(directory, {"Authorization": f"{scheme} {named}"}) == (200, "viewer prometheus")
    assert await ask(directory, {"Authorization": f"{scheme}  {TOKENS['operator']}"}) == (200, "operator")


@pytest.mark.parametrize(
    ("header", "status", "says"),
    [
        ("", 401, "wrong or missing token"),
        (TOKENS["viewer"], 401, "wrong or missing token"),
        (f"Basic {TOKENS['viewer']}", 401, "wrong or missing token"),
        (f"Bearer {TOKENS['viewer']}x", 401, "wrong or missing token"),
        ("Bearer ä", 401, "wrong or missing token"),
        (f"Bearer {TOKENS['engine']}", 403, "this needs the credential of role operator or viewer, and this one is of"
         " role engine"),
    ],
)  # fmt: skip
async def test_who_is_turned_away(directory: Path, header: str, status: int, says: str) -> None:
    with structlog.testing.capture_logs() as logs:
        assert await ask(directory, {"Authorization": header}) == (status, says)
    assert [line["reason"] for line in logs] == [says]
    assert not [token for token in TOKENS.values() if token in repr(logs)]


async def test_a_route_without_a_policy_is_nobodys(directory: Path) -> None:
    bearer = {"Authorization": f"Bearer {TOKENS['operator']}"}
    says = "this needs the credential of role nobody, and this one is of role operator"
    assert await ask(directory, bearer, "/novelty") == (403, says)
    assert (await ask(directory, {}, "/absent"))[0] == 404
