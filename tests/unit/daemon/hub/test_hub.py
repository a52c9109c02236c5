"""The hub over real sockets on 127.0.0.1, with aiohttp's own WebSocket client as the peer."""

import asyncio
import contextlib
import gzip
import itertools
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import msgspec
import pytest
import structlog
from aiohttp import WSCloseCode, WSMsgType, web
from credentials import TOKENS, Proving, open_agent, write_credentials
from weightsync.orchestrator.core.events import AgentConnected, AgentLost, AgentSaid, Event
from weightsync.orchestrator.daemon.access.access import Access
from weightsync.orchestrator.daemon.hub import connection as hub_connection
from weightsync.orchestrator.daemon.hub import hub as hub_module
from weightsync.orchestrator.daemon.hub.connection import HubTiming
from weightsync.orchestrator.daemon.hub.hub import AGENTS_PATH, SWEEP_SLICES, Hub
from weightsync.orchestrator.protocol.codec import decode_from_daemon, encode
from weightsync.orchestrator.protocol.limits import MAX_FRAME_BYTES, MAX_HELLO_BYTES, SCHEMA_VERSION
from weightsync.orchestrator.protocol.messages import (
    Bye,
    Connect,
    FromDaemon,
    Heartbeat,
    Hello,
    HubRendezvous,
    Needs,
    NixlSettings,
    Outcome,
    Ready,
    Refused,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Member, Version
from weightsync.orchestrator.protocol.proof import (
    KEY_HEADER,
    NONCE_BYTES,
    NONCE_HEADER,
    PROOF_BYTES,
    PROOF_HEADER,
    agent_proof,
    daemon_proof,
    is_nonce,
    key_of,
)
from weightsync.orchestrator.settings.credentials import make_tokens
from weightsync.orchestrator.settings.secrets import read_tokens

TOKEN = TOKENS["engine"]
SECONDS = 20.0
"""Nothing here takes so long; a test that would wait for ever fails by it."""

E = TypeVar("E", AgentConnected, AgentSaid, AgentLost)

WELCOME = Welcome(
    epoch=1,
    journal_id="j",
    heartbeat_seconds=5.0,
    lost_after_heartbeats=3,
    transport=NixlSettings(),
    rendezvous=HubRendezvous(),
)
READY = Ready(fingerprint="f")


def member(rank: int = 0) -> Member:
    return Member("inference", "engine", rank)


def hello(rank: int = 0, incarnation: int = 7, run_id: str = "run") -> Hello:
    return Hello(schema=SCHEMA_VERSION, run_id=run_id, member=member(rank), world=8, incarnation=incarnation)


ANY = 0
"""In place of an event's id where events are compared: Bench.next checks that ids grow by one, and takes them off."""


class Bench:
    """A hub, its events in order, and clients of it."""

    def __init__(self, hub: Hub, events: "asyncio.Queue[Event]", url: str, session: aiohttp.ClientSession) -> None:
        self.hub, self.events, self.url, self.session = hub, events, url, session
        self._sockets: list[aiohttp.ClientWebSocketResponse] = []
        self._last_id = 0

    async def next(self, kind: type[E]) -> E:
        async with asyncio.timeout(SECONDS):
            event = await self.events.get()
        assert isinstance(event, kind), event
        self._last_id += 1
        assert event.id == self._last_id
        return replace(event, id=ANY)

    async def open(self, token: str = TOKEN) -> Proving:
        socket = await open_agent(
            self.session, self.url, token, max_msg_size=0, autoping=False, timeout=aiohttp.ClientWSTimeout(ws_close=0.1)
        )
        self._sockets.append(socket.raw)
        return socket

    async def hang_up(self) -> None:
        for socket in self._sockets:
            await socket.close()

    async def introduce(self, rank: int = 0, incarnation: int = 7) -> tuple[Proving, int]:
        socket = await self.open()
        await socket.send_bytes(encode(hello(rank, incarnation)))
        connected = await self.next(AgentConnected)
        assert connected.hello == hello(rank, incarnation)
        return socket, connected.connection

    async def admit(self, rank: int = 0, incarnation: int = 7) -> tuple[Proving, int]:
        socket, connection_id = await self.introduce(rank, incarnation)
        assert self.hub.accept(member(rank), connection_id, WELCOME)
        assert await said(socket) == WELCOME
        return socket, connection_id

    async def quiet(self) -> None:
        """Let everything that is under way happen, by a round trip over a new connection; no event is to come of it."""
        socket = await self.open()
        await socket.close()
        assert self.events.empty()


async def said(socket: Proving) -> FromDaemon:
    async with asyncio.timeout(SECONDS):
        frame = await socket.receive()
    assert frame.type is WSMsgType.BINARY, frame
    return decode_from_daemon(frame.data)


async def closed(socket: Proving) -> tuple[int, str]:
    """Code and reason with which the hub closes."""
    async with asyncio.timeout(SECONDS):
        while True:
            frame = await socket.receive()
            if frame.type is WSMsgType.CLOSE:
                return frame.data, frame.extra or ""
            assert frame.type in (WSMsgType.BINARY, WSMsgType.PONG), frame


@pytest.fixture
def access(tmp_path: Path) -> Access:
    return Access(write_credentials(tmp_path / "credentials"), "run", str)


def hub_of(access: Access, post: Callable[[Event], None], **timing: Any) -> Hub:
    # Most peers here never read what is said to them at the end, hence the short closing handshake.
    defaults = {"heartbeat_seconds": 5.0, "missed_heartbeats": 4, "hello_seconds": 10.0, "close_seconds": 0.1}
    next_id = itertools.count(1).__next__
    return Hub(access=access, post=post, next_id=next_id, timing=HubTiming(**defaults | timing))


@contextlib.asynccontextmanager
async def serving(access: Access, **timing: Any) -> AsyncIterator[Bench]:
    before = asyncio.all_tasks()
    events: asyncio.Queue[Event] = asyncio.Queue()
    hub = hub_of(access, events.put_nowait, **timing)
    port = await hub.start("127.0.0.1", 0)
    async with aiohttp.ClientSession() as session:
        bench = Bench(hub, events, f"http://127.0.0.1:{port}{AGENTS_PATH}", session)
        yield bench
        async with asyncio.timeout(SECONDS):
            await hub.close()
            await bench.hang_up()
    leaked = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert not leaked


@pytest.fixture
async def bench(access: Access) -> AsyncIterator[Bench]:
    async with serving(access) as bench:
        yield bench


# ------------------------------------------------------------------------------------------------------- strangers
@pytest.mark.parametrize("token", ["", "wrong", TOKEN + "x", TOKEN[:-1], "ä"])
async def test_a_wrong_token_is_turned_away_before_the_upgrade(bench: Bench, token: str) -> None:
    with structlog.testing.capture_logs() as logs:
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await bench.open(token)
        assert caught.value.status == 401
    assert [(entry["event"], entry["reason"]) for entry in logs] == [("agent turned away", "wrong or missing token")]
    assert TOKEN not in repr(logs)
    await bench.quiet()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": f"Bearer {TOKEN}"}, 401),
        ({KEY_HEADER: key_of(TOKEN)}, 400),
        ({KEY_HEADER: key_of(TOKEN), NONCE_HEADER: "AB" * NONCE_BYTES}, 400),
        ({KEY_HEADER: key_of(TOKEN), NONCE_HEADER: "ab" * 31}, 400),
        ({KEY_HEADER: key_of(TOKENS["viewer"]), NONCE_HEADER: "ab" * NONCE_BYTES}, 403),
        ({KEY_HEADER: key_of(TOKENS["operator"]), NONCE_HEADER: "ab" * NONCE_BYTES}, 403),
    ],
)
async def test_what_else_is_no_agent(bench: Bench, headers: dict[str, str], status: int) -> None:
    """Also a token that is sent, as if the daemon were to be trusted with it."""
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await bench.session.ws_connect(bench.url, headers=headers)
    assert caught.value.status == status


