"""What the page asks for besides /status, /rounds and the verbs: its files, the stream, the plan and the audit log.

Who may ask is in ``daemon/access/policy.py``: anybody for the files, viewers for the rest.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec
from aiohttp import web
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.daemon.access.guard import CREDENTIAL
from weightsync.orchestrator.daemon.admin.audit import AuditLine, newest
from weightsync.orchestrator.daemon.admin.history import History
from weightsync.orchestrator.daemon.admin.views import StatusView
from weightsync.orchestrator.daemon.page.explained import Explained, PlanNotExplained, RatesView
from weightsync.orchestrator.daemon.page.files import file_routes
from weightsync.orchestrator.daemon.page.stream import PageStream, StreamRefused, Viewer
from weightsync.orchestrator.daemon.page.timeline import Timeline
from weightsync.orchestrator.planner import Plan

AUDIT_LINES: Final = 100
"""The newest ones, of at most ``audit.MAX_LINE_BYTES`` each; the file has all."""

RETRY_SECONDS: Final = "2"


class AuditView(msgspec.Struct, frozen=True):
    """The newest lines of the audit log, oldest first."""

    lines: tuple[AuditLine, ...]


class Page:
    """All that the page needs of the daemon. ``run`` is to run for as long as it is served.

    Args:
        directory: where the audit log is.
        plan: the present one.
    """

    def __init__(
        self,
        *,
        fleet: Fleet,
        history: History,
        timeline: Timeline,
        status: Callable[[], Awaitable[StatusView]],
        plan: Callable[[], Plan | None],
        directory: Path,
    ) -> None:
        self._timeline, self._directory = timeline, directory
        self._explained = Explained(plan, lambda: fleet.round is not None)
        self._rates = (-1, b"")
        self.stream = PageStream(status, history, timeline)

    def add_routes(self, app: web.Application) -> None:
        """Serve it in ``app``, whose guard knows who may."""
        app.router.add_routes(page_routes(self))

    async def follow(self, request: web.Request) -> web.StreamResponse:
        """``/stream``."""
        credential = request.match_info[CREDENTIAL]
        viewer = Viewer(credential, credential.partition(" ")[0] == "operator")
        try:
            return await self.stream.serve(request, viewer)
        except StreamRefused as refused:
            return web.Response(status=503, text=f"{refused}\n", headers={"Retry-After": RETRY_SECONDS})

    async def explain(self) -> web.Response:
        """``/plan/explanation``."""
        try:
            return _json(await self._explained.answer())
        except PlanNotExplained as error:
            return web.Response(status=error.status, text=f"{error}\n")

    async def audit(self) -> web.Response:
        """``/audit``."""
        try:
            lines = await asyncio.to_thread(newest, self._directory, AUDIT_LINES)
        except OSError as error:
            return web.Response(status=503, text=f"the audit log cannot be read: {error}\n")
        return _json(msgspec.json.encode(AuditView(tuple(lines))))

    def rates(self) -> web.Response:
        """``/plan/rates``: put together once for all pages that ask when a round has ended."""
        if self._rates[0] != self._timeline.ended:
            self._rates = (self._timeline.ended, msgspec.json.encode(RatesView(self._timeline.rates())))
        return _json(self._rates[1])


def page_routes(page: Page) -> list[web.RouteDef]:
    """All of them."""

    async def stream(request: web.Request) -> web.StreamResponse:
        return await page.follow(request)

    async def explanation(_: web.Request) -> web.StreamResponse:
        return await page.explain()

    async def rates(_: web.Request) -> web.StreamResponse:
        return page.rates()

    async def audit(_: web.Request) -> web.StreamResponse:
        return await page.audit()

    return [
        *file_routes(),
        web.get("/stream", stream, allow_head=False),  # it writes to the transport itself
        web.get("/plan/explanation", explanation),
        web.get("/plan/rates", rates),
        web.get("/audit", audit),
    ]


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")
