"""The control client against the real hub, and against daemons that misbehave."""

import asyncio
import contextlib
import itertools
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from credentials import TOKENS, write_credentials
from weightsync.agents.link import connection as control_connection
from weightsync.agents.link.client import Backoff, ControlClient, NotConnected, RefusedForGood
from weightsync.agents.link.connection import NotObeyed
from weightsync.agents.link.examination import clock
from weightsync.agents.link.tls import TlsError
from weightsync.orchestrator.cli.certs import make_certificates
from weightsync.orchestrator.core.events import AgentConnected, AgentLost, AgentSaid, Event
from weightsync.orchestrator.daemon.access.access import Access
from weightsync.orchestrator.daemon.access.tls import ServerTls
from weightsync.orchestrator.daemon.hub.connection import HubTiming
from weightsync.orchestrator.daemon.hub.hub import AGENTS_PATH, Hub
from weightsync.orchestrator.protocol.codec import ProtocolError, encode
from weightsync.orchestrator.protocol.limits import MAX_HELLO_BYTES, SCHEMA_VERSION
from weightsync.orchestrator.protocol.messages import (
    Bye,
    Converting,
    FromAgent,
    FromDaemon,
    Hello,
    HubRendezvous,
    NixlSettings,
    Outcome,
    Ready,
    Refused,
    Staged,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Member, Version
from weightsync.orchestrator.protocol.proof import (
    KEY_HEADER,
    NONCE_BYTES,
    NONCE_HEADER,
    PROOF_HEADER,
    RUN_HEADER,
    Challenge,
    daemon_proof,
)
from weightsync.orchestrator.protocol.token import TokenError
from weightsync.orchestrator.settings.credentials import ROLES
from weightsync.orchestrator.settings.problems import ConfigError
from weightsync.orchestrator.settings.sections import ListenTls

SECONDS = 20.0
"""Nothing here takes so long; a test that would wait for ever fails by it."""

MEMBER = Member("trainer", "", 3)
READY = Ready(fingerprint="f")
NEWS = (Converting(version=None), Staged(version=Version(1, 3), bytes=8, convert_seconds=0.1, digest_seconds=0.1))
OUTCOME = Outcome(version=Version(1, 2), committed=True)
Headers = dict[str, str]
AT_ONCE = Backoff(first=0.001, longest=0.01)


def welcome(heartbeat_seconds: float = 5.0) -> Welcome:
    return Welcome(
        epoch=1,
        journal_id="j",
        heartbeat_seconds=heartbeat_seconds,
        lost_after_heartbeats=3,
        transport=NixlSettings(),
        rendezvous=HubRendezvous(),
    )


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """A trainer's, in the directory of all credentials."""
    return write_credentials(tmp_path / "credentials") / "trainer.token"


@pytest.fixture(autouse=True)
async def _no_task_is_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    leaked = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert not leaked


class Daemon:
    """A hub that accepts everybody, and what it was told."""

    def __init__(self, token_file: Path, tls: ServerTls | None = None) -> None:
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.decide: Callable[[AgentConnected], object] = self.accept
        timing = HubTiming(heartbeat_seconds=5.0, missed_heartbeats=3, hello_seconds=10.0, close_seconds=0.5)
        next_id = itertools.count(1).__next__
        self.access = Access(token_file.parent, "run", str, tls)
        self.hub = Hub(access=self.access, post=self._on_event, next_id=next_id, timing=timing)

    def accept(self, event: AgentConnected) -> object:
        self.accepted = event.connection
        return self.hub.accept(event.member, event.connection, welcome())

    def _on_event(self, event: Event) -> None:
        self.events.put_nowait(event)
        if isinstance(event, AgentConnected):
            self.decide(event)

    async def next(self) -> Event:
        async with asyncio.timeout(SECONDS):
            return await self.events.get()


class Agent:
    """A client and what it heard."""

    def __init__(self, port: int, token_file: Path, *, scheme: str = "ws", **options: object) -> None:
        self.hellos = 0
        self.heard: asyncio.Queue[FromDaemon] = asyncio.Queue()
        self.losses: asyncio.Queue[str] = asyncio.Queue()
        options = {"backoff": AT_ONCE, "close_seconds": 0.5, "on_lost": self.losses.put_nowait} | options
        url = f"{scheme}://127.0.0.1:{port}{AGENTS_PATH}"
        self.client = ControlClient(url, token_file, self.hello, self.on_message, **options)  # type: ignore[arg-type]
        self.run = asyncio.create_task(self.client.run())

    def hello(self) -> Hello:
        self.hellos += 1
        return Hello(schema=SCHEMA_VERSION, run_id="run", member=MEMBER, world=4, incarnation=self.hellos)

    def on_message(self, message: FromDaemon) -> None:
        self.heard.put_nowait(message)

    async def next(self) -> FromDaemon:
        async with asyncio.timeout(SECONDS):
            return await self.heard.get()

    async def lost(self) -> str:
        async with asyncio.timeout(SECONDS):
            return await self.losses.get()

    async def stop(self, reason: str = "") -> None:
        async with asyncio.timeout(SECONDS):
            await self.client.close(reason)
            await self.run


@contextlib.asynccontextmanager
async def living(token_file: Path) -> AsyncIterator[tuple[Daemon, Agent]]:
    daemon = Daemon(token_file)
    agent = Agent(await daemon.hub.start("127.0.0.1", 0), token_file)
    assert await agent.next() == welcome()
    assert isinstance(await daemon.next(), AgentConnected)
    yield daemon, agent
    if not agent.run.done():
        await agent.stop()
    await daemon.hub.close()


@contextlib.asynccontextmanager
async def answering(
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]], ssl_context: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """The port of an HTTP server that handles AGENTS_PATH by ``answer``."""
    app = web.Application()
    app.router.add_get(AGENTS_PATH, answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=ssl_context).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def proved(request: web.Request, token: str = TOKENS["trainer"], run_id: str = "run", channel: bytes = b"") -> Headers:
    """With which a daemon that holds ``token`` answers an upgrade."""
    challenge = Challenge(run_id, request.headers[NONCE_HEADER], "cd" * NONCE_BYTES, channel)
    return {
        RUN_HEADER: run_id,
        NONCE_HEADER: challenge.daemon_nonce,
        PROOF_HEADER: daemon_proof(token, challenge).hex(),
    }