async def test_the_daemon_proves_itself_to_whom_names_its_token(bench: Bench) -> None:
    socket = await bench.open()
    answer = socket.answer
    assert answer[PROOF_HEADER] == daemon_proof(TOKEN, socket.challenge).hex()
    assert socket.challenge.run_id == "run"
    assert is_nonce(answer[NONCE_HEADER])
    other = await bench.open()
    assert other.challenge.daemon_nonce != socket.challenge.daemon_nonce


async def test_an_upgrade_without_the_proof_is_worth_nothing(bench: Bench) -> None:
    """The key is on the wire: whoever has read it, or heard a whole connection, still cannot come in."""
    honest = await bench.open()
    first = agent_proof(TOKEN, honest.challenge, encode(hello())) + encode(hello())
    await honest.raw.send_bytes(first)
    await bench.next(AgentConnected)
    for frame in (first, bytes(32) + encode(hello()), encode(hello()), b""):  # replayed, made up, old, empty
        rude = await bench.open()
        await rude.raw.send_bytes(frame)
        code, reason = await closed(rude)
        assert (code, reason) == (WSCloseCode.PROTOCOL_ERROR, "it does not prove that it holds the token of engine")
    changed = await bench.open()  # a proof is for one Hello
    await changed.raw.send_bytes(agent_proof(TOKEN, changed.challenge, encode(hello())) + encode(hello(rank=1)))
    assert (await closed(changed))[0] == WSCloseCode.PROTOCOL_ERROR
    await bench.quiet()


