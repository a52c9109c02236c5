"""An engine that makes itself a member, against servers that answer as daemons may."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import aiohttp
import msgspec
import pytest
from aiohttp import web
from credentials import TOKENS, write_credentials
from weightsync.agents.link import applicant
from weightsync.agents.link.applicant import ApplicantError, ApplicantThread, engines_url
from weightsync.agents.link.client import Backoff
from weightsync.agents.link.tls import TlsError
from weightsync.orchestrator.cli.certs import make_certificates
from weightsync.orchestrator.daemon.access.access import Access, Claim, NotAdmitted
from weightsync.orchestrator.daemon.access.tls import ServerTls
from weightsync.orchestrator.daemon.admin.routes import application_routes
from weightsync.orchestrator.daemon.hub.connection import HubTiming
from weightsync.orchestrator.daemon.hub.hub import Hub
from weightsync.orchestrator.protocol.application import ENGINES_PATH, Admitted, Applicant, Application, Declined
from weightsync.orchestrator.protocol.proof import KEY_HEADER
from weightsync.orchestrator.settings.sections import ListenTls

SECONDS = 20.0
"""Nothing here takes so long."""

ENGINE = Applicant(name="a0", urls=("http://h:8000",))
AT_ONCE = Backoff(first=0.001, longest=0.01, quick=0.01)
TAKEN_IN = msgspec.json.encode(Admitted(again_seconds=0))
FOR_LONG = msgspec.json.encode(Admitted(again_seconds=1e6))


class Door:
    """A daemon's door: gives one answer after the other, the last one for ever, and notes what it hears.

    An answer is what it says in a frame, or a status in place of the upgrade.
    """

    def __init__(
        self, credentials: Path, *answers: bytes | int, run: str = "glm", tls: ServerTls | None = None
    ) -> None:
        self.answers = list(answers)
        self.access = Access(credentials, run, str, tls)
        self.tls = tls
        self.asked: asyncio.Queue[str] = asyncio.Queue()
        self.heard: asyncio.Queue[tuple[Application, str]] = asyncio.Queue()
        self.headers: list[str] = []

    async def receive(self, request: web.Request) -> web.StreamResponse:
        self.headers += [f"{name}: {value}" for name, value in request.headers.items()]
        self.asked.put_nowait(request.headers[KEY_HEADER])
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        try:
            claim = self.access.claim_of(request, "apply")
        except NotAdmitted as error:
            return web.Response(status=error.status)
        if isinstance(answer, int):
            return web.Response(status=answer)
        socket = web.WebSocketResponse()
        socket.headers.update(self.proof(claim))
        await socket.prepare(request)
        message = await socket.receive()
        if message.type is aiohttp.WSMsgType.BINARY:
            application = msgspec.json.decode(claim.said_in(message.data), type=Application)
            self.heard.put_nowait((application, claim.token))
            await self.answer(socket, answer)
        return socket

    def proof(self, claim: Claim) -> dict[str, str]:
        return claim.headers()

    async def answer(self, socket: web.WebSocketResponse, answer: bytes) -> None:
        await socket.send_bytes(answer)

    async def hears(self) -> Application:
        return (await asyncio.wait_for(self.heard.get(), SECONDS))[0]

    @contextlib.asynccontextmanager
    async def served(self, port: int = 0) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_get(ENGINES_PATH, self.receive)
        runner = web.AppRunner(app, shutdown_timeout=1.0)
        await runner.setup()
        context = None if self.tls is None else self.tls.context
        await web.TCPSite(runner, "127.0.0.1", port, ssl_context=context).start()
        try:
            yield f"{'ws' if self.tls is None else 'wss'}://127.0.0.1:{runner.addresses[0][1]}/agents"
        finally:
            # Connections are accepted in turn: behind this one the loop has met those that the thread has left.
            async with aiohttp.ClientSession() as session, session.get(self.beside(runner), ssl=False) as response:
                assert response.status == 404
            await runner.cleanup()

    def beside(self, runner: web.AppRunner) -> str:
        return f"{'http' if self.tls is None else 'https'}://127.0.0.1:{runner.addresses[0][1]}/nothing"


@pytest.fixture
def credentials(tmp_path: Path) -> Path:
    return write_credentials(tmp_path / "credentials")


@pytest.fixture
def token_file(credentials: Path) -> Path:
    """The engine's own copy."""
    file = credentials.parent / "token"
    file.touch(mode=0o600)
    file.write_text(TOKENS["engine"])
    return file


@contextlib.contextmanager
def noting(level: int) -> Iterator["asyncio.Queue[str]"]:
    """What the thread logs from ``level`` on."""
    queue: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, record.getMessage())

    handler = Noting(level)
    applicant.log.addHandler(handler)
    try:
        yield queue
    finally:
        applicant.log.removeHandler(handler)


@pytest.fixture
async def warnings() -> AsyncIterator["asyncio.Queue[str]"]:
    """What the thread warns of, each new reason once."""
    with noting(logging.WARNING) as queue:
        yield queue


