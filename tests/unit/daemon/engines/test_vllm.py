"""The engine client against real servers on 127.0.0.1: both shapes of vLLM, and every way to misbehave."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web
from weightsync.orchestrator.daemon.engines import http as engine_http
from weightsync.orchestrator.daemon.engines.errors import (
    EngineError,
    EngineGarbled,
    EngineMisconfigured,
    EngineNotServable,
    EngineRefused,
    EngineTimeout,
    EngineUnreachable,
)
from weightsync.orchestrator.daemon.engines.interface import (
    CachePolicy,
    EngineSetup,
    HubAddress,
    PauseMode,
    RoundUpdate,
    Switch,
    Switched,
)
from weightsync.orchestrator.daemon.engines.vllm import REQUIRED, VllmClient
from weightsync.orchestrator.protocol.names import RoundName, Version

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

LONG = 30.0
"""Total deadline, in seconds, of calls that are meant to end before it."""
BRIEF = 0.1
"""Total deadline, in seconds, of calls that are meant to run into it."""

HUB = HubAddress("ws://h/agents", "glm")
VERSION = Version(7, 12)
MEANT = {0: 2**62 + 1, 1: 5}
"""Rank → incarnation; JSON's own numbers end at 2^53, and neither side's library minds."""
UPDATE = RoundUpdate(RoundName(3, 9), VERSION, 20.0)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_http, "BACKOFF_SECONDS", 0.0)


class Vllm:
    """The admin routes of one vLLM, with what it was asked."""

    def __init__(self, *, told_version: bool = True) -> None:
        self.paused = False
        self.told_version = told_version
        self.version: str | None = None
        self.asked: list[tuple[str, object]] = []
        self.replaced: dict[str, Handler] = {}
        self.without: set[str] = set()
        self.headers: dict[str, str] = {}

    def app(self) -> web.Application:
        app = web.Application()
        posts = ["/pause", "/collective_rpc", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights",
                 "/finish_weight_update"]  # fmt: skip
        gets = ["/is_paused", "/get_world_size", "/version"]
        gets += ["/weight_info"] if self.told_version else []
        for path in posts:
            if path not in self.without:
                app.router.add_post(path, self.handle)
        for path in gets:
            if path not in self.without:
                app.router.add_get(path, self.handle)
        return app

    async def handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        body = await request.json() if request.can_read_body else dict(request.query)
        self.asked.append((path, body))
        self.headers = dict(request.headers)
        if path in self.replaced:
            return await self.replaced[path](request)
        return self.answer(path, body)

    def answer(self, path: str, body: object) -> web.Response:
        if path in ("/pause", "/collective_rpc"):
            self.paused = path == "/pause"
            return web.json_response({"status": "paused"} if self.paused else {"results": []})
        if path == "/finish_weight_update" and self.told_version and isinstance(body, dict):
            self.version = body.get("weight_version")
        answers: dict[str, object] = {
            "/is_paused": {"is_paused": self.paused}, "/get_world_size": {"world_size": 4},
            "/version": {"version": "0.32.0+cpu"}, "/weight_info": {"weight_version": self.version},
        }  # fmt: skip
        return web.json_response(answers.get(path, {"message": "done"}))


@contextlib.asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server = site._server
    assert isinstance(server, asyncio.Server)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def connected(url: str, api_key: str | None = None) -> AsyncIterator[VllmClient]:
    client = VllmClient(EngineSetup("a", url, api_key, "keep", "recompute"))
    try:
        yield client
    finally:
        await client.close()


@contextlib.asynccontextmanager
async def talking(vllm: Vllm, api_key: str | None = None) -> AsyncIterator[VllmClient]:
    async with serving(vllm.app()) as url, connected(url + "/", api_key) as client:
        yield client


def asked(vllm: Vllm) -> list[str]:
    return [path for path, _ in vllm.asked]


@pytest.mark.parametrize("told_version", [True, False])
async def test_a_whole_round(told_version: bool) -> None:
    vllm = Vllm(told_version=told_version)
    async with talking(vllm) as client:
        facts = await client.probe(LONG)
        assert facts.ranks == 4
        assert facts.server == "vLLM 0.32.0+cpu"
        assert facts.notes == (("tells" if told_version else "cannot tell") + " its weight version",)
        assert client.routes >= REQUIRED.keys()
        assert not await client.is_paused(LONG)
        await client.attach(HUB, LONG)
        await client.pause(LONG)
        assert await client.is_paused(LONG)
        await client.update(UPDATE, LONG)
        await client.finish(VERSION, LONG)
        await client.resume(MEANT, LONG)
        assert not vllm.paused
        assert vllm.version == ("12" if told_version else None)
    hub = {"hub_url": "ws://h/agents", "run_id": "glm", "engine": "a", "world": 4}
    update = {"token": "3.9", "round_epoch": 3, "round_number": 9, "generation": 7, "step": 12,
              "deadline_seconds": 20.0, "exposes": True}  # fmt: skip
    assert [entry for entry in vllm.asked if entry[0] not in ("/version", "/get_world_size", "/is_paused")] == [
        ("/init_weight_transfer_engine", {"init_info": hub}),
        ("/pause", {"mode": "keep", "clear_cache": "true"}),
        ("/start_weight_update", {"is_checkpoint_format": False}),
        ("/update_weights", {"update_info": update}),
        ("/finish_weight_update", {"weight_version": "12"}),
        ("/collective_rpc", {"method": "weightsync_resume", "kwargs": {"incarnations": {"0": 2**62 + 1, "1": 5}}}),
    ]


def test_the_token_of_a_round_is_its_own() -> None:
    assert len({str(RoundName(*name)) for name in ((3, 9), (39, 9), (3, 99))}) == 3


@pytest.mark.parametrize(("cache", "cleared"), [("keep", "false"), ("drop", "true"), ("recompute", "true")])
async def test_what_a_pause_does_with_the_caches(cache: CachePolicy, cleared: str) -> None:
    vllm = Vllm()
    async with serving(vllm.app()) as url:
        client = VllmClient(EngineSetup("a", url, None, "keep", cache))
        await client.pause(LONG)
        await client.close()
    assert ("/pause", {"mode": "keep", "clear_cache": cleared}) in vllm.asked


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
async def test_the_pause_is_the_settings(mode: PauseMode) -> None:
    vllm = Vllm()
    async with serving(vllm.app()) as url:
        client = VllmClient(EngineSetup("a", url, None, mode, "keep"))
        await client.pause(LONG)
        await client.close()
    assert sorted(vllm.asked) == [
        ("/pause", {"mode": mode, "clear_cache": "false"}),
        ("/start_weight_update", {"is_checkpoint_format": False}),
    ]


async def test_agents_are_never_told_a_number_of_ranks_that_nobody_has_asked_for() -> None:
    vllm = Vllm()
    async with talking(vllm) as client:
        await client.attach(HUB, LONG)
    (body,) = [body for path, body in vllm.asked if path == "/init_weight_transfer_engine"]
    assert isinstance(body, dict)
    assert body["init_info"]["world"] == 4


async def test_the_probe_performs_nothing() -> None:
    vllm = Vllm()
    async with talking(vllm) as client:
        await client.probe(LONG)
    assert asked(vllm) == ["/get_world_size", "/version"]


async def test_missing_routes_say_what_to_set() -> None:
    vllm = Vllm()
    vllm.without = {"/pause", "/update_weights"}
    async with talking(vllm) as client:
        with pytest.raises(EngineMisconfigured, match=r"no /pause, /update_weights") as caught:
            await client.probe(LONG)
    assert "VLLM_SERVER_DEV_MODE=1" in caught.value.fix
    assert '--weight-transfer-config \'{"backend": "weightsync"}\'' in caught.value.fix
    assert caught.value.fault == "config"
    assert not caught.value.retry


async def test_a_proxy_that_answers_options_is_seen_through() -> None:
    vllm = Vllm()

    @web.middleware
    async def proxy(request: web.Request, handler: Handler) -> web.StreamResponse:
        return web.Response(status=204) if request.method == "OPTIONS" else await handler(request)

    async def document(_: web.Request) -> web.StreamResponse:
        paths = {path: {method.lower(): {"summary": "x"}} for path, method in REQUIRED.items()}
        return web.json_response({"openapi": "3.1.0", "paths": paths})

    app = vllm.app()
    app.middlewares.append(proxy)
    app.router.add_get("/openapi.json", document)
    async with serving(app) as url, connected(url) as client:
        facts = await client.probe(LONG)
    assert client.routes == REQUIRED.keys()
    assert facts.notes == ("cannot tell its weight version",)


async def test_the_key_is_sent_and_only_then() -> None:
    vllm = Vllm()
    async with talking(vllm, api_key="k3y") as client:
        await client.is_paused(LONG)
    assert vllm.headers["Authorization"] == "Bearer k3y"
    async with talking(vllm) as client:
        await client.is_paused(LONG)
    assert "Authorization" not in vllm.headers


async def test_nobody_listens() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        async with connected(url) as client:
            for call in (client.probe(LONG), client.update(UPDATE, LONG), client.pause(LONG)):
                with pytest.raises(EngineUnreachable) as caught:
                    await call
                assert not caught.value.sent
                assert caught.value.fault == "network"


async def test_an_engine_that_accepts_and_never_answers() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        async with connected(url) as client:
            for call in (
                client.probe(BRIEF),
                client.is_paused(BRIEF),
                client.pause(BRIEF),
                client.resume(MEANT, BRIEF),
                client.attach(HUB, BRIEF),
                client.update(UPDATE, BRIEF),
                client.finish(VERSION, BRIEF),
            ):
                with pytest.raises(EngineTimeout) as caught:
                    await call
                assert caught.value.sent
                assert caught.value.retry
                assert "within 0.1 s" in str(caught.value)


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        while True:
            await response.write(b"x" * 65536)
    return response


async def drip(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        while True:
            await response.write(b"x")
            await asyncio.sleep(0.01)
    return response


async def test_an_endless_body_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_http, "MAX_ANSWER_BYTES", 1_000_000)
    vllm = Vllm()
    vllm.replaced = {"/is_paused": endless, "/update_weights": endless}
    async with talking(vllm) as client:
        for call in (client.is_paused(LONG), client.update(UPDATE, LONG)):
            with pytest.raises(EngineRefused, match="a body over 1000000 bytes"):
                await call


async def test_a_body_that_drips_for_ever_meets_the_deadline() -> None:
    vllm = Vllm()
    vllm.replaced["/is_paused"] = drip
    async with talking(vllm) as client:
        with pytest.raises(EngineTimeout):
            await client.is_paused(BRIEF)


async def test_a_compressed_bomb_stays_compressed() -> None:
    async def bomb(request: web.Request) -> web.StreamResponse:
        response = web.Response(body=b"\0" * 50_000_000)
        response.enable_compression(web.ContentCoding.gzip)
        return response

    vllm = Vllm()
    vllm.replaced["/is_paused"] = bomb
    async with talking(vllm) as client:
        with pytest.raises(EngineGarbled, match="not the engine's"):
            await client.is_paused(LONG)


async def test_a_redirect_is_not_followed() -> None:
    elsewhere = Vllm()
    async with serving(elsewhere.app()) as other:

        async def redirect(request: web.Request) -> web.StreamResponse:
            raise web.HTTPTemporaryRedirect(other + request.path)

        vllm = Vllm()
        vllm.replaced = {"/is_paused": redirect, "/update_weights": redirect}
        async with talking(vllm, api_key="k3y") as client:
            for call in (client.is_paused(LONG), client.update(UPDATE, LONG)):
                with pytest.raises(EngineRefused, match="not followed") as caught:
                    await call
                assert caught.value.status == 307
                assert not caught.value.retry
    assert elsewhere.asked == []


@pytest.mark.parametrize(
    ("body", "excerpt"),
    [
        ('{"error": {"message": "collective_rpc failed", "code": 500}}', "collective_rpc failed"),
        ('{"error": "Failed to pause"}', "Failed to pause"),
        ('{"detail": "Missing"}', "Missing"),
        ('{"detail": [{"msg": "no object"}]}', "[{'msg': 'no object'}]"),
        ("<html>\n  oops</html>", "<html> oops</html>"),
        ("y" * 5000, "y" * 999 + "…"),
        ("", ""),
    ],
)
async def test_a_refusal_carries_its_message(body: str, excerpt: str) -> None:
    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.Response(status=500, text=body)

    vllm = Vllm()
    vllm.replaced["/update_weights"] = refuse
    async with talking(vllm) as client:
        with pytest.raises(EngineRefused) as caught:
            await client.update(UPDATE, LONG)
    assert (caught.value.status, caught.value.excerpt, caught.value.retry) == (500, excerpt, True)
    assert asked(vllm) == ["/update_weights"]


async def test_an_update_that_a_failed_round_has_closed_is_opened_again() -> None:
    """The engine is paused since before that round, so nobody pauses it again."""
    vllm = Vllm()

    async def refuse_once(request: web.Request) -> web.StreamResponse:
        if "/start_weight_update" in asked(vllm):
            return vllm.answer(request.path, {})
        text = "weightsync: update_weights without an open update; call /start_weight_update first"
        return web.json_response({"error": {"message": text}}, status=500)

    vllm.replaced["/update_weights"] = refuse_once
    async with talking(vllm) as client:
        await client.update(UPDATE, LONG)
    assert asked(vllm) == ["/update_weights", "/start_weight_update", "/update_weights"]


@pytest.mark.parametrize("path", ["/pause", "/start_weight_update"])
async def test_a_pause_is_one_only_with_the_update_that_it_is_for(path: str) -> None:
    """Without it the engine would wait for ever for a daemon that is gone."""

    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.Response(status=500, text="no")

    vllm = Vllm()
    vllm.replaced[path] = refuse
    async with talking(vllm) as client:
        with pytest.raises(EngineRefused, match=f"POST {path}"):
            await client.pause(LONG)
    assert sorted(asked(vllm)) == ["/pause", "/start_weight_update"]


async def test_an_engine_without_weight_transfer_says_what_to_set() -> None:
    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "Weight transfer not configured. Please set"}}, status=500)

    vllm = Vllm()
    vllm.replaced["/init_weight_transfer_engine"] = refuse
    async with talking(vllm) as client:
        with pytest.raises(EngineMisconfigured, match="--weight-transfer-config"):
            await client.attach(HUB, LONG)


async def test_how_versions_land_is_asked_of_the_engine_core() -> None:
    vllm = Vllm()

    async def answer(_: web.Request) -> web.StreamResponse:
        return web.json_response({"results": ["rank 0 lands copy", "rank 1 lands\ncopy"]})

    vllm.replaced["/collective_rpc"] = answer
    async with talking(vllm) as client:
        assert await client.landing(LONG) == ("rank 0 lands copy", "rank 1 lands copy")
    assert vllm.asked == [("/collective_rpc", {"method": "weightsync_landing"})]


SWITCH = Switch(RoundName(3, 9), VERSION, MEANT, 20.0)


def switching(*results: dict[str, object]) -> Handler:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.json_response({"results": list(results)})

    return answer


async def test_a_switch_is_one_call_to_the_engine_core() -> None:
    vllm = Vllm()
    vllm.replaced["/collective_rpc"] = switching({"paused": False, "seconds": 0.002})
    async with talking(vllm) as client:
        assert await client.switch(SWITCH, LONG) == Switched(paused=False, seconds=0.002)
    kwargs = {"round": [3, 9], "version": [7, 12], "incarnations": {"0": 2**62 + 1, "1": 5}, "cache": "recompute",
              "deadline_seconds": 20.0}  # fmt: skip
    assert vllm.asked == [("/collective_rpc", {"method": "weightsync_switch", "kwargs": kwargs})]


async def test_a_switch_whose_answer_is_lost_is_asked_for_again() -> None:
    vllm = Vllm()
    answers = [failing(1, None, vllm), switching({"paused": True, "seconds": 0.5})]

    async def lose_one(request: web.Request) -> web.StreamResponse:
        return await answers[len(vllm.asked) > 1](request)

    vllm.replaced["/collective_rpc"] = lose_one
    async with talking(vllm) as client:
        assert await client.switch(SWITCH, LONG) == Switched(paused=True, seconds=0.5)
    assert len(vllm.asked) == 2
    assert vllm.asked[0] == vllm.asked[1]


@pytest.mark.parametrize("results", [[], [{"paused": "maybe", "seconds": 1}], [{"paused": True, "seconds": -1}]])
async def test_an_odd_answer_to_a_switch_is_none(results: list[dict[str, object]]) -> None:
    vllm = Vllm()
    vllm.replaced["/collective_rpc"] = switching(*results)
    async with talking(vllm) as client:
        with pytest.raises(EngineGarbled, match="POST /collective_rpc"):
            await client.switch(SWITCH, LONG)


@pytest.mark.parametrize(("words", "kind"), [("weightsync: not servable: rank 0", EngineNotServable),
                                             ("no such method", EngineRefused)])  # fmt: skip
async def test_a_switch_that_is_refused(words: str, kind: type[EngineRefused]) -> None:
    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.json_response({"error": words}, status=500)

    vllm = Vllm()
    vllm.replaced["/collective_rpc"] = refuse
    async with talking(vllm) as client:
        with pytest.raises(EngineRefused, match=words) as caught:
            await client.switch(SWITCH, LONG)
    assert type(caught.value) is kind


async def test_a_held_engine_does_not_resume() -> None:
    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.json_response({"error": "Failed: weightsync: not servable: rank 0 is torn"}, status=500)

    vllm = Vllm()
    vllm.replaced["/collective_rpc"] = refuse
    async with talking(vllm) as client:
        with pytest.raises(EngineNotServable, match="rank 0 is torn") as caught:
            await client.resume(MEANT, LONG)
        assert not caught.value.retry


@pytest.mark.parametrize("content", ["", "null", "[]", '{"is_paused": "maybe"}', '{"is_paused": 1', "\udcff"])
async def test_an_answer_that_is_not_vllms(content: str) -> None:
    async def odd(_: web.Request) -> web.StreamResponse:
        return web.Response(body=content.encode("utf-8", "surrogateescape"))

    vllm = Vllm()
    vllm.replaced["/is_paused"] = odd
    async with talking(vllm) as client:
        with pytest.raises(EngineGarbled, match="GET /is_paused: an answer that is not the engine's") as caught:
            await client.is_paused(LONG)
        assert caught.value.retry, "whatever stands in between may be gone next time"


POSTS: dict[str, Callable[[VllmClient], Awaitable[None]]] = {
    "/pause": lambda client: client.pause(LONG),
    "/collective_rpc": lambda client: client.resume({0: 7}, LONG),
    "/init_weight_transfer_engine": lambda client: client.attach(HUB, LONG),
    "/start_weight_update": lambda client: client.pause(LONG),
    "/update_weights": lambda client: client.update(UPDATE, LONG),
    "/finish_weight_update": lambda client: client.finish(VERSION, LONG),
}


@pytest.mark.parametrize("content", ["<html>Please log in</html>", "", "{}", "[" * 60_000])
@pytest.mark.parametrize("path", POSTS)
async def test_a_page_of_something_else_is_no_success(path: str, content: str) -> None:
    """An ingress answers 200 to everything; the engine has heard nothing of it."""

    async def page(_: web.Request) -> web.StreamResponse:
        return web.Response(text=content, content_type="text/html")

    vllm = Vllm()
    vllm.paused = path == "/collective_rpc"
    vllm.replaced[path] = page
    async with talking(vllm) as client:
        with pytest.raises(EngineGarbled, match=f"POST {path}: an answer that is not the engine's: ") as caught:
            await POSTS[path](client)
        assert (content[:100] or "nothing") in str(caught.value)


async def test_a_pause_whose_answer_was_replaced_is_looked_up() -> None:
    async def page(_: web.Request) -> web.StreamResponse:
        vllm.paused = True
        return web.Response(text="<html>OK</html>")

    vllm = Vllm()
    vllm.replaced["/pause"] = page
    async with talking(vllm) as client:
        await client.pause(LONG)


def failing(times: int, status: int | None, vllm: Vllm) -> Handler:
    """Breaks the connection (or answers ``status``) so many times, then answers as always."""
    left = [times]

    async def handle(request: web.Request) -> web.StreamResponse:
        if not left[0]:
            return vllm.answer(request.path, {})
        left[0] -= 1
        if status is not None:
            return web.Response(status=status)
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    return handle


@pytest.mark.parametrize("status", [None, 502, 503, 504])
async def test_idempotent_calls_are_repeated_with_a_bound(status: int | None) -> None:
    vllm = Vllm()
    async with talking(vllm) as client:
        vllm.replaced["/is_paused"] = failing(3, status, vllm)
        assert not await client.is_paused(LONG)
        assert asked(vllm) == ["/is_paused"] * 4
        vllm.replaced["/is_paused"] = failing(100, status, vllm)
        with pytest.raises((EngineUnreachable, EngineRefused)):
            await client.is_paused(LONG)
        by_aiohttp = 2 if status is None else 1
        assert asked(vllm) == ["/is_paused"] * (4 + 4 * by_aiohttp)


@pytest.mark.parametrize("status", [None, 503])
@pytest.mark.parametrize("path", ["/update_weights", "/finish_weight_update"])
async def test_the_others_are_never_repeated(path: str, status: int | None) -> None:
    vllm = Vllm()
    vllm.replaced[path] = failing(1, status, vllm)
    async with talking(vllm) as client:
        calls: dict[str, Callable[[], Awaitable[None]]] = {
            "/update_weights": lambda: client.update(UPDATE, LONG),
            "/finish_weight_update": lambda: client.finish(VERSION, LONG),
        }
        with pytest.raises(EngineError) as caught:
            await calls[path]()
        assert caught.value.sent
    assert asked(vllm) == [path]


@pytest.mark.parametrize("path", ["/pause", "/collective_rpc"])
@pytest.mark.parametrize("happened", [True, False])
async def test_is_paused_decides_when_the_answer_was_lost(path: str, happened: bool) -> None:
    vllm = Vllm()
    vllm.paused = path != "/pause"
    never = asyncio.Event()

    async def lose(_: web.Request) -> web.StreamResponse:
        if happened:
            vllm.paused = path == "/pause"
        await never.wait()
        return web.Response()

    vllm.replaced[path] = lose
    async with talking(vllm) as client:
        call = client.pause(BRIEF) if path == "/pause" else client.resume(MEANT, BRIEF)
        if happened:
            await call
        else:
            with pytest.raises(EngineTimeout):
                await call
        never.set()
    opened = ["/start_weight_update"] if path == "/pause" else []
    assert sorted(asked(vllm)) == sorted([path, "/is_paused", *opened])
