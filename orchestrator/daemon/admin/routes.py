"""The daemon's read-only HTTP routes: /status, /rounds, /plan/layouts and /metrics with the bearer token, /healthz.

/healthz needs none and says nothing but that the loop turns, because supervisors and load balancers hold no token.
"""

from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import msgspec
from aiohttp import hdrs, web
from weightsync.orchestrator.daemon.admin.views import LayoutsView, RoundsView, StatusView
from weightsync.orchestrator.daemon.hub.token import bears
from weightsync.orchestrator.daemon.metrics import CONTENT_TYPE, render

MAX_ROUNDS: Final = 10_000
"""Rows of one answer: 5 MB of JSON."""

DEFAULT_ROUNDS: Final = 20

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Views(Protocol):
    """Who makes the views; called on the loop."""

    async def status(self) -> StatusView:
        """The daemon at this moment."""

    async def rounds(self, last: int) -> RoundsView:
        """The newest ``last`` finished rounds, oldest first."""

    async def layouts(self) -> LayoutsView | None:
        """What agents announced for the current plan, None before there is one."""


def routes(views: Views, token: str) -> list[web.RouteDef]:
    """The routes; all but /healthz demand ``token``."""

    async def show_status(_: web.Request) -> web.StreamResponse:
        return _json(await views.status())

    async def show_rounds(request: web.Request) -> web.StreamResponse:
        text = request.query.get("last", str(DEFAULT_ROUNDS))
        if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= MAX_ROUNDS):
            return web.Response(status=400, text=f"last must be a number from 1 to {MAX_ROUNDS}\n")
        return _json(await views.rounds(int(text)))

    async def show_metrics(_: web.Request) -> web.StreamResponse:
        return web.Response(body=render(await views.status()), headers={hdrs.CONTENT_TYPE: CONTENT_TYPE})

    async def show_layouts(_: web.Request) -> web.StreamResponse:
        found = await views.layouts()
        return web.Response(status=404, text="there is no plan yet\n") if found is None else _json(found)

    def guarded(handler: Handler) -> Handler:
        async def guard(request: web.Request) -> web.StreamResponse:
            if bears(request, token):
                return await handler(request)
            headers = {hdrs.WWW_AUTHENTICATE: "Bearer"}
            return web.Response(status=401, text="wrong or missing token\n", headers=headers)

        return guard

    return [
        web.get("/healthz", _show_health),
        web.get("/status", guarded(show_status)),
        web.get("/rounds", guarded(show_rounds)),
        web.get("/metrics", guarded(show_metrics)),
        web.get("/plan/layouts", guarded(show_layouts)),
    ]


async def _show_health(_: web.Request) -> web.StreamResponse:
    return web.Response(text="ok\n")


def _json(view: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(view), content_type="application/json")