TRAINER = Member("trainer", "", 3)


@pytest.mark.parametrize(
    ("file", "who", "says"),
    [
        ("engine", TRAINER, "trainer/3 is a member of role trainer and came with the credential of role engine; give"
         " it the token in trainer.token"),
        ("trainer", member(), "engine/0 is a member of role engine and came with the credential of role trainer; give"
         " it the token in engine.token"),
        ("engine.other", member(), "engine/0 came with the credential of engine other, which is bound to it"),
        ("trainer.2", TRAINER, "trainer/3 came with the credential of trainer 2, which is bound to it"),
        ("engine.engine", member(), ""),
        ("trainer.3", TRAINER, ""),
    ],
)  # fmt: skip
async def test_a_credential_admits_the_members_of_its_role_and_name(
    tmp_path: Path, file: str, who: Member, says: str
) -> None:
    directory = write_credentials(tmp_path / "credentials")
    make_tokens(directory, (file,))
    token = read_tokens(directory / f"{file}.token")[0]
    async with serving(Access(directory, "run", str)) as bench:
        socket = await bench.open(token)
        await socket.send_bytes(encode(msgspec.structs.replace(hello(), member=who)))
        if says:
            refused = await said(socket)
            assert refused == Refused(reason=says, fault="config", retry=False)
            assert (await closed(socket))[0] == WSCloseCode.POLICY_VIOLATION
            assert bench.events.empty()
        else:
            assert (await bench.next(AgentConnected)).member == who


async def test_two_tokens_count_while_one_takes_the_place_of_the_other(access: Access, tmp_path: Path) -> None:
    """And whoever came with a token that counts no longer comes again."""
    file = tmp_path / "credentials" / "engine.token"
    new = "another-0123456789"
    async with serving(access) as bench:
        old_socket, old_id = await bench.admit(0)
        file.write_text(f"{new}\n{TOKEN}\n")
        await access.credentials.again()
        socket = await bench.open(new)
        await socket.send_bytes(encode(hello(1)))
        connected = await bench.next(AgentConnected)
        assert bench.hub.accept(member(1), connected.connection, WELCOME)
        file.write_text(f"{new}\n")
        await access.credentials.again()
        reason = "the token that it came with counts no longer"
        assert await closed(old_socket) == (WSCloseCode.POLICY_VIOLATION, reason)
        assert await bench.next(AgentLost) == AgentLost(ANY, member(0), old_id, reason)
        assert bench.hub.send(member(1), WELCOME)
        with pytest.raises(aiohttp.WSServerHandshakeError):
            await bench.open(TOKEN)


