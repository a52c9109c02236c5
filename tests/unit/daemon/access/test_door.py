"""What strangers can do to the door, over real sockets, and that honest peers come in meanwhile."""

import asyncio
import contextlib
import errno
import gc
import os
import socket
import ssl
import weakref
from asyncio import sslproto
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog
from aiohttp import web
from credentials import TOKENS, open_agent, write_credentials
from weightsync.agents.link.client import Backoff, ControlClient
from weightsync.orchestrator.cli.certs import make_certificates
from weightsync.orchestrator.core.events import AgentConnected, Event
from weightsync.orchestrator.daemon.access import door as doors
from weightsync.orchestrator.daemon.access import tls as tls_module
from weightsync.orchestrator.daemon.access.access import Access
from weightsync.orchestrator.daemon.access.door import Door, DoorLimits
from weightsync.orchestrator.daemon.access.pace import PaceLimits
from weightsync.orchestrator.daemon.access.tls import ServerTls
from weightsync.orchestrator.daemon.hub.connection import HubTiming
from weightsync.orchestrator.daemon.hub.hub import AGENTS_PATH, Hub
from weightsync.orchestrator.protocol.codec import encode
from weightsync.orchestrator.protocol.limits import SCHEMA_VERSION
from weightsync.orchestrator.protocol.messages import Hello, HubRendezvous, NixlSettings, Welcome
from weightsync.orchestrator.protocol.names import Member
from weightsync.orchestrator.settings.sections import ListenTls
from weightsync.orchestrator.settings.tls import client_context

SECONDS = 20.0
WELCOME = Welcome(
    epoch=1, journal_id="j", heartbeat_seconds=5.0, lost_after_heartbeats=3, transport=NixlSettings(),
    rendezvous=HubRendezvous(),
)  # fmt: skip
WRONG = b"GET /status HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer no\r\nConnection: close\r\n\r\n"
HALF = b"GET /status HTTP/1.1\r\nHost: x\r\nX-Never: "


class House:
    """A hub with a door of few places."""

    def __init__(self, hub: Hub, port: int) -> None:
        self.hub, self.port = hub, port
        self.events: list[Event] = []
        self.sockets: list[socket.socket] = []

    @property
    def door(self) -> Door:
        assert self.hub._door is not None
        return self.hub._door

    async def half_open(self, said: bytes = HALF, address: str = "127.0.0.1") -> socket.socket:
        found = socket.socket()
        self.sockets.append(found)
        found.setblocking(False)
        found.bind((address, 0))
        loop = asyncio.get_running_loop()
        await loop.sock_connect(found, ("127.0.0.1", self.port))
        with contextlib.suppress(OSError):
            await loop.sock_sendall(found, said)
        return found

    async def strangers(self, number: int) -> None:
        """Wait until there are so many: what was sent to the daemon has no other event."""
        async with asyncio.timeout(SECONDS):
            while self.door.strangers != number:  # noqa: ASYNC110  # as said
                await asyncio.sleep(0)

    async def ask(self, who: str = "viewer", tls: Any = True) -> int:
        scheme = "http" if tls is True else "https"
        headers = {"Authorization": f"Bearer {TOKENS[who]}"} if who else {}
        async with aiohttp.ClientSession() as session:
            url = f"{scheme}://127.0.0.1:{self.port}/status"
            async with session.get(url, headers=headers, ssl=tls) as response:
                return response.status


async def ended(peer: socket.socket) -> bytes:
    """What is still read from it until its end."""
    loop, data = asyncio.get_running_loop(), b""
    async with asyncio.timeout(SECONDS):
        with contextlib.suppress(ConnectionError):
            while more := await loop.sock_recv(peer, 65536):
                data += more
    return data


