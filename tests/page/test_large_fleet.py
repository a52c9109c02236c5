"""The page of a fleet with more engines than fit a screen, in a real Chromium; what the daemon tells is made up."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from browser import Browser, Tab, browser
from ports import HOST, free_port
from weightsync.orchestrator.daemon.admin.views import EngineView, RoundRow, RoundsView, StatusView, VersionView
from weightsync.orchestrator.daemon.page.files import file_routes
from weightsync.orchestrator.daemon.page.stream import HEADERS, Viewer
from weightsync.orchestrator.daemon.page.timeline import RoundLanes, TimeLane

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

NAMES = tuple(f"rollout-{n:02d}" for n in range(64))
TROUBLE = "POST /update_weights did not answer within 60 s"
SERVED = VersionView(step=40, generation=7, sequence=40, unix_time=1e9)
STATUS = StatusView(
    run="glm", state="step 40 is committed", committed=SERVED, unix_time=1e9,
    engines=tuple(EngineView(name=name, url=f"http://{name}:8000", role="both", state="serving", paused=False,
                             version=SERVED, ranks_connected=1, ranks_expected=1, mode="flip") for name in NAMES),
)  # fmt: skip
LANES = RoundLanes(
    round="1.40", version=SERVED, kind="publish", attempt=1, began=1e9, elapsed=2.0, phase="recording",
    phases=(("writing", 0.0), ("switching", 1.9)), over=True, decided=True, reason="", more=0, writers=(),
    engines=tuple(TimeLane(name=name, lands="flip", marks={"switch": 1.95, "serves": 1.96},
                           trouble=TROUBLE if name == NAMES[-1] else "") for name in NAMES),
    ranks=tuple(TimeLane(name=f"{name}/0", engine=name, marks={"left": 1.95}) for name in NAMES),
)  # fmt: skip
ROUND = RoundRow(
    round="1.40", step=40, generation=7, attempt=1, outcome="committed", engines=NAMES, bytes=10**9, switch_ms=3.0,
    total_ms=2000.0, unix_time=1e9, lenders={NAMES[1]: NAMES[0]}, trainer_bytes=10**8,
)  # fmt: skip


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server that tells each page the same, and nothing else until it ends."""
    port, loop, ended = free_port(), asyncio.new_event_loop(), asyncio.Event()
    ready = threading.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=HEADERS)
        await response.prepare(request)
        for name, data in (("viewer", Viewer("viewer", False)), ("status", STATUS), ("lanes", LANES)):
            await response.write(b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(data)))
        await ended.wait()
        return response

    async def rounds(_: web.Request) -> web.StreamResponse:
        body = msgspec.json.encode(RoundsView(run="glm", rounds=(ROUND,)))
        return web.Response(body=body, content_type="application/json")

    async def serve() -> None:
        app = web.Application()
        app.router.add_routes([*file_routes(), web.get("/stream", stream), web.get("/rounds", rounds)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, HOST, port).start()
        ready.set()
        await ended.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(30)
    yield f"http://{HOST}:{port}"
    loop.call_soon_threadsafe(ended.set)
    thread.join(30)
    loop.close()


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[Browser]:
    with browser(tmp_path) as started:
        yield started


def engines_in(tab: Tab) -> list[str]:
    names: list[str] = tab.look("[...document.querySelectorAll('.lanes .engine th span')].map((s) => s.textContent)")
    return names


def test_the_round_of_many_engines_shows_those_in_trouble_first_and_all_when_asked(chromium: Browser, url: str) -> None:
    tab = chromium.open(url, width=360, height=740)
    tab.shows("Sign in")
    tab.write("any")
    tab.press("Enter")
    tab.shows("64 of 64", ".tiles")
    tab.shows("3 ms", ".tiles")
    assert "to switch, of 2.00 s in all" in tab.text(".tiles"), "engines that serve on stand still to switch"
    shown = engines_in(tab)
    assert (shown[0], len(shown)) == (NAMES[-1], 12)
    assert TROUBLE in tab.text(".lanes")
    assert tab.look("document.documentElement.scrollWidth") == 360
    tab.click("#view-fleet .panel button")
    tab.until("document.querySelectorAll('.lanes .engine').length === 64", "all engines")
    assert engines_in(tab) == list(NAMES)
    tab.look("location.hash = 'history'")
    tab.shows("median 3 ms", "#view-history")
    tab.click("[aria-label='Show round 1.40']")
    tab.shows("100 MB left the trainer; from another engine: rollout-01 from rollout-00.", "#view-history .panel")
    assert tab.complaints == []