async def test_no_hello_within_its_deadline(access: Access) -> None:
    async with serving(access, hello_seconds=0.01) as bench:
        code, reason = await closed(await bench.open())
        assert (code, reason) == (WSCloseCode.POLICY_VIOLATION, "no Hello within 0.01 s")
        assert bench.events.empty()


async def test_an_oversized_hello(bench: Bench) -> None:
    socket = await bench.open()
    await socket.send_bytes(bytes(MAX_HELLO_BYTES + 1))
    code, reason = await closed(socket)
    assert code == WSCloseCode.MESSAGE_TOO_BIG
    assert f"exceeds limit of {PROOF_BYTES + MAX_HELLO_BYTES}" in reason
    await bench.quiet()


@pytest.mark.parametrize("data", [b"", b"\xc1", b"junk", encode(hello())[:-1], encode(hello()) + b"\x00"])
async def test_a_malformed_hello(bench: Bench, data: bytes) -> None:
    socket = await bench.open()
    await socket.send_bytes(data)
    code, reason = await closed(socket)
    assert code == WSCloseCode.PROTOCOL_ERROR
    assert "malformed frame" in reason
    await bench.quiet()


async def test_another_first_message(bench: Bench) -> None:
    socket = await bench.open()
    await socket.send_bytes(encode(READY))
    assert await closed(socket) == (WSCloseCode.PROTOCOL_ERROR, "the first message is Ready and not Hello")
    await bench.quiet()


async def test_another_schema_is_refused_by_name_even_if_its_hello_is_not_ours(bench: Bench) -> None:
    socket = await bench.open()
    await socket.send_bytes(msgspec.msgpack.encode({"type": "Hello", "schema": 99, "novelty": [1, 2]}))
    refused = await said(socket)
    assert isinstance(refused, Refused)
    assert (refused.fault, refused.retry) == ("config", False)
    assert f"schema 99, the daemon {SCHEMA_VERSION}" in refused.reason
    assert (await closed(socket))[0] == WSCloseCode.POLICY_VIOLATION
    await bench.quiet()


@pytest.mark.parametrize("change", [{"run_id": "other"}, {"schema": 99}, {"world": 1, "member": member(1)}])
async def test_whether_an_agent_belongs_here_is_the_owners_to_judge(bench: Bench, change: dict[str, Any]) -> None:
    odd = msgspec.structs.replace(hello(), **change)
    socket = await bench.open()
    await socket.send_bytes(encode(odd))
    connected = await bench.next(AgentConnected)
    assert (connected.member, connected.hello) == (odd.member, odd)
    refused = Refused(reason="it does not", fault="config", retry=False)
    assert bench.hub.refuse(odd.member, connected.connection, refused)
    assert await said(socket) == refused
    assert (await closed(socket))[0] == WSCloseCode.POLICY_VIOLATION
    await bench.quiet()


async def test_too_many_connections(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "MAX_CONNECTIONS", 1)
    first, _ = await bench.admit()
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await bench.open()
    assert caught.value.status == 503
    assert not first.closed


# --------------------------------------------------------------------------------------------------------- members
async def test_messages_both_ways_in_order(bench: Bench) -> None:
    socket, connection_id = await bench.admit()
    await socket.send_bytes(encode(READY))
    await socket.send_bytes(encode(Heartbeat()))
    await socket.send_bytes(encode(Bye(reason="enough")))
    assert await bench.next(AgentSaid) == AgentSaid(ANY, member(), connection_id, READY)
    assert await bench.next(AgentSaid) == AgentSaid(ANY, member(), connection_id, Bye(reason="enough"))
    outcomes = [Outcome(version=Version(1, step), committed=True) for step in range(3)]
    for outcome in outcomes:
        assert bench.hub.send(member(), outcome)
    assert [await said(socket) for _ in outcomes] == outcomes


