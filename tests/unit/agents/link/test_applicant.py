"""An engine that makes itself a member, against servers that answer as daemons may."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from weightsync.agents.link import applicant
from weightsync.agents.link.applicant import ApplicantError, ApplicantThread, engines_url
from weightsync.agents.link.client import Backoff
from weightsync.orchestrator.protocol.application import ENGINES_PATH, Applicant, Application

SECONDS = 20.0
"""Nothing here takes so long."""

ENGINE = Applicant(name="a0", urls=("http://h:8000",))
AT_ONCE = Backoff(first=0.001, longest=0.01, quick=0.01)
TAKEN_IN = (200, b'{"again_seconds": 0}')


class Door:
    """A daemon that gives one answer after the other, the last one for ever, and notes what it hears."""

    def __init__(self, *answers: tuple[int, bytes]) -> None:
        self.answers = list(answers)
        self.heard: asyncio.Queue[tuple[Application, str]] = asyncio.Queue()

    async def receive(self, request: web.Request) -> web.Response:
        application = msgspec.json.decode(await request.read(), type=Application)
        self.heard.put_nowait((application, request.headers["Authorization"]))
        status, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return web.Response(status=status, body=body)

    async def hears(self) -> Application:
        return (await asyncio.wait_for(self.heard.get(), SECONDS))[0]

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_post(ENGINES_PATH, self.receive)
        runner = web.AppRunner(app, shutdown_timeout=1.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"ws://127.0.0.1:{runner.addresses[0][1]}/agents"
        finally:
            await runner.cleanup()


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text("the-token\n")
    return file


@pytest.fixture
async def warnings() -> AsyncIterator["asyncio.Queue[str]"]:
    """What the thread logs, each new reason once."""
    queue: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, record.getMessage())

    noting = Noting(logging.WARNING)
    applicant.log.addHandler(noting)
    yield queue
    applicant.log.removeHandler(noting)


@contextlib.asynccontextmanager
async def applying(url: str, token_file: Path) -> AsyncIterator[ApplicantThread]:
    thread = ApplicantThread("glm", ENGINE, url, token_file, AT_ONCE)
    thread.start()
    try:
        yield thread
    finally:
        await asyncio.to_thread(thread.close)
        assert not thread._thread.is_alive()


async def test_it_applies_until_it_is_taken_in(token_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "weightsync")
    full = (409, b"name 'a0': full. Fix: raise it\n")
    door = Door(full, full, (503, b"later\n"), (200, b'{"again_seconds": 1e6}'))
    async with door.served() as url:
        async with applying(url, token_file):
            for _ in range(4):
                application, token = await asyncio.wait_for(door.heard.get(), SECONDS)
                assert (application, token) == (Application(run_id="glm", engine=ENGINE), "Bearer the-token")
        assert door.heard.empty()
    said = [record.getMessage() for record in caplog.records if record.name.startswith("weightsync")]
    assert [line.partition(": ")[2] for line in said if "not taken in" in line] == [
        "409: name 'a0': full. Fix: raise it; tried again",
        "503: later; tried again",
    ], "each reason once"
    assert sum("is a member" in line for line in said) == 1


async def test_it_says_again_that_it_is_there_and_reads_its_token_anew(
    token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(applicant, "LEAST_SECONDS", 0.001)
    door = Door(TAKEN_IN)
    async with door.served() as url, applying(url, token_file):
        assert await door.hears() == await door.hears()
        await asyncio.to_thread(token_file.write_text, "another")
        async with asyncio.timeout(SECONDS):
            while (await door.heard.get())[1] != "Bearer another":
                pass


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((200, b"{}"), "again_seconds"),
        ((200, b"\xff"), "malformed"),
        ((200, b'{"again_seconds": -1}'), "again_seconds"),
        ((200, b"x" * (applicant.MAX_ANSWER_BYTES + 1)), "an answer of more than 16384 bytes"),
        ((301, b"elsewhere"), "301: elsewhere"),
        ((500, b"\xff" * 5000), "500: "),
    ],
)
async def test_what_is_no_answer_is_tried_again(token_file: Path, answer: tuple[int, bytes], words: str) -> None:
    door = Door(answer)
    async with door.served() as url, applying(url, token_file) as thread:
        await door.hears()
        await door.hears()
        assert words in thread.trouble
        assert len(thread.trouble) <= applicant.MAX_SHOWN + 5


async def test_neither_a_daemon_that_is_away_nor_a_lost_token_ends_it(
    token_file: Path, warnings: "asyncio.Queue[str]"
) -> None:
    door = Door((200, b'{"again_seconds": 1e6}'))
    async with door.served() as url:
        pass
    port = int(url.split(":")[2].partition("/")[0])
    async with applying(url, token_file):
        assert "Cannot connect" in await asyncio.wait_for(warnings.get(), SECONDS)
        await asyncio.to_thread(token_file.unlink)
        assert "token file" in await asyncio.wait_for(warnings.get(), SECONDS)
        await asyncio.to_thread(token_file.write_text, "the-token")
        app = web.Application()
        app.router.add_post(ENGINES_PATH, door.receive)
        runner = web.AppRunner(app, shutdown_timeout=1.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        assert (await door.hears()).engine == ENGINE
        await runner.cleanup()


async def test_a_daemon_that_does_not_answer_delays_no_end(token_file: Path) -> None:
    class Silent(Door):
        async def receive(self, request: web.Request) -> web.Response:
            await super().receive(request)
            await asyncio.Event().wait()
            raise AssertionError

    door = Silent(TAKEN_IN)
    async with door.served() as url, applying(url, token_file):
        await door.hears()


async def test_one_that_was_not_started_has_nothing_to_end(token_file: Path) -> None:
    ApplicantThread("glm", ENGINE, "ws://127.0.0.1:1/agents", token_file).close()


def test_where_it_applies() -> None:
    assert engines_url("ws://head:7410/agents") == "http://head:7410/engines"
    assert engines_url("wss://proxy.example/runs/glm/agents") == "https://proxy.example/runs/glm/engines"


@pytest.mark.parametrize("url", ["http://head:7410/agents", "ws://head:7410", "ws://head:7410/agents/", ""])
def test_what_is_no_hub(url: str, token_file: Path) -> None:
    with pytest.raises(ApplicantError, match=r"write ws://host:port/agents"):
        ApplicantThread("glm", ENGINE, url, token_file)