@contextlib.asynccontextmanager
async def applying(url: str, token_file: Path) -> AsyncIterator[ApplicantThread]:
    thread = ApplicantThread("glm", ENGINE, url, token_file, AT_ONCE)
    thread.start()
    try:
        yield thread
    finally:
        await asyncio.to_thread(thread.close)
        assert not thread._thread.is_alive()


def declined(status: int, why: str) -> bytes:
    return msgspec.json.encode(Declined(status=status, why=why))


async def test_it_applies_until_it_is_taken_in(
    credentials: Path, token_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "weightsync")
    full = declined(409, "name 'a0': full. Fix: raise it\n")
    door = Door(credentials, full, full, declined(503, "later\n"), FOR_LONG)
    with noting(logging.INFO) as said:
        async with door.served() as url, applying(url, token_file):
            for _ in range(4):
                heard = await asyncio.wait_for(door.heard.get(), SECONDS)
                assert heard == (Application(run_id="glm", engine=ENGINE), TOKENS["engine"])
            lines = [await asyncio.wait_for(said.get(), SECONDS) for _ in range(3)]
        assert door.heard.empty()
        assert said.empty(), "each reason once"
    assert [line.partition(": ")[2] for line in lines[:2]] == [
        "409: name 'a0': full. Fix: raise it; tried again",
        "503: later; tried again",
    ]
    assert lines[2].startswith("a0 is a member, says the daemon at ws://")
    assert not [header for header in door.headers if TOKENS["engine"] in header]


async def test_it_says_again_that_it_is_there_and_reads_its_token_anew(
    credentials: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(applicant, "LEAST_SECONDS", 0.001)
    door = Door(credentials, TAKEN_IN)
    async with door.served() as url, applying(url, token_file):
        assert await door.hears() == await door.hears()
        await asyncio.to_thread(token_file.write_text, TOKENS["trainer"])
        async with asyncio.timeout(SECONDS):
            while (await door.heard.get())[1] != TOKENS["trainer"]:
                pass


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"{}", "type"),
        (b"\xff", "malformed"),
        (b'{"type": "admitted", "again_seconds": -1}', "again_seconds"),
        (b"x" * (applicant.MAX_ANSWER_BYTES + 1), "exceeds limit of 16384 bytes"),
        (declined(500, "y" * 1000), "500: yyy"),
        (301, "it answers 301"),
        (401, "rejects the token"),
    ],
)
async def test_what_is_no_answer_is_tried_again(
    credentials: Path, token_file: Path, answer: bytes | int, words: str
) -> None:
    door = Door(credentials, answer)
    async with door.served() as url, applying(url, token_file) as thread:
        for _ in range(3):
            await asyncio.wait_for(door.asked.get(), SECONDS)
        assert words in thread.trouble
        assert len(thread.trouble) <= applicant.MAX_SHOWN + 5


async def test_who_proves_nothing_or_serves_another_run_hears_nothing(
    credentials: Path, token_file: Path, warnings: "asyncio.Queue[str]"
) -> None:
    class Rogue(Door):
        """It has seen the key, which is no secret, and repeats a proof of another connection."""

        def proof(self, claim: Claim) -> dict[str, str]:
            return replace(claim, challenge=replace(claim.challenge, agent_nonce="ab" * 32)).headers()

    class OfAgents(Door):
        """It passes on what the daemon proves to agents."""

        def proof(self, claim: Claim) -> dict[str, str]:
            return replace(claim, challenge=replace(claim.challenge, purpose="connect")).headers()

    doors = [
        (Rogue(credentials, TAKEN_IN), "does not prove that it holds this agent's token"),
        (OfAgents(credentials, TAKEN_IN), "does not prove that it holds this agent's token"),
        (Door(credentials, TAKEN_IN, run="other"), "run_id 'glm': that daemon serves run 'other'. Fix: "),
    ]
    for door, words in doors:
        async with door.served() as url, applying(url, token_file):
            assert words in await asyncio.wait_for(warnings.get(), SECONDS)
        assert door.heard.empty()


@pytest.mark.parametrize("believed", [True, False])
async def test_with_tls_it_believes_its_own_authority(
    credentials: Path,
    token_file: Path,
    warnings: "asyncio.Queue[str]",
    monkeypatch: pytest.MonkeyPatch,
    believed: bool,
) -> None:
    own, other = credentials.parent / "own", credentials.parent / "other"
    for directory in (own, other):
        make_certificates(directory, ["127.0.0.1"], (), 2)
    files = ListenTls(certificate_file=own / "daemon.pem", key_file=own / "daemon.key", ca_file=own / "ca.pem")
    monkeypatch.setenv("WEIGHTSYNC_CA_FILE", str((own if believed else other) / "ca.pem"))
    door = Door(credentials, FOR_LONG, tls=ServerTls(files))
    async with door.served() as url, applying(url, token_file):
        if believed:
            assert (await door.hears()).engine == ENGINE
        else:
            assert "certificate verify failed" in await asyncio.wait_for(warnings.get(), SECONDS)
    assert door.asked.empty() is not believed
    with pytest.raises(TlsError, match="WEIGHTSYNC_CA_FILE is set, and ws://h:1/engines is not TLS"):
        ApplicantThread("glm", ENGINE, "ws://h:1/agents", token_file)


