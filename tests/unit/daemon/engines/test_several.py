"""One engine behind several API servers, with a stand-in of two of vLLM's over real sockets."""

import contextlib
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from weightsync.orchestrator.daemon.engines import http as engine_http
from weightsync.orchestrator.daemon.engines.errors import EngineMisconfigured, EngineNotServable, EngineRefused
from weightsync.orchestrator.daemon.engines.interface import HubAddress, RoundUpdate, Switch, Switched
from weightsync.orchestrator.daemon.engines.kinds import client_of
from weightsync.orchestrator.daemon.engines.several import SeveralServers
from weightsync.orchestrator.protocol.names import RoundName, Version
from weightsync.orchestrator.settings.sections import EngineSection, EnginesTls, PauseSection

HUB = HubAddress("ws://hub:1/agents", "run")
UPDATE = RoundUpdate(RoundName(1, 2), Version(3, 4), 5.0)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_http, "BACKOFF_SECONDS", 0.0)


class Server:
    """One API server of a deployment of ``ranks`` data-parallel ranks."""

    def __init__(self, ranks: int = 4) -> None:
        self.paused, self.ranks, self.failing = False, ranks, ""
        self.asked: list[str] = []
        self.bodies: dict[str, object] = {}
        self.results: list[object] = []

    async def handle(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        self.bodies[request.path] = await request.json() if request.can_read_body else None
        if request.path == self.failing:
            return web.Response(status=500, text="weightsync: not servable")
        if request.path in ("/pause", "/collective_rpc"):
            self.paused = request.path == "/pause"
        answers: dict[str, object] = {
            "/is_paused": {"is_paused": self.paused}, "/get_world_size": {"world_size": self.ranks},
            "/version": {"version": "0.32.0"}, "/collective_rpc": {"results": self.results},
        }  # fmt: skip
        return web.json_response(answers.get(request.path, {"message": "done"}))


@contextlib.asynccontextmanager
async def engine(*servers: Server) -> AsyncIterator[SeveralServers]:
    """The client of one engine behind ``servers``."""
    posts = ("/pause", "/collective_rpc", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights",
             "/finish_weight_update")  # fmt: skip
    async with contextlib.AsyncExitStack() as stack:
        urls = []
        for server in servers:
            app = web.Application()
            app.router.add_routes([web.post(path, server.handle) for path in posts])
            app.router.add_routes(
                [web.get(path, server.handle) for path in ("/is_paused", "/get_world_size", "/version")]
            )
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        section = EngineSection(name="e0", url=urls[0], more_urls=tuple(urls[1:]))
        client = client_of(section, PauseSection(), EnginesTls(), tuple)
        assert isinstance(client, SeveralServers)
        stack.push_async_callback(client.close)
        yield client


async def test_a_whole_round_is_made_on_all() -> None:
    servers = Server(), Server()
    async with engine(*servers) as client:
        facts = await client.probe(5.0)
        await client.attach(HUB, 5.0)
        await client.pause(5.0)
        assert await client.is_paused(5.0) is True
        await client.update(UPDATE, 5.0)
        await client.finish(UPDATE.version, 5.0)
        await client.resume({0: 7, 1: 8, 2: 9, 3: 10}, 5.0)
        assert await client.is_paused(5.0) is False
    assert (facts.server, facts.ranks, facts.notes[0]) == ("vLLM 0.32.0", 4, "2 API servers")
    for server in servers:
        for path in ("/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/collective_rpc"):
            assert server.asked.count(path) == 1
        attached = server.bodies["/init_weight_transfer_engine"]
        assert isinstance(attached, dict)
        assert (attached["init_info"]["engine"], attached["init_info"]["world"]) == ("e0", 4), "ranks count over all"


async def test_all_switch_and_the_longest_counts() -> None:
    first, second = Server(), Server()
    first.results = [{"paused": False, "seconds": 0.002}]
    second.results = [{"paused": True, "seconds": 0.003}]
    async with engine(first, second) as client:
        done = await client.switch(Switch(RoundName(1, 2), Version(3, 4), {0: 7}, 5.0), 5.0)
    assert done == Switched(paused=True, seconds=0.003)
    assert first.bodies["/collective_rpc"] == second.bodies["/collective_rpc"]


async def test_one_failure_is_the_engines() -> None:
    good, bad = Server(), Server()
    async with engine(good, bad) as client:
        bad.failing = "/update_weights"
        with pytest.raises(EngineRefused):
            await client.update(UPDATE, 5.0)
        bad.failing = "/collective_rpc"
        with pytest.raises(EngineNotServable):
            await client.resume({0: 1}, 5.0)
    assert good.asked.count("/update_weights") == 1


async def test_where_some_are_paused_all_are() -> None:
    running, paused = Server(), Server()
    paused.paused = True
    async with engine(running, paused) as client:
        assert await client.is_paused(5.0) is True
    assert running.paused
    assert "/pause" not in paused.asked


async def test_servers_that_are_no_parts_of_one_engine() -> None:
    async with engine(Server(2), Server(4)) as client:
        with pytest.raises(EngineMisconfigured, match=r"vLLM 0.32.0 with 2 ranks, vLLM 0.32.0 with 4 ranks"):
            await client.probe(5.0)


async def test_what_lands_how_is_told_of_the_ranks_of_all_servers() -> None:
    one, two = Server(), Server()
    one.results, two.results = ["rank 0 lands copy"], ["rank 1 lands live"]
    async with engine(one, two) as client:
        assert await client.landing(5.0) == ("rank 0 lands copy", "rank 1 lands live")
