"""The pages' stream over real HTTP: encoded once, bounded, and nobody's burden."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from weightsync.orchestrator.daemon.access.door import DoorLimits
from weightsync.orchestrator.daemon.admin.history import History
from weightsync.orchestrator.daemon.admin.views import RoundRow, StatusView, VersionView
from weightsync.orchestrator.daemon.page import stream as streams
from weightsync.orchestrator.daemon.page.stream import PageStream, StreamRefused, Viewer
from weightsync.orchestrator.daemon.page.timeline import RoundLanes, Timeline

SECONDS = 20.0
VIEWER = Viewer("viewer", False)


def row(name: str) -> RoundRow:
    return RoundRow(round=name, step=1, generation=7, attempt=1, outcome="committed")


class Told(Timeline):
    """Of which a round is shown at once."""

    shown: RoundLanes | None = None

    def begins(self, name: str) -> None:
        self.shown = RoundLanes(
            round=name, version=VersionView(step=1, generation=7), kind="publish", attempt=1, began=0.0, elapsed=0.0,
            phase="pausing", phases=(("pausing", 0.0),), engines=(), ranks=(), writers=(), over=False, decided=False,
            reason="", more=0,
        )  # fmt: skip
        self.changes += 1

    def view(self, now: float) -> RoundLanes | None:
        return self.shown


class Served:
    """A stream behind a real server; beats come by hand."""

    def __init__(self) -> None:
        self.history, self.asked, self.text = History(), 0, "all is well"
        self.timeline = Told()
        self.stream = PageStream(self.status, self.history, self.timeline)
        self.meanwhile: Callable[[], None] = lambda: None
        """What happens while a status is made."""
        self.url = ""

    async def status(self) -> StatusView:
        self.asked += 1
        if self.text == "broken":
            raise ZeroDivisionError
        await asyncio.sleep(0)
        self.meanwhile()
        return StatusView(run="glm", state=self.text, rounds=self.history.rounds)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self.stream.serve(request, VIEWER)
        except StreamRefused as refused:
            return web.Response(status=503, text=str(refused))

    def taps(self) -> int:
        return len(self.stream._taps)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    made = Served()
    app = web.Application()
    app.router.add_get("/stream", made.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/stream"
    yield made
    made.stream.end()
    await runner.cleanup()


class Reader:
    """Reads one stream event by event."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer

    async def next(self) -> tuple[str, Any]:
        async with asyncio.timeout(SECONDS):
            lines = [(await self._answer.content.readline()).decode().rstrip("\n") for _ in range(3)]
        assert lines[2] == ""
        return lines[0].removeprefix("event: "), json.loads(lines[1].removeprefix("data: "))

    async def greeted(self) -> Any:
        """All of a page's greeting; the status in it."""
        said = [await self.next() for _ in range(3)]
        assert [name for name, _ in said] == ["viewer", "status", "lanes"]
        return said[1][1]

    async def over(self) -> bool:
        async with asyncio.timeout(SECONDS):
            return await self._answer.content.read() == b""


async def test_a_page_learns_who_asks_and_what_is(served: Served) -> None:
    async with aiohttp.ClientSession() as session, session.get(served.url) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert answer.headers["Cache-Control"] == "no-store"
        reader = Reader(answer)
        assert await reader.next() == ("viewer", {"credential": "viewer", "acts": False})
        name, status = await reader.next()
        assert (name, status["state"]) == ("status", "all is well")
        assert await reader.next() == ("lanes", None), "a page may still show a round of the daemon before this one"


async def test_fifty_pages_cost_one_status(served: Served) -> None:
    async with aiohttp.ClientSession() as session, contextlib.AsyncExitStack() as open_pages:
        readers = [Reader(await open_pages.enter_async_context(session.get(served.url))) for _ in range(50)]
        for reader in readers:
            await reader.greeted()
        assert served.asked < 50
        asked = served.asked
        served.text = "a round begins"
        await served.stream.beat()
        assert served.asked == asked + 1
        for reader in readers:
            assert (await reader.next())[1]["state"] == "a round begins"


async def test_rounds_are_told_when_they_end_each_once_also_two_in_one_beat(served: Served) -> None:
    async with aiohttp.ClientSession() as session, session.get(served.url) as answer:
        reader = Reader(answer)
        await reader.greeted()
        await served.stream.beat()
        assert (await reader.next())[0] == "status"
        served.history.rounds = (row("1.1"), row("1.2"))
        await served.stream.beat()
        assert [(await reader.next())[1]["round"] for _ in range(2)] == ["1.1", "1.2"]
        name, status = await reader.next()
        assert (name, status["rounds"]) == ("status", [])
        served.history.rounds = (row("1.1"), row("1.2"), row("1.3"))
        await served.stream.beat()
        assert (await reader.next())[1]["round"] == "1.3"


async def test_a_round_is_told_while_it_runs_and_once(served: Served) -> None:
    async with aiohttp.ClientSession() as session, session.get(served.url) as answer:
        reader = Reader(answer)
        await reader.greeted()
        served.timeline.begins("1.1")
        await served.stream.beat()
        name, lanes = await reader.next()
        assert (name, lanes["round"], lanes["over"]) == ("lanes", "1.1", False)
        for _ in range(2 * streams.STATUS_BEATS):
            await served.stream.beat()
        assert [(await reader.next())[0] for _ in range(3)] == ["status"] * 3


