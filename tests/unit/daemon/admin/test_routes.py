"""The admin routes over real HTTP."""

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from credentials import TOKENS, open_agent, write_credentials
from weightsync.orchestrator.daemon.access.access import Access
from weightsync.orchestrator.daemon.admin import routes as admin
from weightsync.orchestrator.daemon.admin.applications import ApplicationRefused
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
from weightsync.orchestrator.daemon.meters import Meters
from weightsync.orchestrator.daemon.metrics import CONTENT_TYPE, render
from weightsync.orchestrator.protocol.application import Admitted, Applicant, Application, Declined

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
        assert (await get(url + "/plan/layouts"))[0] == 503
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


async def test_a_supervisor_asks_without_a_token(tmp_path: Path) -> None:
    views = Fixed()
    async with serving(tmp_path, admin.routes(views)) as url:
        assert await get(url + "/readyz", None) == (200, b"ready\n")
        views.stuck = "the disk"
        assert await get(url + "/readyz", None) == (503, b"the disk\n")
        assert await get(url + "/healthz", None) == (200, b"ok\n")


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
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, data=io.BytesIO(body), headers=headers) as response,
    ):
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


class Taking:
    """Takes in all engines but one."""

    def __init__(self) -> None:
        self.heard: list[tuple[Application, str]] = []

    async def receive(self, application: Application, address: str) -> Admitted:
        self.heard.append((application, address))
        if application.engine.name == "bad":
            raise ApplicationRefused(409, "name 'bad': no. Fix: none")
        return Admitted(again_seconds=15.0)


GOOD = Application(run_id="glm", engine=Applicant(name="a", urls=tuple(f"http://h{n}" for n in range(64))))
BOUND = "bound-to-a-0123456789"


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[tuple[Taking, str]]:
    """A daemon that takes engines in; beside the tokens of the roles one that is bound to the engine a."""
    taking: Any = Taking()
    directory = write_credentials(tmp_path / "credentials")
    (directory / "engine.a.token").touch(mode=0o600)
    (directory / "engine.a.token").write_text(BOUND)
    access = Access(directory, "glm", str)
    async with serving(tmp_path, admin.application_routes(taking, access)) as url:
        yield taking, url.replace("http", "ws") + "/engines"


async def applied(url: str, token: str, said: bytes) -> Admitted | Declined:
    async with aiohttp.ClientSession() as session:
        socket = await open_agent(session, url, token, "apply")
        await socket.send_bytes(said)
        answer = msgspec.json.decode(await socket.receive_bytes(), type=Admitted | Declined)
        assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE
        return answer  # type: ignore[no-any-return]


async def test_engines_apply_by_a_token_that_is_proved(door: tuple[Taking, str]) -> None:
    taking, url = door
    assert await applied(url, TOKENS["engine"], msgspec.json.encode(GOOD)) == Admitted(again_seconds=15.0)
    assert taking.heard == [(GOOD, "127.0.0.1")]
    bad = Application(run_id="glm", engine=Applicant(name="bad", urls=("http://h",)))
    refused = await applied(url, TOKENS["engine"], msgspec.json.encode(bad))
    assert refused == Declined(status=409, why="name 'bad': no. Fix: none")
    for body in (b"", b"[]", b"\xff", b'{"run_id": "glm"}', b"[" * 20_000):
        answer = await applied(url, TOKENS["engine"], body)
        assert isinstance(answer, Declined)
        assert (answer.status, answer.why.startswith("this is no application: ")) == (400, True)
    assert len(taking.heard) == 2


async def test_a_bound_credential_makes_its_own_engine_a_member_and_no_other(door: tuple[Taking, str]) -> None:
    taking, url = door
    assert await applied(url, BOUND, msgspec.json.encode(GOOD)) == Admitted(again_seconds=15.0)
    other = msgspec.json.encode(Application(run_id="glm", engine=Applicant(name="b", urls=("http://h",))))
    assert await applied(url, BOUND, other) == Declined(
        status=403,
        why="engine 'b' came with the credential of engine a, which is bound to it; give it the token in"
        " engine.b.token, or set its name",
    )
    trainer = await applied(url, TOKENS["trainer"], other)
    assert isinstance(trainer, Declined)
    assert "the credential of role trainer; give it the token in engine.token" in trainer.why
    assert [heard.engine.name for heard, _ in taking.heard] == ["a"]


@pytest.mark.parametrize(("token", "status"), [(TOKENS["operator"], 403), ("a-stranger-0123456789", 401)])
async def test_whose_token_is_no_agents_is_not_heard(door: tuple[Taking, str], token: str, status: int) -> None:
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await open_agent(session, door[1], token, "apply")
    assert refused.value.status == status


async def test_whoever_proves_nothing_is_told_nothing(
    door: tuple[Taking, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guess, a proof for the agents' route, one that is too long, a text, and silence."""
    taking, url = door
    monkeypatch.setattr(admin, "BODY_SECONDS", 0.2)
    said = msgspec.json.encode(GOOD)
    async with aiohttp.ClientSession() as session:
        for frame in (bytes(32) + said, None, said, b"x" * 300_000, ""):
            socket = await open_agent(session, url, TOKENS["engine"], "connect" if frame is None else "apply")
            if frame is None:
                await socket.send_bytes(said)
            elif isinstance(frame, str):
                await socket.raw.send_str(frame)
            else:
                await socket.raw.send_bytes(frame)
            assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE
        silent = await open_agent(session, url, TOKENS["engine"], "apply")
        assert (await silent.receive()).type is aiohttp.WSMsgType.CLOSE
    assert taking.heard == []


async def test_an_engine_that_does_not_wait_for_its_answer_breaks_nothing(
    door: tuple[Taking, str], caplog: pytest.LogCaptureFixture
) -> None:
    taking, url = door
    asked, gone = asyncio.Event(), asyncio.Event()

    async def slowly(application: Application, _: str) -> Admitted:
        asked.set()
        await gone.wait()
        return Admitted(again_seconds=15.0)

    taking.receive = slowly  # type: ignore[method-assign]
    async with aiohttp.ClientSession() as session:
        socket = await open_agent(session, url, TOKENS["engine"], "apply")
        await socket.send_bytes(msgspec.json.encode(GOOD))
        await asked.wait()
    taking.receive = Taking().receive  # type: ignore[method-assign]
    for _ in range(2):  # by the end of one the daemon has seen that the first is gone, by the end of two answered it
        assert await applied(url, TOKENS["engine"], msgspec.json.encode(GOOD)) == Admitted(again_seconds=15.0)
        gone.set()
    assert "Error handling request" not in caplog.text


async def test_a_body_that_does_not_come_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "BODY_SECONDS", 0.01)
    verbs: Any = Obeying()

    async def endless() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async with (
        serving(tmp_path, admin.verb_routes(verbs)) as url,
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as session,
        session.post(url + "/verbs/hold", data=endless()) as response,
    ):
        assert (response.status, await response.text()) == (400, "the body has not come within 0.01 s\n")