async def test_a_large_message_both_ways(bench: Bench) -> None:
    socket, _ = await bench.admit()
    large = Connect(fingerprint="f", root="r", peers=(), copies=bytes(5_000_000), expected_bytes=1)
    assert bench.hub.send(member(), large)
    assert await said(socket) == large
    await socket.send_bytes(encode(Bye(reason="x" * 4000)))
    assert (await bench.next(AgentSaid)).message == Bye(reason="x" * 4000)


async def test_a_broadcast_is_encoded_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[FromDaemon] = []
    sockets = [(await bench.admit(rank))[0] for rank in range(3)]

    def counted(message: FromDaemon) -> bytes:
        encoded.append(message)
        return encode(message)

    monkeypatch.setattr(hub_module, "encode", counted)
    outcome = Outcome(version=Version(1, 1), committed=True)
    everybody = [member(rank) for rank in range(4)]
    assert [bench.hub.send(one, outcome) for one in everybody] == [True, True, True, False]
    assert [await said(socket) for socket in sockets] == [outcome] * 3
    assert encoded == [outcome]


async def test_the_agent_closes(bench: Bench) -> None:
    socket, connection_id = await bench.admit()
    await socket.close(message=b"had enough")
    lost = await bench.next(AgentLost)
    assert lost == AgentLost(ANY, member(), connection_id, "closed by the agent: code 1000 had enough")
    assert not bench.hub.send(member(), WELCOME)


async def test_the_connection_breaks(bench: Bench) -> None:
    socket, connection_id = await bench.admit()
    transport = socket.get_extra_info("socket")
    transport.shutdown(2)
    lost = await bench.next(AgentLost)
    assert lost.connection == connection_id
    assert lost.reason.startswith("the connection broke")


@pytest.mark.parametrize(
    ("send", "code", "reason"),
    [
        (lambda socket: socket.send_bytes(b"junk"), WSCloseCode.PROTOCOL_ERROR, "malformed frame of 4 bytes"),
        (lambda socket: socket.send_str("text"), WSCloseCode.UNSUPPORTED_DATA, "text frame"),
        (lambda socket: socket.send_bytes(encode(hello())), WSCloseCode.PROTOCOL_ERROR, "Hello out of turn"),
        (lambda socket: socket.send_bytes(encode(WELCOME)), WSCloseCode.PROTOCOL_ERROR, "malformed frame"),
        (lambda socket: socket.send_frame(b"x", 0x3), WSCloseCode.PROTOCOL_ERROR, "invalid opcode"),
        (lambda socket: socket.send_frame(b"x" * 9, WSMsgType.BINARY, 15), WSCloseCode.PROTOCOL_ERROR, "reserved bits"),
    ],
    ids=["junk", "text", "second hello", "a daemon's message", "unknown opcode", "compressed"],
)
async def test_a_violation_costs_its_own_connection_and_no_other(
    bench: Bench, send: Callable[[aiohttp.ClientWebSocketResponse], Any], code: int, reason: str
) -> None:
    good, good_id = await bench.admit(1)
    bad, bad_id = await bench.admit(0)
    await send(bad)
    lost = await bench.next(AgentLost)
    assert (lost.member, lost.connection) == (member(0), bad_id)
    assert reason in lost.reason
    given, told = await closed(bad)
    assert given == code
    assert reason in told
    await good.send_bytes(encode(READY))
    assert await bench.next(AgentSaid) == AgentSaid(ANY, member(1), good_id, READY)


async def test_an_oversized_frame(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_connection, "MAX_FRAME_BYTES", 100_000)
    socket, connection_id = await bench.admit()
    await socket.send_bytes(bytes(100_001))
    lost = await bench.next(AgentLost)
    assert lost == AgentLost(ANY, member(), connection_id, "frame with 100001 bytes exceeds limit of 100000 bytes")
    assert (await closed(socket))[0] == WSCloseCode.MESSAGE_TOO_BIG


