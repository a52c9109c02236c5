"""What every open page shows, as server-sent events: encoded once, and the same bytes handed to all of them.

A stream ends after STREAM_SECONDS and the page asks for the next one: so a credential that was taken away shows nothing
for longer than that, and no request outlives what the door allows one. A reader that does not keep up is cut off.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import msgspec
import structlog
from aiohttp import hdrs, web
from weightsync.orchestrator.daemon.admin.history import History
from weightsync.orchestrator.daemon.admin.views import StatusView
from weightsync.orchestrator.daemon.page.timeline import Timeline

log = structlog.get_logger(__name__)

MAX_PAGES: Final = 256
"""Open at a time; each has a connection and what its kernel buffer holds."""

BEAT_SECONDS: Final = 0.5
"""Between two looks at what has changed: a round is seen to move, and 50 pages cost a hundredth of the loop's time."""

STATUS_BEATS: Final = 2
"""A status is told once in so many beats."""

FRESH_SECONDS: Final = 0.5
"""For so long what one page was told first is told to others: all of them come at once when a daemon has started."""

STREAM_SECONDS: Final = 45.0
"""Less than ``DoorLimits.request_seconds``."""

MAX_BEHIND_BYTES: Final = 1 << 20
"""That a page has not read; then it is cut off, and asks anew if it still can. Several frames of a large fleet."""

HEADERS: Final = {hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8", hdrs.CACHE_CONTROL: "no-store"}

_encode: Final = msgspec.json.Encoder().encode


class StreamRefused(Exception):
    """MAX_PAGES are open, or the daemon stops; the message says which."""


class Viewer(msgspec.Struct, frozen=True):
    """The first event of a stream: the credential that asks, and whether it may act."""

    credential: str
    acts: bool


@dataclass(slots=True, eq=False)
class _Tap:
    transport: asyncio.Transport
    over: asyncio.Event = field(default_factory=asyncio.Event)


class PageStream:
    """One per daemon; belongs to its loop.

    Args:
        status: of this moment.
        history: rounds that have ended.
        timeline: the round under way.
    """

    def __init__(self, status: Callable[[], Awaitable[StatusView]], history: History, timeline: Timeline) -> None:
        self._status, self._history, self._timeline = status, history, timeline
        self._taps: set[_Tap] = set()
        self._serving, self._stopping = 0, False
        self._wanted = asyncio.Event()
        self._beats, self._told_changes, self._told_round = 0, 0, ""
        self._greeting = (-FRESH_SECONDS, b"", -1)
        self.dropped = 0
        """Pages that were cut off, because they did not keep up."""

    async def run(self) -> None:
        """Tell all pages until cancelled. What breaks here costs the pages and nobody else."""
        try:
            while True:
                await self._wanted.wait()
                try:
                    await self.beat()
                except Exception:
                    log.exception("the pages' stream broke")
                    self.end()
                await asyncio.sleep(BEAT_SECONDS)
        finally:
            self._stopping = True  # pages whose stream ends ask for the next one, for which nobody would wait
            self.end()

    def end(self) -> None:
        """End all streams."""
        for tap in self._taps:
            tap.over.set()
        self._taps.clear()
        self._wanted.clear()

    async def serve(self, request: web.Request, viewer: Viewer) -> web.StreamResponse:
        """One page's stream, until it or the page ends.

        Raises:
            StreamRefused.
        """
        if self._stopping:
            raise StreamRefused("the daemon is stopping")
        if self._serving >= MAX_PAGES:
            raise StreamRefused(f"{MAX_PAGES} pages are open already; close some")
        self._serving += 1
        try:
            return await self._serve(request, viewer)
        finally:
            self._serving -= 1

    async def _serve(self, request: web.Request, viewer: Viewer) -> web.StreamResponse:
        response = web.StreamResponse(headers=HEADERS)
        response.force_close()
        response.enable_chunked_encoding()
        await response.prepare(request)
        # By the response itself, which holds the headers back until there is a body.
        greeting, changes = await self._greet()
        await response.write(_event("viewer", viewer) + greeting)
        transport = request.transport
        if transport is not None:
            with self._tapped(transport, changes) as tap, contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STREAM_SECONDS):
                    await tap.over.wait()
        return response

    async def beat(self) -> None:
        """Tell what has changed since the last beat."""
        due = self._beats % STATUS_BEATS == 0 or self._newest != self._told_round
        status = await self._status_event() if due else b""
        # From here on nothing else happens: what is noted as told is what is told.
        said = []
        if self._told_changes != self._timeline.changes:
            said.append(self._lanes_event(asyncio.get_running_loop().time()))
        if self._newest != self._told_round:
            rows = self._history.rounds
            known = next((at for at, row in enumerate(rows, 1) if row.round == self._told_round), 0)
            said += [_event("ended", row) for row in rows[known:]]
        said.append(status)
        self._beats, self._told_changes, self._told_round = self._beats + 1, self._timeline.changes, self._newest
        if any(said):
            self._hand_out(b"".join(said))

    @property
    def _newest(self) -> str:
        rows = self._history.rounds
        return rows[-1].round if rows else ""

    def _hand_out(self, events: bytes) -> None:
        chunk = b"%x\r\n%b\r\n" % (len(events), events)
        for tap in list(self._taps):
            if tap.transport.is_closing():
                self._drop(tap)
            elif tap.transport.get_write_buffer_size() > MAX_BEHIND_BYTES:
                self.dropped += 1
                tap.transport.abort()
                self._drop(tap)
            else:
                tap.transport.write(chunk)

    @contextlib.contextmanager
    def _tapped(self, transport: asyncio.Transport, changes: int) -> Iterator[_Tap]:
        """``changes``: of the timeline, in the page's greeting; what others were told since then comes again."""
        tap = _Tap(transport)
        self._taps.add(tap)
        self._told_changes = min(self._told_changes, changes)
        self._wanted.set()
        try:
            yield tap
        finally:
            self._drop(tap)

    def _drop(self, tap: _Tap) -> None:
        tap.over.set()
        self._taps.discard(tap)
        if not self._taps:
            self._wanted.clear()

    async def _greet(self) -> tuple[bytes, int]:
        """What a page is told first, and the timeline's changes that it shows; later ones come with the next beats."""
        now = asyncio.get_running_loop().time()
        if now - self._greeting[0] >= FRESH_SECONDS:
            status = await self._status_event()
            self._greeting = (now, status + self._lanes_event(now), self._timeline.changes)
        return self._greeting[1:]

    async def _status_event(self) -> bytes:
        # Its rounds are told one by one as they end, and those before by /rounds.
        return _event("status", msgspec.structs.replace(await self._status(), rounds=()))

    def _lanes_event(self, now: float) -> bytes:
        """``null`` before the first round: a page may show one that another daemon, before this one, has told."""
        return _event("lanes", self._timeline.view(now))


def _event(name: str, data: msgspec.Struct | None) -> bytes:
    """JSON of ours has no line break."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), _encode(data))