async def test_a_round_that_runs_is_in_the_greeting(served: Served) -> None:
    served.timeline.begins("1.1")
    async with aiohttp.ClientSession() as session, session.get(served.url) as answer:
        reader = Reader(answer)
        said = [await reader.next() for _ in range(3)]
        assert (said[2][0], said[2][1]["round"], said[2][1]["over"]) == ("lanes", "1.1", False)


async def test_a_round_that_begins_while_a_status_is_made_is_told(served: Served) -> None:
    """No more may ever happen in it."""
    async with aiohttp.ClientSession() as session, session.get(served.url) as answer:
        reader = Reader(answer)
        await reader.greeted()
        served.meanwhile = lambda: served.timeline.begins("1.1") if served.timeline.shown is None else None
        for _ in range(2 * streams.STATUS_BEATS):
            await served.stream.beat()
        said = [await reader.next() for _ in range(3)]
        assert [lanes["round"] for name, lanes in said if name == "lanes"] == ["1.1"]


async def test_a_page_that_is_greeted_with_what_was_before_is_told_what_others_know(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A greeting is kept for a moment; a round that has begun in it, and was told, may have no other event."""
    monkeypatch.setattr(streams, "FRESH_SECONDS", SECONDS)
    served.stream._greeting = (-SECONDS, b"", -1)
    async with aiohttp.ClientSession() as session, session.get(served.url) as first:
        await Reader(first).greeted()
        served.timeline.begins("1.1")
        await served.stream.beat()
        async with session.get(served.url) as second:
            reader = Reader(second)
            await reader.greeted()
            assert served.asked == 2, "it was greeted with what the first one was"
            await served.stream.beat()
            name, lanes = await reader.next()
            assert (name, lanes["round"]) == ("lanes", "1.1")


async def test_a_status_comes_once_in_so_many_beats(served: Served) -> None:
    async with aiohttp.ClientSession() as session, session.get(served.url):
        asked = served.asked
        for _ in range(2 * streams.STATUS_BEATS):
            await served.stream.beat()
        assert served.asked == asked + 2


async def test_nothing_is_made_while_no_page_is_open(served: Served) -> None:
    task = asyncio.create_task(served.stream.run())
    for _ in range(5):
        await asyncio.sleep(0)
    assert served.asked == 0
    async with aiohttp.ClientSession() as session, session.get(served.url) as answer:
        reader = Reader(answer)
        assert [(await reader.next())[0] for _ in range(4)] == ["viewer", "status", "lanes", "status"]
    task.cancel()
    await asyncio.wait({task})


async def test_a_reader_that_does_not_keep_up_is_cut_off_and_nobody_else(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "STATUS_BEATS", 1)
    served.text = "x" * (1 << 20)
    async with (
        aiohttp.ClientSession(read_bufsize=1 << 23) as session,
        session.get(served.url) as quick,
        aiohttp.ClientSession() as another,
        another.get(served.url),  # and never read
    ):
        reader = Reader(quick)
        await reader.greeted()
        assert served.taps() == 2
        for _ in range(64):
            await served.stream.beat()
            await reader.next()
            if served.stream.dropped:
                break
        assert (served.stream.dropped, served.taps()) == (1, 1)
        await served.stream.beat()
        assert (await reader.next())[0] == "status"


async def test_there_are_so_many_pages_and_no_more(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_PAGES", 1)
    async with aiohttp.ClientSession() as session, session.get(served.url) as first:
        assert first.status == 200
        async with session.get(served.url) as second:
            assert second.status == 503
            assert "1 pages are open already; close some" in await second.text()


async def test_a_stream_ends_and_its_place_is_free_again(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STREAM_SECONDS", 0.0)
    monkeypatch.setattr(streams, "MAX_PAGES", 1)
    async with aiohttp.ClientSession() as session:
        for _ in range(2):
            async with session.get(served.url) as answer:
                reader = Reader(answer)
                await reader.greeted()
                assert await reader.over()
    assert served.taps() == 0


async def test_what_breaks_costs_the_pages_only(served: Served) -> None:
    task = asyncio.create_task(served.stream.run())
    async with aiohttp.ClientSession() as session, session.get(served.url) as answer:
        reader = Reader(answer)
        await reader.greeted()
        served.text = "broken"
        async with asyncio.timeout(SECONDS):
            while served.taps():  # noqa: ASYNC110  (what the stream does has no event)
                await asyncio.sleep(0.01)
        assert not task.done()
        served.text = "well again"
        async with session.get(served.url) as answer_again:
            again = Reader(answer_again)
            assert (await again.greeted())["state"] == "well again"
    task.cancel()
    await asyncio.wait({task})


async def test_a_daemon_that_stops_ends_all_streams_and_begins_none(served: Served) -> None:
    task = asyncio.create_task(served.stream.run())
    async with aiohttp.ClientSession() as session, session.get(served.url) as answer:
        reader = Reader(answer)
        await reader.next()
        task.cancel()
        await asyncio.wait({task})
        async with asyncio.timeout(SECONDS):
            await answer.content.read()
        async with session.get(served.url) as again:
            assert (again.status, await again.text()) == (503, "the daemon is stopping")


def test_a_stream_is_over_before_the_door_ends_it() -> None:
    assert DoorLimits().request_seconds > streams.STREAM_SECONDS
