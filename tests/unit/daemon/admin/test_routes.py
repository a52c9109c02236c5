"""The admin routes over real HTTP."""

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from weightsync.orchestrator.daemon.admin import routes as admin
from weightsync.orchestrator.daemon.admin.applications import ApplicationRefused
from weightsync.orchestrator.daemon.admin.verbs import Order, VerbRefused
from weightsync.orchestrator.daemon.admin.views import (
    EngineView,
    LayoutsView,
    RoundRow,
    RoundsView,
    StatusView,
    VerbView,
    VersionView,
)
from weightsync.orchestrator.daemon.meters import Meters
from weightsync.orchestrator.daemon.metrics import CONTENT_TYPE, render
from weightsync.orchestrator.protocol.application import Admitted, Applicant, Application

TOKEN = "t0ken-of-the-test"

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
        self.stuck = ""

    async def status(self) -> StatusView:
        return VIEW

    async def rounds(self, last: int) -> RoundsView:
        self.asked.append(last)
        return RoundsView(run="glm", rounds=(ROW,))

    async def layouts(self) -> LayoutsView | None:
        return self._layouts

    async def metrics(self) -> bytes:
        return render(VIEW, Meters(), 0.0)

    async def obstacle(self) -> str:
        return self.stuck

    async def ready(self, engine: str) -> tuple[bool, str] | None:
        return {"a": (True, "serving"), "b": (False, "torn")}.get(engine)


@contextlib.asynccontextmanager
async def serving(routes: list[web.RouteDef]) -> AsyncIterator[str]:
    app = web.Application()
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


async def test_status_and_rounds() -> None:
    views = Fixed()
    async with serving(admin.routes(views, TOKEN)) as url:
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
async def test_nothing_without_the_token_but_health(token: str | None) -> None:
    async with serving(admin.routes(Fixed(), TOKEN)) as url:
        for path in ("/status", "/rounds", "/metrics", "/plan/layouts"):
            assert await get(url + path, token) == (401, b"wrong or missing token\n")
        assert await get(url + "/healthz", token) == (200, b"ok\n")


async def test_layouts() -> None:
    async with serving(admin.routes(Fixed(), TOKEN)) as url:
        assert (await get(url + "/plan/layouts"))[0] == 404
    async with serving(admin.routes(Fixed(LayoutsView(run="glm", root="f", parties=())), TOKEN)) as url:
        assert msgspec.json.decode((await get(url + "/plan/layouts"))[1])["root"] == "f"


async def test_metrics() -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with (
        serving(admin.routes(Fixed(), TOKEN)) as url,
        aiohttp.ClientSession() as session,
        session.get(url + "/metrics", headers=headers) as response,
    ):
        assert response.status == 200
        assert response.headers["Content-Type"] == CONTENT_TYPE
        assert 'weightsync_engine_torn{engine="q\\"\\n",role="decode"} 1.0' in (await response.text()).splitlines()


async def test_a_supervisor_asks_without_a_token() -> None:
    views = Fixed()
    async with serving(admin.routes(views, TOKEN)) as url:
        assert await get(url + "/readyz", None) == (200, b"ready\n")
        views.stuck = "the disk"
        assert await get(url + "/readyz", None) == (503, b"the disk\n")
        assert await get(url + "/healthz", None) == (200, b"ok\n")


async def test_a_load_balancer_asks_without_a_token() -> None:
    async with serving(admin.routes(Fixed(), TOKEN)) as url:
        assert await get(url + "/engines/a/ready", None) == (200, b"serving\n")
        assert await get(url + "/engines/b/ready", None) == (503, b"torn\n")
        assert await get(url + "/engines/c/ready", None) == (404, b"no such engine\n")


class Obeying:
    """Verbs that note what they are asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Order, str]] = []

    async def perform(self, verb: str, order: Order, address: str) -> VerbView:
        self.asked.append((verb, order, address))
        if verb == "explode":
            raise VerbRefused(404, "there is no verb 'explode'")
        return VerbView(verb=verb, target=order.target, says="done")


async def post(url: str, body: bytes, token: str = TOKEN) -> tuple[int, bytes]:
    headers = {"Authorization": f"Bearer {token}"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, data=io.BytesIO(body), headers=headers) as response,
    ):
        return response.status, await response.read()


async def test_verbs_are_posted_by_whoever_bears_the_token() -> None:
    verbs: Any = Obeying()
    async with serving(admin.verb_routes(verbs, TOKEN)) as url:
        status, body = await post(url + "/verbs/hold", b'{"target": "a", "reason": "why", "by": "ann"}')
        assert (status, msgspec.json.decode(body, type=VerbView).says) == (200, "done")
        assert verbs.asked == [("hold", Order(target="a", reason="why", by="ann"), "127.0.0.1")]
        assert await post(url + "/verbs/explode", b"{}") == (404, b"there is no verb 'explode'\n")
        assert await post(url + "/verbs/hold", b"{}", "wrong") == (401, b"wrong or missing token\n")
        assert (await get(url + "/verbs/hold"))[0] == 405
        for body in (b"", b"[]", b"\xff", b'{"target": 1}', b'{"tarket": "a"}', b"[" * 20_000, b" " * 1_000_000,
                     b'{"reason": "%s"}' % (b"x" * 301)):  # fmt: skip
            status, text = await post(url + "/verbs/hold", body)
            assert (status, text.startswith(b"the body is no order")) == (400, True)
        assert len(verbs.asked) == 2


class Taking:
    """Takes in all engines but one."""

    def __init__(self) -> None:
        self.heard: list[tuple[Application, str]] = []

    async def receive(self, application: Application, address: str) -> Admitted:
        self.heard.append((application, address))
        if application.engine.name == "bad":
            raise ApplicationRefused(409, "name 'bad': no. Fix: none")
        return Admitted(again_seconds=15.0)


async def test_engines_apply_with_the_token() -> None:
    applications: Any = Taking()
    good = Application(run_id="glm", engine=Applicant(name="a", urls=tuple(f"http://h{n}" for n in range(64))))
    bad = Application(run_id="glm", engine=Applicant(name="bad", urls=("http://h",)))
    async with serving(admin.application_routes(applications, TOKEN)) as url:
        answer = await post(url + "/engines", msgspec.json.encode(good))
        assert answer == (200, b'{"again_seconds":15.0}')
        assert applications.heard == [(good, "127.0.0.1")]
        assert await post(url + "/engines", msgspec.json.encode(bad)) == (409, b"name 'bad': no. Fix: none\n")
        wrong = await post(url + "/engines", msgspec.json.encode(good), "wrong")
        assert wrong == (401, b"wrong or missing token\n")
        long = msgspec.json.encode(good).replace(b"http://h1", b"http://h" + b"1" * 200_000)
        for body in (b"", b"[]", b"\xff", b'{"run_id": "glm"}', b"[" * 20_000, long):
            status, text = await post(url + "/engines", body)
            assert (status, text.startswith(b"the body is no application: ")) == (400, True)
        assert len(applications.heard) == 2


async def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "BODY_SECONDS", 0.01)
    applications: Any = Taking()

    async def endless() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async with (
        serving(admin.application_routes(applications, TOKEN)) as url,
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as session,
        session.post(url + "/engines", data=endless()) as response,
    ):
        assert (response.status, await response.text()) == (400, "the body has not come within 0.01 s\n")