@contextlib.asynccontextmanager
async def house(tmp_path: Path, tls: ServerTls | None = None, **limits: Any) -> AsyncIterator[House]:
    bounds = replace(DoorLimits(), **limits)
    access = Access(write_credentials(tmp_path / "credentials"), "run", str, tls, bounds)
    numbers = iter(range(1, 10_000))
    events: list[Event] = []
    hub = Hub(access=access, post=events.append, next_id=numbers.__next__, timing=HubTiming(1.0, 3, 10.0, 0.1))

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=b"x" * 50_000_000)

    async def short(_: web.Request) -> web.Response:
        return web.Response()

    async def page(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        return web.Response(body=b"x" * doors.SMALL_BYTES)

    def configure(app: web.Application) -> None:
        app.router.add_get("/status", short)
        app.router.add_get("/healthz", short)
        app.router.add_get("/metrics", page)
        app.router.add_get("/plan/layouts", answer)

    made = House(hub, await hub.start("127.0.0.1", 0, configure))
    made.events = events
    try:
        yield made
    finally:
        for peer in made.sockets:
            peer.close()
        await hub.close()


async def test_half_a_request_is_ended_when_its_time_is_over_whatever_it_drips(tmp_path: Path) -> None:
    async with house(tmp_path, stranger_seconds=0.2) as made:
        with structlog.testing.capture_logs() as logs:
            silent, half = await made.half_open(b"G"), await made.half_open()
            polite = await made.half_open(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 9)  # and is answered once
            assert await ended(silent) == b""
            assert await ended(half) == b""
            assert (await ended(polite)).count(b"HTTP/1.1 200 OK") == 1
        assert {line["event"] for line in logs} == {"a stranger has shown nothing"}
        assert made.door.strangers == 0


async def test_a_credential_gives_a_request_its_own_time_and_no_more(tmp_path: Path) -> None:
    """A slow reader with a viewer's token is dropped."""
    async with house(tmp_path, request_seconds=0.2) as made:
        request = f"GET /plan/layouts HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKENS['viewer']}\r\n\r\n"
        with structlog.testing.capture_logs() as logs:
            reader = await made.half_open(request.encode())
            async with asyncio.timeout(SECONDS):
                while not logs:  # noqa: ASYNC110  # it reads nothing, and the log has no event to wait for
                    await asyncio.sleep(0.001)
        assert [line["event"] for line in logs] == ["a request takes too long"]
        assert len(await ended(reader)) < 50_000_000
        assert made.door.strangers == 0


async def asked(made: House, path: str, more: str = "") -> socket.socket:
    """A viewer who asks and reads nothing, with the smallest window."""
    peer = socket.socket()
    made.sockets.append(peer)
    peer.setblocking(False)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(peer, ("127.0.0.1", made.port))
    bearer = f"Authorization: Bearer {TOKENS['viewer']}\r\n{more}"
    await loop.sock_sendall(peer, f"GET {path} HTTP/1.1\r\nHost: x\r\n{bearer}\r\n".encode())
    return peer


@pytest.mark.parametrize("with_tls", [False, True])
async def test_what_a_stolen_viewers_token_has_us_keep_unread_is_bounded(tmp_path: Path, with_tls: bool) -> None:
    """Answers of 50 MB of which there is room for two beside the first."""
    tls = of_run(tmp_path / "certificates") if with_tls else None
    async with house(tmp_path, tls, unread_bytes=100_000_000) as made, aiohttp.ClientSession() as session:
        context: Any = client_context(tmp_path / "certificates" / "ca.pem", None, None) if with_tls else True
        url = f"http{'s' * with_tls}://127.0.0.1:{made.port}/plan/layouts"
        headers = {"Authorization": f"Bearer {TOKENS['viewer']}"}
        open_ones = [await session.get(url, headers=headers, ssl=context) for _ in range(2)]
        assert [one.status for one in open_ones] == [200, 200]
        async with session.get(url, headers=headers, ssl=context) as third:
            assert (third.status, third.headers["Retry-After"]) == (503, "2")
            assert "there is no room for more" in await third.text()
        async with session.get(url.replace("plan/layouts", "status"), headers=headers, ssl=context) as small:
            assert small.status == 200
        assert len(await open_ones[0].read()) == 50_000_000
        async with asyncio.timeout(SECONDS):  # it has been read, and its connection ends
            while (again := await session.get(url, headers=headers, ssl=context)).status != 200:
                made.door.sweep()
        again.close()
        open_ones[1].close()


async def test_one_that_is_told_to_close_and_reads_nothing_has_its_time_and_no_more(tmp_path: Path) -> None:
    """What is left of its answer keeps the connection open, although both have agreed to end it."""
    async with house(tmp_path, request_seconds=0.3) as made:
        peer = await asked(made, "/metrics", "Connection: close\r\n")
        async with asyncio.timeout(SECONDS):
            while not any(v.transport and v.transport.is_closing() for v in made.door._visitors.values()):  # noqa: ASYNC110
                await asyncio.sleep(0)  # no event tells that the daemon has answered
            (visitor,) = made.door._visitors.values()
            assert visitor.transport is not None
            assert visitor.transport.get_write_buffer_size() > 0
            made.door.sweep()
            assert made.door._visitors, "it is not forgotten"
            while made.door._visitors:  # noqa: ASYNC110  # ended by the door's own clock
                await asyncio.sleep(0.001)
        assert visitor.transport.get_write_buffer_size() == 0
        await ended(peer)


async def test_one_address_has_only_so_many_strangers_and_others_come_in(tmp_path: Path) -> None:
    async with house(tmp_path, strangers=8, from_one_address=4) as made:
        for _ in range(4):
            await made.half_open(address="127.0.0.2")
        await made.strangers(4)
        with structlog.testing.capture_logs() as logs:
            for _ in range(300):
                await made.half_open(address="127.0.0.2")
            assert await ended(made.sockets[-1]) == b""
            assert await made.ask() == 200
        assert made.door.strangers == 4
        assert len([line for line in logs if line["event"] == "connection turned away"]) == 3
        assert logs[0]["reason"] == "4 strangers from this address"


async def test_when_all_places_are_taken_the_oldest_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with house(tmp_path, strangers=4, from_one_address=4, chance_seconds=0.0) as made:
        monkeypatch.setattr(made.door, "limits", replace(made.door.limits, from_one_address=99))
        first = [await made.half_open() for _ in range(4)]
        await made.strangers(4)
        assert await made.ask() == 200
        assert await ended(first[0]) == b""
        assert made.door.strangers == 3


async def test_a_newcomer_does_not_push_out_those_who_only_just_came(tmp_path: Path) -> None:
    async with house(tmp_path, strangers=4, chance_seconds=60.0) as made:
        for _ in range(4):
            await made.half_open()
        await made.strangers(4)
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            await made.ask()
        made.sockets.pop(0).close()  # one that leaves gives its place back
        await asyncio.sleep(0)
        async with asyncio.timeout(SECONDS):
            while True:
                with contextlib.suppress(aiohttp.ClientError, ConnectionError):
                    assert await made.ask() == 200
                    break


async def test_an_address_with_few_strangers_comes_in_at_once_where_another_has_many(tmp_path: Path) -> None:
    """However often that one comes again, and however short all have been there."""
    async with house(tmp_path, strangers=8, chance_seconds=60.0) as made:
        for _ in range(8):
            await made.half_open(address="127.0.0.2")
        await made.strangers(8)
        first = made.sockets[0]
        for _ in range(3):
            await made.half_open(address="127.0.0.3")
        assert await ended(first) == b""
        assert await made.ask() == 200
        await made.half_open(address="127.0.0.3")
        await made.strangers(8)
        began = asyncio.get_running_loop().time()
        assert await ended(await made.half_open(address="127.0.0.2")) == b"", "it has more than its share"
        assert asyncio.get_running_loop().time() - began < made.door.limits.stranger_seconds / 2, "at once"


async def test_beyond_its_pace_it_serves_those_who_had_few(tmp_path: Path) -> None:
    pace = PaceLimits(burst=4, a_second=0.001, besieged=0.0, few=2, while_seconds=3600.0)
    async with house(tmp_path, pace=pace) as made:
        for _ in range(4):
            await made.half_open(address="127.0.0.2")
        await made.strangers(4)
        with structlog.testing.capture_logs() as logs:
            assert await ended(await made.half_open(address="127.0.0.2")) == b""
            assert logs[0]["reason"] == doors.TOO_MANY
            for _ in range(50):
                assert await made.ask() == 200, "a credential gives the place in the pace back"
        await made.half_open(address="127.0.0.3")
        began = asyncio.get_running_loop().time()
        assert await ended(await made.half_open(address="127.0.0.2")) == b""
        assert asyncio.get_running_loop().time() - began < made.door.limits.stranger_seconds / 2, "at once"


def agent(port: int, token: Path, rank: int, world: int, arrived: set[int]) -> ControlClient:
    """One that comes again soon when it is turned away, and is among those that ``arrived`` once it is taken in."""
    member = Member("inference", "engine", rank)
    said = Hello(schema=SCHEMA_VERSION, run_id="run", member=member, world=world, incarnation=rank)
    backoff = Backoff(first=0.01, longest=0.05)
    url = f"ws://127.0.0.1:{port}{AGENTS_PATH}"
    return ControlClient(url, token, lambda: said, lambda _: arrived.add(rank), backoff=backoff)


async def test_agents_come_in_through_a_flood(tmp_path: Path) -> None:
    """Sixteen of one host, while strangers of many addresses come as fast as they are ended."""
    pace = PaceLimits(burst=32, a_second=0.001, besieged=0.0, few=2, beyond=100.0, while_seconds=3600.0)
    async with house(tmp_path, pace=pace) as made:
        arrived: set[int] = set()
        token = tmp_path / "credentials" / "engine.token"

        async def stranger(number: int) -> None:
            while True:
                peer = await made.half_open(WRONG, f"127.0.{number}.1")
                await ended(peer)
                made.sockets.remove(peer)
                peer.close()

        strangers = [asyncio.create_task(stranger(number)) for number in range(1, 33)]
        async with asyncio.timeout(SECONDS):
            while not made.door._pace.is_besieged:  # noqa: ASYNC110  # it has no event
                await asyncio.sleep(0)
            clients = [agent(made.port, token, rank, 16, arrived) for rank in range(16)]
            running = [asyncio.create_task(client.run()) for client in clients]
            accepted = 0
            while len(arrived) < 16:
                for event in made.events[accepted:]:
                    accepted += 1
                    if isinstance(event, AgentConnected):
                        made.hub.accept(event.member, event.connection, WELCOME)
                await asyncio.sleep(0)
            assert made.door._pace.is_besieged
            for task in strangers:
                task.cancel()
            for client in clients:
                await client.close()
            await asyncio.gather(*running)
            await asyncio.gather(*strangers, return_exceptions=True)


async def test_while_more_come_than_are_served_there_is_a_rest_between_two_batches(tmp_path: Path) -> None:
    async with house(tmp_path) as made:
        (listening,) = made.door._listening
        loop = asyncio.get_running_loop()
        made.door._accept(listening)
        assert loop.remove_reader(listening.fileno()), "it listens on"
        made.door._pace.is_besieged = True
        made.door._accept(listening)
        assert not loop.remove_reader(listening.fileno()), "it rests"
        assert await made.ask() == 200, "and looks again"


async def test_a_connection_that_says_nothing_stays_with_the_kernel(tmp_path: Path) -> None:
    async with house(tmp_path) as made:
        silent = await made.half_open(b"")
        assert await made.ask() == 200, "who came later"
        assert made.door.strangers == 0
        await asyncio.get_running_loop().sock_sendall(silent, HALF)
        await made.strangers(1)


def test_where_the_kernel_would_turn_others_away_for_those_it_comes_to_the_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cookies, seconds in (("1\n", True), ("0\n", False), (None, False)):
        monkeypatch.setattr(doors, "SYN_COOKIES", tmp_path / "absent")
        if cookies is not None:
            (tmp_path / "cookies").write_text(cookies)
            monkeypatch.setattr(doors, "SYN_COOKIES", tmp_path / "cookies")
        with doors._listening(socket.AF_INET, ("127.0.0.1", 0)) as listening:
            assert (listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT) > 0) is seconds


