"""Real servers on 127.0.0.1, asked: the right one, and each that stands in its place."""

import socket
import time
from pathlib import Path

import pytest
from aiohttp import web
from credentials import TOKENS
from servers_here import only, served, speaking, vllm
from weightsync.orchestrator.cli.doctor import places, servers
from weightsync.orchestrator.daemon.engines import http as engine_http
from weightsync.orchestrator.daemon.engines.interface import EngineFacts
from weightsync.orchestrator.protocol.findings import Finding
from weightsync.orchestrator.protocol.proof import admin_key
from weightsync.orchestrator.settings.settings import load


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_http, "BACKOFF_SECONDS", 0.0)


async def asked(config: Path, *urls: str, seconds: float = 10) -> list[Finding]:
    engines = ", ".join(f"{{name: e{n}, url: '{url}'}}" for n, url in enumerate(urls))
    settings = load(config, {"WEIGHTSYNC__ENGINES": f"[{engines}]"})
    seen = await servers.ask_all(settings, seconds, places.urls_of(settings))
    return [finding for each in seen for finding in each.findings] + list(servers.together(seen))


async def answers(_: web.Request) -> web.Response:
    return web.Response(text="ok\n")


async def sends_on(_: web.Request) -> web.Response:
    raise web.HTTPFound("http://elsewhere/")


async def locked(_: web.Request) -> web.Response:
    raise web.HTTPUnauthorized


async def test_a_good_server(config: Path) -> None:
    async with served(vllm()) as url:
        [found] = await asked(config, url)
    assert found == Finding("ok", f"{url}: vLLM 0.32.0, 2 ranks, weightsync backend", "", "engine e0")


@pytest.mark.parametrize(
    ("app", "what", "fix"),
    [
        (vllm(backend="nccl"), "of the backend 'nccl'", "--weight-transfer-config"),
        (vllm(backend=None), "has no weight transfer", "--weight-transfer-config"),
        (vllm(plugins=["other"]), "VLLM_PLUGINS=other keeps the plugin", "unset VLLM_PLUGINS"),
        (vllm(without="/pause"), "the server has no /pause", "VLLM_SERVER_DEV_MODE=1"),
        (vllm(["one", "two"]), "leads to 2 servers in turn: a load balancer", "one entry"),
        (only(health=sends_on), "sends on to http://elsewhere/", "the server's own url"),
        (only(index=answers), "is no vLLM: an HTTP server (", "--port"),
        (only(healthz=answers), "but with /healthz, as this project's daemon", "--port"),
    ],
)
async def test_a_server_that_is_not_what_is_meant(config: Path, app: web.Application, what: str, fix: str) -> None:
    async with served(app) as url:
        [found] = await asked(config, url)
    assert found.level == "error"
    assert what in found.what
    assert fix in found.fix


async def test_a_server_that_asks_for_a_key(config: Path) -> None:
    @web.middleware
    async def guard(request: web.Request, handler: object) -> web.StreamResponse:
        raise web.HTTPUnauthorized

    async with served(web.Application(middlewares=[guard])) as url:
        [found] = await asked(config, url)
    assert (found.level, "api_key_file" in found.fix) == ("error", True)


async def test_a_server_of_another_token_or_name(config: Path) -> None:
    async with served(vllm(admin_key=admin_key(TOKENS["engine"], "glm", "e0"))) as url:
        [found] = await asked(config, url)
    assert found.level == "ok"
    async with served(vllm(admin_key=admin_key(TOKENS["engine"], "other", "e0"))) as url:
        [found] = await asked(config, url)
    assert (found.level, found.what) == ("error", f"{url} does not know the admin key of engine e0")
    assert "_RUN_ID and _ENGINE" in found.fix


async def test_a_server_whose_admin_routes_are_open(config: Path) -> None:
    async with served(vllm(admin_key=None)) as url:
        found = await asked(config, url)
    assert [(each.level, "nothing stands before its admin routes" in each.what) for each in found] == [
        ("warning", True)
    ]
    assert "unset WEIGHTSYNC_LOOPBACK_DEMO" in found[0].fix


async def test_nobody_and_somebody_else_at_the_port(config: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        [found] = await asked(config, f"http://127.0.0.1:{free.getsockname()[1]}")
    assert (found.level, "--port" in found.fix) == ("warning", True)
    async with speaking(b"SSH-2.0-OpenSSH_9.6\r\n") as url:
        [found] = await asked(config, url)
    assert "speaks no HTTP" in found.what


async def test_a_server_that_does_not_answer(config: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        [found] = await asked(config, f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.1)
    assert (found.level, "does not answer within 0.1 s" in found.what) == ("warning", True)


async def test_a_server_without_a_word_of_itself_is_no_fault(config: Path) -> None:
    app = vllm()
    app.router._resources = [r for r in app.router._resources if r.canonical != "/server_info"]
    app.router._resource_index.pop("/server_info", None)
    async with served(app) as url:
        found = await asked(config, url)
    assert sorted(finding.level for finding in found) == ["note", "ok"]


async def test_clocks_apart(config: Path) -> None:
    async with served(vllm(date=time.time() + 120)) as url:
        [found] = await asked(config, url)
    assert (found.level, found.what) in [
        ("warning", f"its clock is {n} s ahead of this host's") for n in (119, 120, 121)
    ]


async def test_one_server_under_two_names(config: Path) -> None:
    app = vllm(["same"])
    async with served(app) as one:
        found = await asked(config, one, one.replace("127.0.0.1", "127.0.0.2").replace("127.0.0.2", "localhost"))
    assert [f.level for f in found if "are one server" in f.what] == ["error"]


async def test_different_releases_and_servers(config: Path) -> None:
    async with served(vllm(["a"])) as one, served(vllm(["b"], version="0.31.1")) as other:
        found = await asked(config, one, other)
    assert [f.level for f in found] == ["ok", "ok", "note"]
    assert "vLLM 0.31.1: e1; vLLM 0.32.0: e0" in found[-1].what


async def test_a_check_of_one_server_that_breaks_spares_the_others(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def breaks(self: object, deadline: float) -> EngineFacts:
        raise RuntimeError("a bug")

    async with served(vllm()) as url:
        monkeypatch.setattr("weightsync.orchestrator.daemon.engines.vllm.VllmClient.probe", breaks)
        [found] = await asked(config, url)
    assert (found.level, found.check) == ("warning", "engine e0")
    assert "RuntimeError: a bug" in found.what
