"""The daemon's HTTP routes: /status, /rounds, /plan/layouts, /metrics and POST /verbs/VERB.

Who may use which is in ``daemon/access/policy.py``. /healthz and /engines/NAME/ready need no credential, because
supervisors and load balancers hold none: the first says only that the loop turns, the second in one word whether
requests should go to an engine.
"""

from typing import Final, Protocol

import msgspec
from aiohttp import hdrs, web
from weightsync.orchestrator.daemon.access.guard import CREDENTIAL
from weightsync.orchestrator.daemon.admin.verbs import Asker, Order, VerbRefused, Verbs
from weightsync.orchestrator.daemon.admin.views import LayoutsView, RoundsView, StatusView
from weightsync.orchestrator.daemon.metrics import CONTENT_TYPE, render
from weightsync.orchestrator.protocol.text import clean

MAX_ROUNDS: Final = 10_000
"""Rows of one answer: 5 MB of JSON."""

DEFAULT_ROUNDS: Final = 20

MAX_ORDER_BYTES: Final = 16_384
"""Of the body of a verb; its texts are bounded each."""


class Views(Protocol):
    """Who makes the views; called on the loop."""

    async def status(self) -> StatusView:
        """The daemon at this moment."""

    async def rounds(self, last: int) -> RoundsView:
        """The newest ``last`` finished rounds, oldest first."""

    async def layouts(self) -> LayoutsView | None:
        """What agents announced for the current plan, None before there is one."""

    async def ready(self, engine: str) -> tuple[bool, str] | None:
        """Whether requests should go to the engine, and what it is in a few words; None: there is none."""


def routes(views: Views) -> list[web.RouteDef]:
    """The routes that change nothing."""

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

    async def show_ready(request: web.Request) -> web.StreamResponse:
        found = await views.ready(request.match_info["engine"])
        if found is None:
            return web.Response(status=404, text="no such engine\n")
        is_ready, text = found
        return web.Response(status=200 if is_ready else 503, text=f"{text}\n")

    return [
        web.get("/healthz", _show_health),
        web.get("/engines/{engine}/ready", show_ready),
        web.get("/status", show_status),
        web.get("/rounds", show_rounds),
        web.get("/metrics", show_metrics),
        web.get("/plan/layouts", show_layouts),
    ]


def verb_routes(verbs: Verbs) -> list[web.RouteDef]:
    """The route of the operator's verbs; a refusal is plain text that says what there is instead."""

    async def perform(request: web.Request) -> web.StreamResponse:
        body = await request.content.read(MAX_ORDER_BYTES + 1)
        try:
            order = msgspec.json.decode(body, type=Order)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return web.Response(status=400, text=f"the body is no order: {clean(str(error))}\n")
        try:
            asker = Asker(request.remote or "unknown", request.match_info[CREDENTIAL])
            return _json(await verbs.perform(request.match_info["verb"], order, asker))
        except VerbRefused as refused:
            return web.Response(status=refused.status, text=f"{refused}\n")

    return [web.post("/verbs/{verb}", perform)]


async def _show_health(_: web.Request) -> web.StreamResponse:
    return web.Response(text="ok\n")


def _json(view: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(view), content_type="application/json")