async def test_a_flood_does_not_keep_the_loop_from_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those who wait in the kernel's queue only a few are taken in one turn of the loop."""
    async with house(tmp_path, strangers=4, from_one_address=4) as made:
        (listening,) = made.door._listening
        asyncio.get_running_loop().remove_reader(listening)
        for _ in range(3 * doors.ACCEPTED_AT_ONCE):
            await made.half_open(b"G")
        arrived: list[object] = []
        monkeypatch.setattr(made.door, "_arrive", lambda connected, peer: (connected.close(), arrived.append(peer)))
        for turn in range(1, 4):
            made.door._accept(listening)
            assert len(arrived) == turn * doors.ACCEPTED_AT_ONCE


async def test_want_of_descriptors_makes_the_door_rest_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doors, "REST_SECONDS", 0.05)
    async with house(tmp_path) as made:
        (real,) = made.door._listening
        loop, failures = asyncio.get_running_loop(), 2

        class Poor:
            """The listening socket of a process without descriptors."""

            def accept(self) -> Any:
                nonlocal failures
                if failures:
                    failures -= 1
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                return real.accept()

            def fileno(self) -> int:
                return real.fileno()

            def close(self) -> None:
                real.close()

        poor = Poor()
        made.door._listening[:] = [poor]  # type: ignore[list-item]
        loop.remove_reader(real)
        loop.add_reader(poor.fileno(), made.door._accept, poor)
        with structlog.testing.capture_logs() as logs:
            assert await made.ask() == 200
        assert [(line["event"], line["reason"]) for line in logs] == [
            ("connections cannot be accepted", "[Errno 24] Too many open files")
        ] * 2