class Taking:
    """Takes all engines in."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[Application] = asyncio.Queue()

    async def receive(self, application: Application, _: str) -> Admitted:
        self.heard.put_nowait(application)
        return Admitted(again_seconds=1e6)


async def test_through_the_daemons_own_door_with_certificates_on_both_sides(
    credentials: Path, token_file: Path, warnings: "asyncio.Queue[str]", monkeypatch: pytest.MonkeyPatch
) -> None:
    files = credentials.parent / "certificates"
    make_certificates(files, ["127.0.0.1"], ["engine.a0", "engine.other"], 2)
    tls = ListenTls(
        certificate_file=files / "daemon.pem", key_file=files / "daemon.key", ca_file=files / "ca.pem",
        client_certificates=True,
    )  # fmt: skip
    access = Access(credentials, "glm", str, ServerTls(tls))
    hub = Hub(access=access, post=lambda _: None, next_id=lambda: 1, timing=HubTiming(5, 3, 5, 0.1))
    taking = Taking()

    def configure(app: web.Application) -> None:
        app.router.add_routes(application_routes(taking, access))  # type: ignore[arg-type]

    url = f"wss://127.0.0.1:{await hub.start('127.0.0.1', 0, configure)}/agents"
    monkeypatch.setenv("WEIGHTSYNC_CA_FILE", str(files / "ca.pem"))
    for name, said in [
        ("", "no WebSocket: this needs a client certificate that names its role"),
        ("engine.other", "403: by its certificate, engine 'a0' came with the credential of engine other"),
        ("engine.a0", ""),
    ]:
        for variable, end in (("WEIGHTSYNC_CERTIFICATE_FILE", "pem"), ("WEIGHTSYNC_KEY_FILE", "key")):
            monkeypatch.setenv(variable, str(files / f"{name}.{end}") if name else "")
        async with applying(url, token_file):
            if said:
                assert said in await asyncio.wait_for(warnings.get(), SECONDS)
            else:
                assert (await asyncio.wait_for(taking.heard.get(), SECONDS)).engine == ENGINE
    assert taking.heard.empty()
    await hub.close()


async def test_neither_a_daemon_that_is_away_nor_a_lost_token_ends_it(
    credentials: Path, token_file: Path, warnings: "asyncio.Queue[str]"
) -> None:
    door = Door(credentials, FOR_LONG)
    async with door.served() as url:
        pass
    port = int(url.split(":")[2].partition("/")[0])
    async with applying(url, token_file):
        assert "Cannot connect" in await asyncio.wait_for(warnings.get(), SECONDS)
        await asyncio.to_thread(token_file.unlink)
        assert "token file" in await asyncio.wait_for(warnings.get(), SECONDS)
        await asyncio.to_thread(token_file.touch, 0o600)
        await asyncio.to_thread(token_file.write_text, TOKENS["engine"])
        async with door.served(port):
            assert (await door.hears()).engine == ENGINE


async def test_a_daemon_that_ends_without_an_answer_is_asked_again(
    credentials: Path, token_file: Path, warnings: "asyncio.Queue[str]"
) -> None:
    class Curt(Door):
        async def answer(self, socket: web.WebSocketResponse, answer: bytes) -> None:
            await socket.close(code=1011, message=b"no time")

    door = Curt(credentials, TAKEN_IN)
    async with door.served() as url, applying(url, token_file):
        assert await door.hears() == await door.hears()
        assert "it says nothing: code 1011 no time" in await asyncio.wait_for(warnings.get(), SECONDS)


async def test_a_daemon_that_does_not_answer_delays_no_end(
    credentials: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent(Door):
        async def answer(self, socket: web.WebSocketResponse, answer: bytes) -> None:
            await asyncio.Event().wait()

    monkeypatch.setattr(applicant, "CLOSE_SECONDS", 0.1)
    door = Silent(credentials, TAKEN_IN)
    async with door.served() as url, applying(url, token_file):
        await door.hears()


async def test_one_that_was_not_started_has_nothing_to_end(token_file: Path) -> None:
    ApplicantThread("glm", ENGINE, "ws://127.0.0.1:1/agents", token_file).close()


def test_where_it_applies() -> None:
    assert engines_url("ws://head:7410/agents") == "ws://head:7410/engines"
    assert engines_url("wss://proxy.example/runs/glm/agents") == "wss://proxy.example/runs/glm/engines"


@pytest.mark.parametrize("url", ["http://head:7410/agents", "ws://head:7410", "ws://head:7410/agents/", ""])
def test_what_is_no_hub(url: str, token_file: Path) -> None:
    with pytest.raises(ApplicantError, match=r"write ws://host:port/agents"):
        ApplicantThread("glm", ENGINE, url, token_file)
