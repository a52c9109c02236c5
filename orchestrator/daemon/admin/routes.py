"""The daemon's HTTP routes: /status, /rounds, /plan/layouts, /metrics, POST /verbs/VERB and POST /engines, by which
engines make themselves members, with the bearer token.

/healthz, /readyz and /engines/NAME/ready need none, because supervisors and load balancers hold no token: the first
says only that the loop turns, the second that what is decided is also done, the third in one word whether requests
should go to an engine.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Protocol, TypeVar

import msgspec
from aiohttp import hdrs, web
from weightsync.orchestrator.daemon.admin.applications import ApplicationRefused, Applications
from weightsync.orchestrator.daemon.admin.verbs import Order, VerbRefused, Verbs
from weightsync.orchestrator.daemon.admin.views import LayoutsView, RoundsView, StatusView
from weightsync.orchestrator.daemon.hub.token import bears
from weightsync.orchestrator.daemon.metrics import CONTENT_TYPE
from weightsync.orchestrator.protocol.application import ENGINES_PATH, Application
from weightsync.orchestrator.protocol.text import clean

MAX_ROUNDS: Final = 10_000
"""Rows of one answer: 5 MB of JSON."""

DEFAULT_ROUNDS: Final = 20

Body = TypeVar("Body")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


MAX_ORDER_BYTES: Final = 16_384
"""Of the body of a verb; its texts are bounded each."""

MAX_APPLICATION_BYTES: Final = 192 * 1024
"""Of an engine's application: the URLs of MAX_SERVERS servers."""

BODY_SECONDS: Final = 10.0
"""For a body to come."""


class Views(Protocol):
    """Who makes the views; called on the loop."""

    async def status(self) -> StatusView:
        """The daemon at this moment."""

    async def rounds(self, last: int) -> RoundsView:
        """The newest ``last`` finished rounds, oldest first."""

    async def layouts(self) -> LayoutsView | None:
        """What agents announced for the current plan, None before there is one."""

    async def metrics(self) -> bytes:
        """All metrics, in CONTENT_TYPE."""

    async def obstacle(self) -> str:
        """Why the daemon does not do its work at this moment; empty when it does."""

    async def ready(self, engine: str) -> tuple[bool, str] | None:
        """Whether requests should go to the engine, and what it is in a few words; None: there is none."""


def routes(views: Views, token: str) -> list[web.RouteDef]:
    """The routes; all but those for supervisors and load balancers demand ``token``."""

    async def show_status(_: web.Request) -> web.StreamResponse:
        return _json(await views.status())

    async def show_rounds(request: web.Request) -> web.StreamResponse:
        text = request.query.get("last", str(DEFAULT_ROUNDS))
        if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= MAX_ROUNDS):
            return web.Response(status=400, text=f"last must be a number from 1 to {MAX_ROUNDS}\n")
        return _json(await views.rounds(int(text)))

    async def show_metrics(_: web.Request) -> web.StreamResponse:
        return web.Response(body=await views.metrics(), headers={hdrs.CONTENT_TYPE: CONTENT_TYPE})

    async def show_layouts(_: web.Request) -> web.StreamResponse:
        found = await views.layouts()
        return web.Response(status=404, text="there is no plan yet\n") if found is None else _json(found)

    async def show_work(_: web.Request) -> web.StreamResponse:
        obstacle = await views.obstacle()
        return web.Response(status=503 if obstacle else 200, text=f"{obstacle or 'ready'}\n")

    async def show_ready(request: web.Request) -> web.StreamResponse:
        found = await views.ready(request.match_info["engine"])
        if found is None:
            return web.Response(status=404, text="no such engine\n")
        is_ready, text = found
        return web.Response(status=200 if is_ready else 503, text=f"{text}\n")

    return [
        web.get("/healthz", _show_health),
        web.get("/readyz", show_work),
        web.get("/engines/{engine}/ready", show_ready),
        web.get("/status", _guarded(show_status, token)),
        web.get("/rounds", _guarded(show_rounds, token)),
        web.get("/metrics", _guarded(show_metrics, token)),
        web.get("/plan/layouts", _guarded(show_layouts, token)),
    ]


def verb_routes(verbs: Verbs, token: str) -> list[web.RouteDef]:
    """The route of the operator's verbs; a refusal is plain text that says what there is instead."""

    async def perform(request: web.Request) -> web.StreamResponse:
        order = await _body(request, Order, MAX_ORDER_BYTES)
        try:
            return _json(await verbs.perform(request.match_info["verb"], order, request.remote or "unknown"))
        except VerbRefused as refused:
            return web.Response(status=refused.status, text=f"{refused}\n")

    return [web.post("/verbs/{verb}", _guarded(perform, token))]


def application_routes(applications: Applications, token: str) -> list[web.RouteDef]:
    """The route by which engines make themselves members; a refusal is plain text: field, value, fix."""

    async def receive(request: web.Request) -> web.StreamResponse:
        application = await _body(request, Application, MAX_APPLICATION_BYTES)
        try:
            return _json(await applications.receive(application, request.remote or "unknown"))
        except ApplicationRefused as refused:
            return web.Response(status=refused.status, text=f"{refused}\n")

    return [web.post(ENGINES_PATH, _guarded(receive, token))]


async def _body(request: web.Request, kind: type[Body], limit: int) -> Body:
    """The body of ``request``, in JSON.

    Raises:
        web.HTTPBadRequest: it is too large, does not come, or is something else.
    """
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while len(data) <= limit and (chunk := await request.content.read(limit + 1 - len(data))):
                data += chunk
        if len(data) > limit:
            raise ValueError(f"it has more than {limit} bytes")
        return msgspec.json.decode(data, type=kind)
    except TimeoutError:
        raise web.HTTPBadRequest(text=f"the body has not come within {BODY_SECONDS:g} s\n") from None
    except (ValueError, RecursionError) as error:  # msgspec's errors, and texts that are no UTF-8, are ValueErrors
        raise web.HTTPBadRequest(text=f"the body is no {kind.__name__.lower()}: {clean(str(error))}\n") from None


def _guarded(handler: Handler, token: str) -> Handler:
    async def guard(request: web.Request) -> web.StreamResponse:
        if bears(request, token):
            return await handler(request)
        headers = {hdrs.WWW_AUTHENTICATE: "Bearer"}
        return web.Response(status=401, text="wrong or missing token\n", headers=headers)

    return guard


async def _show_health(_: web.Request) -> web.StreamResponse:
    return web.Response(text="ok\n")


def _json(view: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(view), content_type="application/json")