async def test_a_message_before_the_decision(bench: Bench) -> None:
    socket, connection_id = await bench.introduce()
    await socket.send_bytes(encode(READY))
    assert await bench.next(AgentLost) == AgentLost(
        ANY, member(), connection_id, "Ready out of turn: in stage DECISION"
    )
    assert not bench.hub.accept(member(), connection_id, WELCOME)


async def test_ping_is_answered(bench: Bench) -> None:
    socket, _ = await bench.admit()
    await socket.ping(b"there?")
    async with asyncio.timeout(SECONDS):
        frame = await socket.receive()
    assert (frame.type, bytes(frame.data)) == (WSMsgType.PONG, b"there?")


# ------------------------------------------------------------------------------------------------------- decisions
async def test_a_duplicate_rank_is_refused_by_name_and_the_first_stays(bench: Bench) -> None:
    first, first_id = await bench.admit(incarnation=1)
    second, second_id = await bench.introduce(incarnation=2)
    refused = Refused(reason="engine/0 is taken by another living process", fault="config", retry=True)
    assert bench.hub.refuse(member(), second_id, refused)
    assert await said(second) == refused
    assert await closed(second) == (WSCloseCode.POLICY_VIOLATION, refused.reason)
    await first.send_bytes(encode(READY))
    assert await bench.next(AgentSaid) == AgentSaid(ANY, member(), first_id, READY)
    await bench.quiet()


async def test_a_reconnect_takes_the_place_of_the_old_connection(bench: Bench) -> None:
    old, _ = await bench.admit()
    new, new_id = await bench.admit()
    assert (await closed(old))[1] == "a newer connection of this agent took its place"
    await new.send_bytes(encode(READY))
    assert await bench.next(AgentSaid) == AgentSaid(ANY, member(), new_id, READY)
    outcome = Outcome(version=Version(1, 1), committed=True)
    assert bench.hub.send(member(), outcome)
    assert await said(new) == outcome
    await bench.quiet()


async def test_drop_is_the_owners_wish_and_no_loss(bench: Bench) -> None:
    socket, number = await bench.admit()
    assert bench.hub.drop(member(), number, "evicted")
    assert await closed(socket) == (WSCloseCode.POLICY_VIOLATION, "evicted")
    assert not bench.hub.drop(member(), number, "evicted")
    await bench.quiet()


async def test_a_drop_of_an_old_connection_leaves_the_newer_one(bench: Bench) -> None:
    _, old = await bench.admit()
    socket, new = await bench.admit()
    assert not bench.hub.drop(member(), old, "it broke the protocol")
    outcome = Outcome(version=Version(1, 1), committed=True)
    assert bench.hub.send(member(), outcome)
    assert await said(socket) == outcome
    assert bench.hub.drop(member(), new, "it broke the protocol, too")
    assert (await closed(socket))[1] == "it broke the protocol, too"
    await bench.quiet()


async def test_decisions_about_the_gone_and_the_decided_are_false(bench: Bench) -> None:
    refused = Refused(reason="", fault="", retry=True)
    socket, connection_id = await bench.introduce()
    assert not bench.hub.accept(member(1), connection_id, WELCOME)
    assert bench.hub.accept(member(), connection_id, WELCOME)
    assert not bench.hub.accept(member(), connection_id, WELCOME)
    assert not bench.hub.refuse(member(), connection_id, refused)
    await socket.close()
    await bench.next(AgentLost)
    assert not bench.hub.refuse(member(), connection_id, refused)


async def test_nobody_decides(access: Access) -> None:
    async with serving(access, hello_seconds=0.05) as bench:
        socket, connection_id = await bench.introduce()
        assert await bench.next(AgentLost) == AgentLost(
            ANY, member(), connection_id, "no decision on its Hello within 0.05 s"
        )
        await closed(socket)


