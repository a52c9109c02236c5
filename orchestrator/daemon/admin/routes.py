"""The daemon's HTTP routes: /status, /rounds, /plan/layouts, /metrics, POST /verbs/VERB, and /engines, by which engines
make themselves members.

Who may use which is in ``daemon/access/policy.py``. /healthz, /readyz and /engines/NAME/ready need no credential,
because supervisors and load balancers hold none: the first says only that the loop turns, the second that what is
decided is also done, the third in one word whether requests should go to an engine. Over /engines tokens are proved and
not sent, as on the agents' connections.
"""

import asyncio
import contextlib
from typing import Final, Protocol

import msgspec
from aiohttp import hdrs, web
from websockets.frames import CloseCode
from weightsync.orchestrator.daemon.access.access import Access, Claim, NotAdmitted
from weightsync.orchestrator.daemon.access.guard import CREDENTIAL
from weightsync.orchestrator.daemon.admin.applications import ApplicationRefused, Applications
from weightsync.orchestrator.daemon.admin.verbs import Asker, Order, VerbRefused, Verbs
from weightsync.orchestrator.daemon.admin.views import LayoutsView, RoundsView, StatusView
from weightsync.orchestrator.daemon.metrics import CONTENT_TYPE
from weightsync.orchestrator.protocol.application import (
    ENGINES_PATH,
    MAX_APPLICATION_BYTES,
    MAX_WHY_CHARS,
    Admitted,
    Application,
    Declined,
)
from weightsync.orchestrator.protocol.codec import ProtocolError
from weightsync.orchestrator.protocol.proof import PROOF_BYTES
from weightsync.orchestrator.protocol.text import clean

MAX_ROUNDS: Final = 10_000
"""Rows of one answer: 5 MB of JSON."""

DEFAULT_ROUNDS: Final = 20

MAX_ORDER_BYTES: Final = 16_384
"""Of the body of a verb; its texts are bounded each."""

BODY_SECONDS: Final = 10.0
"""For a body, or an engine's application, to come."""

CLOSE_SECONDS: Final = 2.0
"""For the closing handshake with an engine that has applied."""


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
        return web.Response(body=await views.metrics(), headers={hdrs.CONTENT_TYPE: CONTENT_TYPE})

    async def show_layouts(_: web.Request) -> web.StreamResponse:
        found = await views.layouts()
        if found is None:
            return web.Response(status=503, text="there is no plan yet: it is made when trainer and engines have met\n")
        return _json(found)

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
        web.get("/status", show_status),
        web.get("/rounds", show_rounds),
        web.get("/metrics", show_metrics),
        web.get("/plan/layouts", show_layouts),
    ]


def verb_routes(verbs: Verbs) -> list[web.RouteDef]:
    """The route of the operator's verbs; a refusal is plain text that says what there is instead."""

    async def perform(request: web.Request) -> web.StreamResponse:
        order = await _order_in(request)
        try:
            asker = Asker(request.remote or "unknown", request.match_info[CREDENTIAL])
            return _json(await verbs.perform(request.match_info["verb"], order, asker))
        except VerbRefused as refused:
            return web.Response(status=refused.status, text=f"{refused}\n")

    return [web.post("/verbs/{verb}", perform)]


def application_routes(applications: Applications, access: Access) -> list[web.RouteDef]:
    """The route by which engines make themselves members: a WebSocket of one question and one answer.

    A refusal says the field, its value and the fix. Whoever proves nothing is told nothing.
    """

    async def receive(request: web.Request) -> web.StreamResponse:
        remote = request.remote or "unknown"
        try:
            claim = access.claim_of(request, "apply")
        except NotAdmitted as error:
            access.refusals.say("engine turned away", remote=remote, reason=str(error))
            return web.Response(status=error.status, text=f"{error}\n")
        socket = web.WebSocketResponse(
            compress=False, max_msg_size=PROOF_BYTES + MAX_APPLICATION_BYTES, timeout=CLOSE_SECONDS
        )
        socket.headers.update(claim.headers())
        await socket.prepare(request)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                said = claim.said_in(await socket.receive_bytes())
        except (TimeoutError, TypeError, ProtocolError) as error:  # TypeError: of another kind, too long, or the end
            reason = str(error) or f"nothing has come within {BODY_SECONDS:g} s"
            access.refusals.say("engine turned away", remote=remote, reason=clean(reason))
            await socket.close(code=CloseCode.POLICY_VIOLATION)
            return socket
        access.guard.let_in(request.transport)
        answer = await _answered(applications, claim, said, remote)
        with contextlib.suppress(ConnectionError):  # it did not wait, and will say it again
            await socket.send_bytes(msgspec.json.encode(answer))
            await socket.close()
        return socket

    return [web.get(ENGINES_PATH, receive, allow_head=False)]


async def _answered(applications: Applications, claim: Claim, said: bytes, remote: str) -> Admitted | Declined:
    try:
        application = msgspec.json.decode(said, type=Application)
    except (ValueError, RecursionError) as error:  # msgspec's errors, and texts that are no UTF-8, are ValueErrors
        return Declined(status=400, why=clean(f"this is no application: {error}", MAX_WHY_CHARS))
    wrong = claim.refuses_engine(application.engine.name)
    if wrong:
        return Declined(status=403, why=clean(wrong, MAX_WHY_CHARS))
    try:
        return await applications.receive(application, remote)
    except ApplicationRefused as refused:
        return Declined(status=refused.status, why=clean(str(refused), MAX_WHY_CHARS))


async def _order_in(request: web.Request) -> Order:
    """The order in the body of ``request``, in JSON.

    Raises:
        web.HTTPBadRequest: it is too large, does not come, or is something else.
    """
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while len(data) <= MAX_ORDER_BYTES and (
                chunk := await request.content.read(MAX_ORDER_BYTES + 1 - len(data))
            ):
                data += chunk
        if len(data) > MAX_ORDER_BYTES:
            raise ValueError(f"it has more than {MAX_ORDER_BYTES} bytes")
        return msgspec.json.decode(data, type=Order)
    except TimeoutError:
        raise web.HTTPBadRequest(text=f"the body has not come within {BODY_SECONDS:g} s\n") from None
    except (ValueError, RecursionError) as error:
        raise web.HTTPBadRequest(text=f"the body is no order: {clean(str(error))}\n") from None


async def _show_health(_: web.Request) -> web.StreamResponse:
    return web.Response(text="ok\n")


def _json(view: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(view), content_type="application/json")
