"""Servers on 127.0.0.1 that stand for a vLLM and for what may be found in its place."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from email.utils import formatdate

from aiohttp import web
from weightsync.orchestrator.daemon.engines.vllm import REQUIRED
from weightsync.orchestrator.protocol.proof import ADMIN_HEADER

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def vllm(
    identities: list[str] | None = None,
    *,
    backend: str | None = "weightsync",
    plugins: list[str] | None = None,
    without: str = "",
    version: str = "0.32.0",
    date: float | None = None,
    admin_key: str | None = "",
) -> web.Application:
    """A vLLM's routes. ``identities``: of its starts, in turn, as a balancer would show them. ``admin_key``: the one
    that it asks for, empty: any, None: none."""
    starts = identities or ["one"]
    asked = 0

    async def info(_: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        transfer = None if backend is None else {"backend": backend}
        config = {"instance_id": starts[asked % len(starts)], "weight_transfer_config": transfer}
        environment = {} if plugins is None else {"VLLM_PLUGINS": plugins}
        return _json({"vllm_config": config, "vllm_env": environment, "system_env": {}})

    def _json(value: object) -> web.Response:
        headers = {} if date is None else {"Date": formatdate(date, usegmt=True)}
        return web.Response(body=json.dumps(value), content_type="application/json", headers=headers)

    answers = {"/get_world_size": {"world_size": 2}, "/version": {"version": version}}

    async def answer(request: web.Request) -> web.Response:
        return _json(answers.get(request.path, {}))

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        offered = request.headers.get(ADMIN_HEADER, "")
        known = offered if not admin_key else admin_key in offered.split(",")
        if admin_key is None or known or request.path in ("/health", "/version"):
            return await handler(request)
        return web.json_response({"error": "weightsync: this route asks for the engine's admin key"}, status=401)

    app = web.Application(middlewares=[guard])
    for path, method in REQUIRED.items():
        if path != without:
            app.router.add_route(method, path, answer)
    app.router.add_get("/version", answer)
    app.router.add_get("/health", answer)
    app.router.add_get("/server_info", info)
    return app


def only(**handlers: Handler) -> web.Application:
    """An HTTP server with these routes."""
    app = web.Application()
    for name, handler in handlers.items():
        app.router.add_get(f"/{name}", handler)
    return app


@contextlib.asynccontextmanager
async def served(app: web.Application) -> AsyncIterator[str]:
    """Its URL."""
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def speaking(words: bytes) -> AsyncIterator[str]:
    """The URL of a port that says ``words``, and no HTTP."""

    async def say(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(words)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(say, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