# ------------------------------------------------------------------------------------------------------ heartbeats
def sweep_all(hub: Hub, now: float) -> None:
    for turn in range(SWEEP_SLICES):
        hub.sweep(now, turn)


async def test_the_hub_sends_heartbeats(access: Access) -> None:
    async with serving(access, heartbeat_seconds=0.02, missed_heartbeats=1000) as bench:
        socket, _ = await bench.admit()
        assert [await said(socket) for _ in range(3)] == [Heartbeat()] * 3


async def test_a_silent_peer_is_lost_after_its_heartbeats(bench: Bench) -> None:
    clock = asyncio.get_running_loop().time
    silence_seconds = 4 * 5.0
    before = clock()
    socket, connection_id = await bench.admit()
    sweep_all(bench.hub, before + silence_seconds - 1)
    assert bench.events.empty()
    sweep_all(bench.hub, clock() + silence_seconds + 1)
    lost = await bench.next(AgentLost)
    assert lost.connection == connection_id
    assert lost.reason.startswith("silent for")
    assert not socket.closed, "it was not the peer who went away"
    assert not bench.hub.send(member(), WELCOME)


async def test_a_slow_peer_is_dropped_and_not_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_connection, "MAX_SEND_QUEUE_BYTES", 1_000_000)
    good, _ = await bench.admit(1)
    slow, slow_id = await bench.admit(0)
    pause_reading(slow)
    large = Connect(fingerprint="f", root="r", peers=(), copies=bytes(900_000), expected_bytes=1)
    sent = 0
    while bench.hub.send(member(0), large):
        sent += 1
        assert sent < 100, "the kernel never stops taking"
    assert bench.events.empty(), "an event came from within the owner's own command"
    assert await bench.next(AgentLost) == AgentLost(ANY, member(0), slow_id, "slow: its send queue is full")
    assert bench.hub.send(member(1), large)
    assert await said(good) == large


def pause_reading(socket: aiohttp.ClientWebSocketResponse) -> None:
    connection = socket._response.connection
    assert connection is not None
    assert connection.transport is not None
    connection.transport.pause_reading()


# ------------------------------------------------------------------------------------------------------------ life
async def test_close_ends_everybody_with_a_reason(access: Access) -> None:
    async with serving(access) as bench:
        socket, _ = await bench.admit()
        waiting = await bench.open()
        ended = asyncio.gather(closed(socket), closed(waiting))
        await bench.hub.close("restart")
        assert list(await ended) == [(WSCloseCode.GOING_AWAY, "restart")] * 2
        assert bench.events.empty()
        with pytest.raises(aiohttp.ClientConnectorError):
            await bench.open()


async def test_close_does_not_wait_for_a_peer_that_does_not_answer(access: Access) -> None:
    async with serving(access, close_seconds=0.05) as bench:
        socket, _ = await bench.admit()
        pause_reading(socket)
        async with asyncio.timeout(SECONDS):
            await bench.hub.close()


async def test_others_may_serve_at_the_same_address(access: Access) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text="here")

    def configure(app: web.Application) -> None:
        app.router.add_get("/status", answer)

    hub = hub_of(access, lambda _: None)
    port = await hub.start("127.0.0.1", 0, configure)
    headers = {"Authorization": f"Bearer {TOKENS['viewer']}"}
    url = f"http://127.0.0.1:{port}/status"
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as response:
        assert await response.text() == "here"
    with pytest.raises(OSError, match="Address already in use"):
        await hub_of(access, lambda _: None).start("127.0.0.1", port)
    await hub.close()


async def test_no_body_is_unpacked(access: Access) -> None:
    """A kilobyte would be a megabyte, and the loop would stand still for it, whoever has sent it."""

    async def echo(request: web.Request) -> web.Response:
        return web.Response(body=await request.read())

    hub = hub_of(access, lambda _: None)
    port = await hub.start("127.0.0.1", 0, lambda app: app.router.add_post("/verbs/{verb}", echo))
    packed = gzip.compress(bytes(2**20))
    headers = {"Authorization": f"Bearer {TOKENS['operator']}", "Content-Encoding": "gzip"}
    url = f"http://127.0.0.1:{port}/verbs/hold"
    async with aiohttp.ClientSession() as session, session.post(url, data=packed, headers=headers) as response:
        assert await response.read() == packed
    await hub.close()