async def test_what_is_no_http_is_a_few_lines_of_log(tmp_path: Path) -> None:
    async with house(tmp_path) as made:
        with structlog.testing.capture_logs() as logs:
            for said in [b"GET /status HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 20_000, b"GET /\x00 HTTP/9.x\r\n\r\n"] * 10:
                await ended(await made.half_open(said + b"\r\n\r\n"))
        assert {line["event"] for line in logs} == {"request turned away: no HTTP"}
        assert len(logs) == 3
        assert "LineTooLong" in logs[0]["reason"]


async def test_who_claims_a_token_and_proves_nothing_is_a_few_lines_of_log(tmp_path: Path) -> None:
    async with house(tmp_path) as made, aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{made.port}{AGENTS_PATH}"
        with structlog.testing.capture_logs() as logs:
            for _ in range(8):
                liar = await open_agent(session, url, TOKENS["engine"])
                await liar.raw.send_bytes(b"x" * 100)
                assert (await liar.receive()).type is aiohttp.WSMsgType.CLOSE
        assert [line["event"] for line in logs] == ["agent turned away: it has proved nothing"] * 3


async def test_a_door_that_closes_leaves_no_socket_behind(tmp_path: Path) -> None:
    """Whoever was accepted in the turn before has no transport yet."""
    async with house(tmp_path) as made:
        (listening,) = made.door._listening
        loop = asyncio.get_running_loop()
        loop.remove_reader(listening)
        peer = await made.half_open(b"G")
        made.door._accept(listening)
        assert made.door.strangers == 1
        await made.door.close()
        assert await ended(peer) == b""


async def test_an_agent_that_has_proved_itself_is_no_stranger(tmp_path: Path) -> None:
    async with house(tmp_path, stranger_seconds=0.3) as made, aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{made.port}{AGENTS_PATH}"
        quiet = await open_agent(session, url, TOKENS["engine"])
        honest = await open_agent(session, url, TOKENS["engine"])
        member = Member("inference", "engine", 0)
        said = Hello(schema=SCHEMA_VERSION, run_id="run", member=member, world=8, incarnation=7)
        await made.strangers(2)
        await honest.send_bytes(encode(said))
        await made.strangers(1)
        assert isinstance(made.events[0], AgentConnected)
        async with asyncio.timeout(SECONDS):
            assert (await quiet.receive()).type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSE)
        assert not honest.closed
        assert made.door.strangers == 0
        await honest.close()