def daemon_that_says(
    *frames: bytes, prove: Callable[[web.Request], Headers] = proved
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Answers Hello with ``frames`` and is silent from then on."""

    async def answer(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(timeout=0.1)
        socket.headers.update(prove(request))
        await socket.prepare(request)
        await socket.receive()
        for frame in frames:
            await socket.send_bytes(frame)
        async for _ in socket:
            pass
        return socket

    return answer


# --------------------------------------------------------------------------------------------------------- ordinary
async def test_messages_both_ways_and_a_farewell(token_file: Path) -> None:
    async with living(token_file) as (daemon, agent):
        assert agent.client.connected
        assert list(clock(*agent.client.dated)) == []
        assert "ahead of" in next(clock(agent.client.dated[0], agent.client.dated[1] - 60)).what
        agent.client.send(READY)
        daemon.hub.send(MEMBER, OUTCOME)
        assert await agent.next() == OUTCOME
        await agent.stop("done")
        said = [await daemon.next() for _ in range(3)]
        assert [event.message for event in said[:2] if isinstance(event, AgentSaid)] == [READY, Bye(reason="done")]
        assert isinstance(said[2], AgentLost)
        assert said[2].reason == "closed by the agent: code 1000"
        assert agent.losses.empty()
        assert not agent.client.connected


async def test_the_answer_to_welcome_can_be_sent_at_once(token_file: Path) -> None:
    daemon = Daemon(token_file)
    agent = Agent(await daemon.hub.start("127.0.0.1", 0), token_file)
    agent.on_message = lambda message: agent.client.send(READY)  # type: ignore[method-assign]
    agent.client._on_message = agent.on_message
    assert isinstance(await daemon.next(), AgentConnected)
    event = await daemon.next()
    assert isinstance(event, AgentSaid)
    assert event.message == READY
    await agent.stop()
    await daemon.hub.close()


async def test_what_changes_between_hello_and_welcome_is_said_after_it(token_file: Path) -> None:
    """In its order; what Hello has carried, and what each connection says anew, is not."""
    daemon = Daemon(token_file)
    agent = Agent(await daemon.hub.start("127.0.0.1", 0), token_file)
    agent.client._on_message = lambda message: agent.client.send(READY)

    def refuse(event: AgentConnected) -> None:
        agent.client.send(Converting(version=Version(1, 2)))
        daemon.decide = meanwhile
        daemon.hub.refuse(event.member, event.connection, Refused(reason="later", fault="daemon", retry=True))

    def meanwhile(event: AgentConnected) -> None:
        assert not agent.client.connected
        for message in NEWS:
            agent.client.send(message)
        with pytest.raises(NotConnected):
            agent.client.send(READY)
        daemon.accept(event)

    daemon.decide = refuse
    said: list[FromAgent] = []
    while len(said) < 3:
        event = await daemon.next()
        said += [event.message] if isinstance(event, AgentSaid) else []
    assert (said, agent.hellos) == ([READY, *NEWS], 2)
    await agent.stop()
    await daemon.hub.close()


async def test_without_a_connection_nothing_can_be_said(token_file: Path) -> None:
    agent = Agent(1, token_file)
    with pytest.raises(NotConnected):
        agent.client.send(READY)
    await agent.stop()
    with pytest.raises(NotConnected):
        agent.client.send(READY)
    with pytest.raises(RuntimeError, match="runs once"):
        await agent.client.run()


# -------------------------------------------------------------------------------------------------- coming back
async def test_a_daemon_restart_is_survived_and_hello_is_asked_anew(token_file: Path) -> None:
    first = Daemon(token_file)
    port = await first.hub.start("127.0.0.1", 0)
    agent = Agent(port, token_file)
    assert await agent.next() == welcome()
    await first.hub.close("restart")
    assert await agent.lost() == "it closed the connection: code 1001 restart"
    second = Daemon(token_file)
    await second.hub.start("127.0.0.1", port)
    assert await agent.next() == welcome()
    connected = await second.next()
    assert isinstance(connected, AgentConnected)
    assert connected.hello.incarnation == agent.hellos >= 2
    agent.client.send(READY)
    said = await second.next()
    assert isinstance(said, AgentSaid)
    await agent.stop()
    await second.hub.close()


async def test_a_daemon_that_is_not_obeyed_is_left_and_tried_again_ever_later(token_file: Path) -> None:
    """It may be replaced by ours; until then nothing that it says behind its Welcome is heard."""

    class Proud(Agent):
        def on_message(self, message: FromDaemon) -> None:
            assert isinstance(message, Welcome)
            super().on_message(message)
            if self.hellos < 4:
                raise NotObeyed("its epoch is over")

    daemon = Daemon(token_file)

    def accept_and_speak(event: AgentConnected) -> object:
        answer = daemon.accept(event)
        if agent.hellos < 4:
            daemon.hub.send(MEMBER, OUTCOME)
        return answer

    waits: list[int] = []

    class Watched(Backoff):
        def seconds(self, failures: int, draw: float) -> float:
            waits.append(failures)
            return 0.001

    daemon.decide = accept_and_speak
    agent = Proud(await daemon.hub.start("127.0.0.1", 0), token_file, backoff=Watched())
    for _ in range(4):
        assert isinstance(await agent.next(), Welcome)
    assert waits == [1, 2, 3]
    assert await agent.lost() == "its epoch is over"
    assert agent.client.heard_at > 0
    await agent.stop()
    assert agent.client.heard_at == 0
    await daemon.hub.close()


async def test_a_drop_is_followed_by_a_reconnect(token_file: Path) -> None:
    async with living(token_file) as (daemon, agent):
        daemon.hub.drop(MEMBER, daemon.accepted, "evicted")
        assert await agent.lost() == "it closed the connection: code 1008 evicted"
        assert await agent.next() == welcome()


async def test_refused_for_now_tries_again(token_file: Path) -> None:
    daemon = Daemon(token_file)
    refused = Refused(reason="engine restarting", fault="engine", retry=True)

    def refuse_the_first(event: AgentConnected) -> object:
        daemon.decide = daemon.accept
        return daemon.hub.refuse(event.member, event.connection, refused)

    daemon.decide = refuse_the_first
    agent = Agent(await daemon.hub.start("127.0.0.1", 0), token_file)
    assert await agent.next() == welcome()
    assert agent.hellos == 2
    assert agent.losses.empty(), "what had no Welcome cannot be lost"
    await agent.stop()
    await daemon.hub.close()


@pytest.mark.parametrize("welcomed", [False, True])
async def test_refused_for_good_ends_run(token_file: Path, welcomed: bool) -> None:
    refused = Refused(reason="another run", fault="config", retry=False)
    frames = ([encode(welcome())] if welcomed else []) + [encode(refused)]
    async with answering(daemon_that_says(*frames)) as port:
        agent = Agent(port, token_file)
        with pytest.raises(RefusedForGood, match=r"config fault.*another run") as caught:
            await agent.run
        assert caught.value.refused == refused
        await agent.client.close()


async def test_a_token_that_becomes_right_is_read_again(token_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    daemon = Daemon(token_file)
    port = await daemon.hub.start("127.0.0.1", 0)
    own, right = token_file.with_name("agents-token"), TOKENS["trainer"] + "\n"
    own.touch(mode=0o600)
    own.write_text("stale-secret")
    with caplog.at_level(logging.WARNING):
        agent = Agent(port, own)
        await logged(caplog, "it rejects the token (401)")
        own.write_text("")
        await logged(caplog, "is empty")
        own.write_text(right)
        assert await agent.next() == welcome()
    assert "stale-secret" not in caplog.text
    assert TOKENS["trainer"] not in caplog.text
    await agent.stop()
    await daemon.hub.close()


async def logged(caplog: pytest.LogCaptureFixture, words: str) -> None:
    async with asyncio.timeout(SECONDS):
        while words not in caplog.text:  # noqa: ASYNC110  # the log has no event to wait for
            await asyncio.sleep(0)


# ---------------------------------------------------------------------------------------------- misbehaving daemons
async def test_a_daemon_that_never_answers(token_file: Path) -> None:
    connections: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
    server = await asyncio.start_server(lambda _, writer: connections.put_nowait(writer), "127.0.0.1", 0)
    agent = Agent(server.sockets[0].getsockname()[1], token_file, connect_seconds=0.05)
    async with asyncio.timeout(SECONDS):
        for _ in range(3):
            (await connections.get()).close()
    await agent.stop()
    while not connections.empty():
        connections.get_nowait().close()
    server.close()


async def test_a_daemon_that_answers_hello_with_silence(token_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with answering(daemon_that_says()) as port:
        agent = Agent(port, token_file, connect_seconds=0.05)
        await logged(caplog, "no Welcome within 0.05 s")
        await agent.stop()


async def test_a_daemon_that_falls_silent(token_file: Path) -> None:
    async with answering(daemon_that_says(encode(welcome(heartbeat_seconds=0.02)))) as port:
        agent = Agent(port, token_file)
        assert (await agent.lost()).startswith("it was silent for")
        await agent.stop()


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"junk", "it broke the protocol: malformed frame of 4 bytes"),
        (encode(OUTCOME), "it answers Hello with Outcome"),
        (encode(READY), "it broke the protocol: malformed frame"),
    ],
)
async def test_a_daemon_that_talks_nonsense(
    token_file: Path, caplog: pytest.LogCaptureFixture, frame: bytes, reason: str
) -> None:
    async with answering(daemon_that_says(frame)) as port:
        agent = Agent(port, token_file)
        await logged(caplog, reason)
        assert agent.heard.empty()
        await agent.stop()


async def test_nobody_is_obeyed_who_does_not_prove_the_token_and_nothing_is_said_to_him(
    token_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A rogue daemon, one with another token, one that repeats what a real one said, one that was never updated."""
    requests: list[web.Request] = []
    frames: list[object] = []

    def replayed(_: web.Request) -> Headers:
        return proved(requests[0])

    ways: list[Callable[[web.Request], Headers]] = [
        lambda _: {},
        replayed,
        lambda request: proved(request, "another-0123456789"),
        lambda request: proved(request) | {RUN_HEADER: "other"},
        lambda request: proved(request) | {NONCE_HEADER: "ab" * NONCE_BYTES},
        lambda request: proved(request) | {NONCE_HEADER: "x"},
        lambda request: proved(request) | {PROOF_HEADER: "ä"},
        lambda request: proved(request, channel=b"another connection's"),
        lambda request: {**proved(request), PROOF_HEADER: request.headers[NONCE_HEADER]},
    ]

    async def answer(request: web.Request) -> web.StreamResponse:
        requests.append(request)
        socket = web.WebSocketResponse(timeout=0.1)
        socket.headers.update(ways[min(len(requests), len(ways)) - 1](request))
        await socket.prepare(request)
        await socket.send_bytes(encode(welcome()))
        frames.append((await socket.receive()).data)
        return socket

    async with answering(answer) as port:
        agent = Agent(port, token_file)
        async with asyncio.timeout(SECONDS):
            while len(frames) < len(ways):  # noqa: ASYNC110  # the other side's list
                await asyncio.sleep(0)
        assert agent.heard.empty()
        assert agent.hellos == 0
        await agent.stop()
    assert not [frame for frame in frames if isinstance(frame, bytes)]
    assert caplog.text.count("it does not prove that it holds this agent's token") >= len(ways)
    said = "".join(f"{name}: {value}" for request in requests for name, value in request.headers.items())
    assert TOKENS["trainer"] not in said
    assert "Authorization" not in said
    assert len({request.headers[NONCE_HEADER] for request in requests}) == len(requests)
    assert len({request.headers[KEY_HEADER] for request in requests}) == 1


async def test_a_daemon_of_another_run_is_named_and_told_nothing(token_file: Path) -> None:
    """As when a configuration was copied, with its tokens."""
    answer = daemon_that_says(encode(welcome()), prove=lambda request: proved(request, run_id="staging"))
    async with answering(answer) as port:
        agent = Agent(port, token_file)
        with pytest.raises(RefusedForGood, match="belongs to run 'run', this daemon serves run 'staging'"):
            await agent.run
        assert agent.heard.empty()


async def test_a_member_with_the_credential_of_another_role_is_refused_for_good(token_file: Path) -> None:
    daemon = Daemon(token_file)
    agent = Agent(await daemon.hub.start("127.0.0.1", 0), token_file.with_name("engine.token"))
    with pytest.raises(RefusedForGood, match="trainer/3 is a member of role trainer and came with"):
        await agent.run
    assert daemon.events.empty()
    await daemon.hub.close()


async def test_something_else_that_answers_there(token_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(text="an API server")

    async with answering(answer) as port:
        agent = Agent(port, token_file)
        await logged(caplog, "it answers 200 OK and no WebSocket")
        await agent.stop()


async def test_a_daemon_that_takes_nothing(token_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_connection, "MAX_SEND_QUEUE_BYTES", 100_000)
    taking: asyncio.Queue[asyncio.Event] = asyncio.Queue()

    async def answer(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(timeout=0.1)
        socket.headers.update(proved(request))
        await socket.prepare(request)
        await socket.receive()
        await socket.send_bytes(encode(welcome()))
        assert request.transport is not None
        request.transport.pause_reading()
        done = asyncio.Event()
        taking.put_nowait(done)
        await done.wait()
        return socket

    async with answering(answer) as port:
        agent = Agent(port, token_file)
        done = await taking.get()
        assert await agent.next() == welcome()
        with pytest.raises(NotConnected, match="takes no messages"):
            fill(agent)
        assert "bytes wait for it" in await agent.lost()
        done.set()
        (await taking.get()).set()
        await agent.stop()


def fill(agent: Agent) -> None:
    for _ in range(10_000):
        agent.client.send(Bye(reason="x" * 4000))


# ---------------------------------------------------------------------------------------------------- own mistakes
async def test_what_a_callback_raises_ends_run_with_it(token_file: Path) -> None:
    async with living(token_file) as (daemon, agent):

        def fail(message: FromDaemon) -> None:
            raise ZeroDivisionError("a bug of the agent")

        assert agent.client._connection is not None
        agent.client._connection._on_message = fail
        daemon.hub.send(MEMBER, OUTCOME)
        with pytest.raises(ZeroDivisionError, match="a bug of the agent"):
            await agent.run
        assert not agent.client.connected
        await agent.client.close()


async def test_a_hello_that_is_too_long_is_the_agents_own_fault(token_file: Path) -> None:
    daemon = Daemon(token_file)
    port = await daemon.hub.start("127.0.0.1", 0)
    giant = Hello(
        schema=SCHEMA_VERSION, run_id="run", member=MEMBER, world=4, incarnation=1, host="x" * MAX_HELLO_BYTES
    )
    client = ControlClient(f"ws://127.0.0.1:{port}{AGENTS_PATH}", token_file, lambda: giant, lambda _: None)
    with pytest.raises(ProtocolError, match="Hello of"):
        await client.run()
    await daemon.hub.close()


@pytest.mark.parametrize("content", [None, "", "two words", "x" * 5000])
def test_token_files_that_cannot_serve(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TokenError, match=str(path)):
        ControlClient("ws://127.0.0.1:1/agents", path, lambda: None, lambda _: None)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/agents", "127.0.0.1:1", ""])
def test_an_address_of_another_scheme_is_an_error_by_name(token_file: Path, url: str) -> None:
    with pytest.raises(ValueError, match=f"hub url must begin with ws:// or wss://, got '{url}'"):
        ControlClient(url, token_file, lambda: None, lambda _: None)  # type: ignore[arg-type,return-value]


def test_backoff_stays_close_while_a_daemon_may_only_be_starting_and_doubles_to_its_longest_then() -> None:
    """A daemon that is started again is met within a second of its coming, for the first eight seconds at least."""
    backoff = Backoff()
    waits = [backoff.seconds(failures, 1.0) for failures in range(1, 22)]
    assert waits == [0.2, 0.4, 0.8, *[1.0] * 13, 2.0, 4.0, 8.0, 10.0, 10.0]
    assert backoff.seconds(10**6, 1.0) == 10.0
    assert [backoff.seconds(failures, 0.0) for failures in (1, 4, 1000)] == [0.1, 0.5, 5.0]
    assert sum(backoff.seconds(failures, 0.0) for failures in range(1, 17)) > 7
    assert Backoff(first=0.001, longest=0.01).seconds(99, 1.0) == 0.01


# ------------------------------------------------------------------------------------------------------------- TLS
@pytest.fixture
def certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of one run, whose authority this process's environment names."""
    directory = tmp_path / "certificates"
    make_certificates(directory, ["127.0.0.1"], [*ROLES, "trainer.3", "trainer.4"], 2)
    monkeypatch.setenv("WEIGHTSYNC_CA_FILE", str(directory / "ca.pem"))
    return directory


def listening(certificates: Path, *, clients: bool = False, name: str = "daemon") -> ServerTls:
    return ServerTls(ListenTls(
        certificate_file=certificates / f"{name}.pem", key_file=certificates / f"{name}.key",
        ca_file=certificates / "ca.pem", client_certificates=clients,
    ))  # fmt: skip


def show(monkeypatch: pytest.MonkeyPatch, certificates: Path, name: str) -> None:
    monkeypatch.setenv("WEIGHTSYNC_CERTIFICATE_FILE", str(certificates / f"{name}.pem"))
    monkeypatch.setenv("WEIGHTSYNC_KEY_FILE", str(certificates / f"{name}.key"))


async def test_over_tls(token_file: Path, certificates: Path) -> None:
    daemon = Daemon(token_file, listening(certificates))
    agent = Agent(await daemon.hub.start("127.0.0.1", 0), token_file, scheme="wss")
    assert await agent.next() == welcome()
    await agent.stop()
    await daemon.hub.close()


@pytest.mark.parametrize("known", ["other.pem", ""])
async def test_a_daemon_whose_certificate_is_not_trusted(
    token_file: Path,
    certificates: Path,
    known: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of another authority than the run's, or where the environment names none and the system knows nothing of it."""
    daemon = Daemon(token_file, listening(certificates))
    make_certificates(certificates.parent / "others", ["127.0.0.1"], (), 2)
    monkeypatch.setenv("WEIGHTSYNC_CA_FILE", str(certificates.parent / "others" / "ca.pem") if known else "")
    agent = Agent(await daemon.hub.start("127.0.0.1", 0), token_file, scheme="wss")
    await logged(caplog, "certificate verify failed")
    assert daemon.events.empty()
    await agent.stop()
    await daemon.hub.close()


async def test_whoever_ends_tls_before_the_daemon_is_not_believed(
    token_file: Path, certificates: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also with a certificate of the run's own authority, and with the daemon behind him."""
    daemon = Daemon(token_file, listening(certificates))
    port = await daemon.hub.start("127.0.0.1", 0)
    make_certificates(certificates.parent / "between", ["127.0.0.1"], (), 2)
    for name in ("ca.pem", "ca.key"):
        (certificates.parent / "between" / name).write_bytes((certificates / name).read_bytes())
    (certificates.parent / "between" / "daemon.pem").unlink()
    make_certificates(certificates.parent / "between", ["127.0.0.1"], (), 2)
    behind = ssl.create_default_context(cafile=certificates / "ca.pem")

    async def relay(request: web.Request) -> web.StreamResponse:
        async with aiohttp.ClientSession() as session:
            url = f"https://127.0.0.1:{port}{AGENTS_PATH}"
            headers = {name: request.headers[name] for name in (KEY_HEADER, NONCE_HEADER)}
            async with session.ws_connect(url, headers=headers, ssl=behind) as real:
                socket = web.WebSocketResponse(timeout=0.1)
                said = real._response.headers
                socket.headers.update({name: said[name] for name in (RUN_HEADER, NONCE_HEADER, PROOF_HEADER)})
                await socket.prepare(request)
                await socket.receive()
                return socket

    between = listening(certificates.parent / "between").context
    async with answering(relay, between) as other:
        agent = Agent(other, token_file, scheme="wss")
        await logged(caplog, "it does not prove that it holds this agent's token")
        assert agent.hellos == 0
        await agent.stop()
    assert daemon.events.empty()
    await daemon.hub.close()


@pytest.mark.parametrize(
    ("shown", "says"),
    [
        ("", "it answers 403"),
        ("engine", "by its certificate, trainer/3 is a member of role trainer and came with the credential of role"),
        ("trainer.4", "by its certificate, trainer/3 came with the credential of trainer 4, which is bound to it"),
        ("trainer.3", ""),
        ("trainer", ""),
    ],
)  # fmt: skip
async def test_certificates_of_agents_say_their_role_and_name(
    token_file: Path, certificates: Path, shown: str, says: str,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    daemon = Daemon(token_file, listening(certificates, clients=True))
    if shown:
        show(monkeypatch, certificates, shown)
    agent = Agent(await daemon.hub.start("127.0.0.1", 0), token_file, scheme="wss")
    if not says:
        assert await agent.next() == welcome()
    elif shown:
        with pytest.raises(RefusedForGood, match=says):
            await agent.run
        assert daemon.events.empty()
    else:
        await logged(caplog, says)
        assert daemon.events.empty()
    if not agent.run.done():
        await agent.stop()
    await daemon.hub.close()


async def test_a_certificate_is_replaced_without_a_restart(token_file: Path, certificates: Path) -> None:
    daemon = Daemon(token_file, listening(certificates))
    port = await daemon.hub.start("127.0.0.1", 0)
    (certificates / "daemon.pem").unlink()
    make_certificates(certificates, ["127.0.0.1"], (), 2)
    await daemon.access.again()
    agent = Agent(port, token_file, scheme="wss")  # the proofs cover the new one
    assert await agent.next() == welcome()
    (certificates / "daemon.key").write_text("nonsense")
    with pytest.raises(ConfigError, match=r"daemon.key: cannot be used with .*daemon.pem as certificate and key"):
        await daemon.access.again()
    await agent.stop()
    again = Agent(port, token_file, scheme="wss")
    assert await again.next() == welcome()
    await again.stop()
    await daemon.hub.close()


async def test_plain_text_is_no_way_to_a_daemon_with_tls_nor_tls_to_one_without(
    token_file: Path, certificates: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A downgrade: the address is the agent's own configuration, and what it names is never left out."""
    daemon = Daemon(token_file)
    agent = Agent(await daemon.hub.start("127.0.0.1", 0), token_file, scheme="wss")
    await logged(caplog, "next attempt in")
    assert agent.hellos == 0
    await agent.stop()
    await daemon.hub.close()
    with pytest.raises(TlsError, match=r"WEIGHTSYNC_CA_FILE is set, and ws://127.0.0.1:1/agents is not TLS"):
        ControlClient("ws://127.0.0.1:1/agents", token_file, lambda: None, lambda _: None)  # type: ignore[arg-type,return-value]
    monkeypatch.delenv("WEIGHTSYNC_CA_FILE")
    secure = Daemon(token_file, listening(certificates))
    plain = Agent(await secure.hub.start("127.0.0.1", 0), token_file)
    caplog.clear()
    await logged(caplog, "next attempt in")
    assert plain.hellos == 0
    await plain.stop()
    await secure.hub.close()
