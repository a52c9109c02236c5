"""The admin routes over real HTTP."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from credentials import TOKENS, write_credentials
from weightsync.orchestrator.daemon.access.access import Access
from weightsync.orchestrator.daemon.admin import routes as admin
from weightsync.orchestrator.daemon.admin.verbs import Asker, Order, VerbRefused
from weightsync.orchestrator.daemon.admin.views import (
    EngineView,
    LayoutsView,
    RoundRow,
    RoundsView,
    StatusView,
    VerbView,
    VersionView,
)
from weightsync.orchestrator.daemon.metrics import CONTENT_TYPE

TOKEN = TOKENS["operator"]

ROW = RoundRow(
    round="2.9", step=40, generation=7, attempt=1, outcome="committed", engines=("a",), bytes=10**9,
    wire_gb_per_s=12.5, pause_ms=30, stall_ms=210, verify_ms=25, total_ms=220, unix_time=1000.0,
)  # fmt: skip
VIEW = StatusView(
    run="glm", state="all is well", epoch=2, journal_id="ab" * 16,
    committed=VersionView(step=40, generation=7, sequence=3),
    engines=(
        EngineView(name="a", url="http://a", role="both", state="serving", paused=False, ranks_connected=2,
                   ranks_expected=2, version=VersionView(step=40, generation=7)),
        EngineView(name='q"\n', url="http://b", role="decode", state="torn", torn=True),
    ),
    rounds=(ROW,),
)  # fmt: skip


class Fixed:
    """Views that say what they are told."""

    def __init__(self, layouts: LayoutsView | None = None) -> None:
        self.asked: list[int] = []
        self._layouts = layouts

    async def status(self) -> StatusView:
        return VIEW

    async def rounds(self, last: int) -> RoundsView:
        self.asked.append(last)
        return RoundsView(run="glm", rounds=(ROW,))

    async def layouts(self) -> LayoutsView | None:
        return self._layouts

    async def ready(self, engine: str) -> tuple[bool, str] | None:
        return {"a": (True, "serving"), "b": (False, "torn")}.get(engine)


@contextlib.asynccontextmanager
async def serving(directory: Path, routes: list[web.RouteDef]) -> AsyncIterator[str]:
    app = web.Application()
    Access(write_credentials(directory / "credentials"), "glm", str).guard.install(app)
    app.router.add_routes(routes)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def get(url: str, token: str | None = TOKEN) -> tuple[int, bytes]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as response:
        return response.status, await response.read()


async def test_status_and_rounds(tmp_path: Path) -> None:
    views = Fixed()
    async with serving(tmp_path, admin.routes(views)) as url:
        status, body = await get(url + "/status")
        assert status == 200
        assert msgspec.json.decode(body, type=StatusView) == VIEW
        status, body = await get(url + "/rounds")
        assert msgspec.json.decode(body, type=RoundsView).rounds == (ROW,)
        await get(url + "/rounds?last=7")
        assert views.asked == [admin.DEFAULT_ROUNDS, 7]
        for bad in ("0", "x", "-1", "10001", "1" * 30, "٣"):
            assert (await get(f"{url}/rounds?last={bad}"))[0] == 400


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN + "x", TOKEN[:-1]])
async def test_nothing_without_the_token_but_health(tmp_path: Path, token: str | None) -> None:
    async with serving(tmp_path, admin.routes(Fixed())) as url:
        for path in ("/status", "/rounds", "/metrics", "/plan/layouts"):
            assert await get(url + path, token) == (401, b"wrong or missing token\n")
        assert await get(url + "/healthz", token) == (200, b"ok\n")


async def test_layouts(tmp_path: Path) -> None:
    async with serving(tmp_path, admin.routes(Fixed())) as url:
        assert (await get(url + "/plan/layouts"))[0] == 404
    async with serving(tmp_path, admin.routes(Fixed(LayoutsView(run="glm", root="f", parties=())))) as url:
        assert msgspec.json.decode((await get(url + "/plan/layouts"))[1])["root"] == "f"


async def test_metrics(tmp_path: Path) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with (
        serving(tmp_path, admin.routes(Fixed())) as url,
        aiohttp.ClientSession() as session,
        session.get(url + "/metrics", headers=headers) as response,
    ):
        assert response.status == 200
        assert response.headers["Content-Type"] == CONTENT_TYPE
        assert 'weightsync_engine_torn{engine="q\\"\\n",role="decode"} 1.0' in (await response.text()).splitlines()


async def test_a_load_balancer_asks_without_a_token(tmp_path: Path) -> None:
    async with serving(tmp_path, admin.routes(Fixed())) as url:
        assert await get(url + "/engines/a/ready", None) == (200, b"serving\n")
        assert await get(url + "/engines/b/ready", None) == (503, b"torn\n")
        assert await get(url + "/engines/c/ready", None) == (404, b"no such engine\n")


class Obeying:
    """Verbs that note what they are asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Order, Asker]] = []

    async def perform(self, verb: str, order: Order, asker: Asker) -> VerbView:
        self.asked.append((verb, order, asker))
        if verb == "explode":
            raise VerbRefused(404, "there is no verb 'explode'")
        return VerbView(verb=verb, target=order.target, says="done")


async def post(url: str, body: bytes, token: str = TOKEN) -> tuple[int, bytes]:
    headers = {"Authorization": f"Bearer {token}"}
    async with aiohttp.ClientSession() as session, session.post(url, data=body, headers=headers) as response:
        return response.status, await response.read()


async def test_verbs_are_posted_by_operators(tmp_path: Path) -> None:
    verbs: Any = Obeying()
    async with serving(tmp_path, admin.verb_routes(verbs)) as url:
        status, body = await post(url + "/verbs/hold", b'{"target": "a", "reason": "why", "by": "ann"}')
        assert (status, msgspec.json.decode(body, type=VerbView).says) == (200, "done")
        assert verbs.asked == [("hold", Order(target="a", reason="why", by="ann"), Asker("127.0.0.1", "operator"))]
        assert await post(url + "/verbs/explode", b"{}") == (404, b"there is no verb 'explode'\n")
        assert await post(url + "/verbs/hold", b"{}", "wrong") == (401, b"wrong or missing token\n")
        assert (await get(url + "/verbs/hold"))[0] == 405
        for body in (b"", b"[]", b"\xff", b'{"target": 1}', b'{"tarket": "a"}', b"[" * 20_000, b" " * 1_000_000,
                     b'{"reason": "%s"}' % (b"x" * 301)):  # fmt: skip
            status, text = await post(url + "/verbs/hold", body)
            assert (status, text.startswith(b"the body is no order")) == (400, True)
        assert len(verbs.asked) == 2