async def test_a_fleet_that_comes_at_once_from_one_address_comes_in_by_turns(tmp_path: Path) -> None:
    """More agents than one address has places for: those that are turned away come again, as agents do."""
    async with house(tmp_path, from_one_address=16) as made:
        arrived: set[int] = set()
        token = tmp_path / "credentials" / "engine.token"

        clients = [agent(made.port, token, rank, 100, arrived) for rank in range(100)]
        running = [asyncio.create_task(client.run()) for client in clients]
        accepted = 0
        async with asyncio.timeout(SECONDS):
            while len(arrived) < 100:
                for event in made.events[accepted:]:
                    accepted += 1
                    if isinstance(event, AgentConnected):
                        made.hub.accept(event.member, event.connection, WELCOME)
                await asyncio.sleep(0)
            for client in clients:
                await client.close()
            await asyncio.gather(*running)


async def test_descriptors_are_kept_for_the_daemon_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with house(tmp_path) as made:
        monkeypatch.setattr(doors, "limit", lambda: doors.RESERVE + 2)
        first = [await made.half_open() for _ in range(2)]
        await made.strangers(2)
        with structlog.testing.capture_logs() as logs:
            assert await ended(await made.half_open()) == b""
        assert logs[0]["reason"] == f"all {doors.RESERVE + 2} descriptors but {doors.RESERVE} are in use"
        first[0].close()
        await asyncio.sleep(0)
        async with asyncio.timeout(SECONDS):
            while True:
                with contextlib.suppress(aiohttp.ClientError, ConnectionError):
                    assert await made.ask() == 200
                    break