# ------------------------------------------------------------------------------------------------- what has no encoding
@pytest.mark.parametrize(
    "message",
    [
        Needs(tensors=(), quantized=(), quantization="\ud800", fingerprint="f"),
        Connect(fingerprint="f", root="r", peers=(), copies=bytes(MAX_FRAME_BYTES), expected_bytes=0),
        Outcome(version=Version(1, 2), committed=True, sequence=2**70),
    ],
)
async def test_what_cannot_be_sent_costs_its_receiver_only(bench: Bench, message: FromDaemon) -> None:
    _, connection_id = await bench.admit(0)
    other, _ = await bench.admit(1)
    assert not bench.hub.send(member(0), message)
    assert bench.hub.send(member(1), Heartbeat())
    lost = await bench.next(AgentLost)
    assert (lost.member, lost.connection) == (member(0), connection_id)
    assert lost.reason.startswith(f"{type(message).__name__} cannot be sent to it: ")
    assert lost.reason.encode()
    assert await said(other) == Heartbeat()


async def test_a_message_whose_handling_breaks_costs_its_sender_only(access: Access) -> None:
    """The owner's promise is not to raise; a bug there is no reason to lose everybody."""
    async with serving(access) as bench:
        rude, connection_id = await bench.admit(0)
        other, _ = await bench.admit(1)
        post = bench.hub._post

        def breaks(event: Event) -> None:
            if isinstance(event, AgentSaid) and event.member == member(0):
                raise KeyError("a bug")
            post(event)

        bench.hub._post = breaks
        bench._last_id += 1  # of the event that nobody got
        with structlog.testing.capture_logs() as logs:
            await rude.send_bytes(encode(READY))
            assert (await closed(rude))[0] == WSCloseCode.INTERNAL_ERROR
        assert "what an agent sent broke its handling" in [line["event"] for line in logs]
        lost = await bench.next(AgentLost)
        assert (lost.member, lost.connection) == (member(0), connection_id)
        await other.send_bytes(encode(READY))
        assert (await bench.next(AgentSaid)).member == member(1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "Staged", "version": [1, 2], "bytes": 1, "convert_seconds": math.nan, "digest_seconds": 0.0},
        {"type": "Staged", "version": [1, 10**18], "bytes": 1, "convert_seconds": 0.0, "digest_seconds": 0.0},
        {"type": "Quiesced", "round": [2**64 - 1, 1]},
        {"type": "Bye", "reason": "x" * 5000},
        {"type": "Ready", "fingerprint": "f", "failed": [{"peer": ["trainer", "e0", 0], "error": ""}]},
    ],
)
async def test_what_is_outside_of_its_bounds_costs_its_sender_only(bench: Bench, wrong: dict[str, Any]) -> None:
    rude, _ = await bench.admit(0)
    other, _ = await bench.admit(1)
    await rude.send_bytes(msgspec.msgpack.encode(wrong))
    code, reason = await closed(rude)
    assert (code, reason[:15]) == (WSCloseCode.PROTOCOL_ERROR, "malformed frame")
    assert (await bench.next(AgentLost)).member == member(0)
    await other.send_bytes(encode(READY))
    assert (await bench.next(AgentSaid)).member == member(1)


async def test_a_route_that_the_table_of_policies_does_not_know_is_never_served(access: Access) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text="here")

    hub = hub_of(access, lambda _: None)
    with pytest.raises(RuntimeError, match="routes without a policy, which nobody could use: POST /novelty"):
        await hub.start("127.0.0.1", 0, lambda app: app.router.add_post("/novelty", answer))  # type: ignore[arg-type,return-value]