async def test_an_agent_before_its_proof_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the door's and the hub's at the same time, and has one descriptor."""
    async with house(tmp_path) as made, aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{made.port}{AGENTS_PATH}"
        monkeypatch.setattr(doors, "limit", lambda: doors.RESERVE + 3)
        agents = [await open_agent(session, url, TOKENS["engine"]) for _ in range(2)]
        assert made.door.strangers == 2
        assert await made.ask() == 200
        for agent in agents:
            await agent.close()


def of_run(certificates: Path) -> ServerTls:
    make_certificates(certificates, ["127.0.0.1"], (), 2)
    return ServerTls(ListenTls(
        certificate_file=certificates / "daemon.pem", key_file=certificates / "daemon.key",
        ca_file=certificates / "ca.pem",
    ))  # fmt: skip


def client_hello() -> bytes:
    """The first thing that a client of TLS says."""
    said, context = ssl.MemoryBIO(), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client = context.wrap_bio(ssl.MemoryBIO(), said, server_hostname="x")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return said.read()


async def test_half_a_handshake_is_a_stranger_as_any_other(tmp_path: Path) -> None:
    """It has made us compute, and gives way all the same; who is honest comes in."""
    certificates = tmp_path / "certificates"
    async with house(tmp_path, of_run(certificates), strangers=8, from_one_address=8) as made:
        half = [await made.half_open(client_hello(), address=f"127.0.0.{2 + number % 2}") for number in range(8)]
        for peer in half:  # each has the daemon's answer, and says nothing to it
            assert await asyncio.get_running_loop().sock_recv(peer, 1) == b"\x16"
        assert made.door.strangers == 8
        assert await made.ask(tls=client_context(certificates / "ca.pem", None, None)) == 200
        await ended(half[0])  # the oldest of the addresses that held the most
        await made.strangers(7)


@pytest.mark.parametrize("how", ["no handshake", "given up by the door"])
async def test_a_handshake_that_fails_leaves_its_memory_to_nobody(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """70 kB each: what the garbage collector would find only when it has looked through everything else."""
    made_of: weakref.WeakSet[sslproto.SSLProtocol] = weakref.WeakSet()

    class Seen(sslproto.SSLProtocol):
        def __init__(self, *given: Any, **more: Any) -> None:
            made_of.add(self)
            super().__init__(*given, **more)

    tls = of_run(tmp_path / "certificates")
    monkeypatch.setattr(sslproto, "SSLProtocol", Seen)
    async with house(tmp_path, tls) as made:
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                peer = await made.half_open(b"no handshake" if how == "no handshake" else client_hello())
                if how != "no handshake":
                    await asyncio.get_running_loop().sock_recv(peer, 1)
                    assert len(made_of) == 1
                    made.door._end(next(iter(made.door._visitors.values())))
                await ended(peer)
            async with asyncio.timeout(SECONDS):
                while made_of:  # noqa: ASYNC110  # the transport's end is the loop's next turn
                    await asyncio.sleep(0)
        finally:
            gc.enable()


async def test_with_tls_there_are_fewer_strangers_and_a_dearer_key_makes_fewer_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls, plain = of_run(tmp_path / "certificates"), DoorLimits()
    access = Access(write_credentials(tmp_path / "credentials"), "run", str, tls)
    hub = Hub(access=access, post=lambda _: None, next_id=lambda: 1, timing=HubTiming(1.0, 3, 10.0, 0.1))
    await hub.start("127.0.0.1", 0)
    try:
        door = hub._door
        assert door is not None
        assert door.limits == plain.of_dearer(tls.price()) != plain
        assert door.limits.strangers <= plain.strangers / 2
        monkeypatch.setattr(tls_module, "handshake_seconds", lambda _: 10 * tls_module.CHEAP_SECONDS)
        await access.again()  # SIGHUP, after the key was replaced by one of RSA
        assert door.limits == plain.of_dearer(10 * tls_module.PRICE)
        assert (door.limits.strangers, door.limits.from_one_address) == (102, 102)
        assert door._pace.limits == door.limits.pace == plain.pace.of_dearer(20.0)
    finally:
        await hub.close()


async def test_handshakes_have_their_time_too_and_what_comes_behind_them_is_not_lost(tmp_path: Path) -> None:
    certificates = tmp_path / "certificates"
    async with house(tmp_path, of_run(certificates), stranger_seconds=0.5) as made:
        silent, plain = await made.half_open(b"\x16"), await made.half_open(HALF)
        context = client_context(certificates / "ca.pem", None, None)
        for _ in range(20):  # the request comes in one piece with the client's last word of the handshake, or not
            assert await made.ask(tls=context) == 200
        assert await made.ask("engine", tls=context) == 403
        assert await ended(silent) == b""
        assert b"200" not in await ended(plain)
        async with asyncio.timeout(SECONDS):
            while made.door.strangers:  # noqa: ASYNC110  # ended by the door's own clock
                await asyncio.sleep(0.001)


async def test_a_flood_is_a_few_lines_of_log(tmp_path: Path) -> None:
    """500 wrong tokens and 500 half requests, and a viewer who is answered in between."""
    async with house(tmp_path, strangers=64, from_one_address=64) as made:
        with structlog.testing.capture_logs() as logs:
            for number in range(500):
                await made.half_open(address="127.0.0.3")
                await made.half_open(WRONG, address="127.0.0.2")
                if number % 50 == 0:
                    assert await made.ask() == 200
                for peer in made.sockets[:-100]:
                    peer.close()
                del made.sockets[:-100]
        assert 0 < len(logs) < 20
        assert made.door.strangers <= 64
