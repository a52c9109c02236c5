"""Deadlines of a connection on a clock of the test's own, over a transport that takes what it is told to take."""

import asyncio

import pytest
from websockets.frames import CloseCode
from websockets.protocol import Side
from weightsync.orchestrator.daemon.access.access import Claim
from weightsync.orchestrator.daemon.hub import connection as hub_connection
from weightsync.orchestrator.daemon.hub.connection import AgentConnection, HubTiming, Stage
from weightsync.orchestrator.protocol.proof import Challenge
from weightsync.orchestrator.protocol.websocket import message_frame
from weightsync.orchestrator.settings.credentials import Credential

CLAIM = Claim("engine-0123456789", Credential("engine"), Challenge("run", "ab" * 32, "cd" * 32, b""))
TIMING = HubTiming(heartbeat_seconds=1.0, missed_heartbeats=3, hello_seconds=1.0, close_seconds=1.0)


class Transport(asyncio.Transport):
    """Buffers everything; ``waiting`` is what has not been taken."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = 0
        self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.waiting += len(data)

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        pass

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True


@pytest.fixture
async def transport() -> Transport:
    return Transport()


@pytest.fixture
async def connection(transport: Transport) -> AgentConnection:
    return AgentConnection(1, "peer", CLAIM, transport, asyncio.Protocol(), lambda *_: None, lambda *_: None)


async def test_a_peer_that_takes_nothing_is_slow_after_its_heartbeats(
    connection: AgentConnection, transport: Transport
) -> None:
    start = connection.heard_at
    connection.write(bytes(100))
    for now in (start, start + 2.9):
        assert connection.overdue(now, TIMING) == ""
    connection.heard_at = start + 3.0  # It does say something.
    assert connection.overdue(start + 3.1, TIMING) == "slow: took none of 100 waiting bytes for 3.1 s"


async def test_a_peer_that_takes_little_by_little_is_not_slow(
    connection: AgentConnection, transport: Transport
) -> None:
    start = connection.heard_at
    connection.write(bytes(100))
    for seconds in range(20):
        transport.waiting -= 1
        connection.heard_at = start + seconds
        assert connection.overdue(start + seconds, TIMING) == ""


async def test_what_was_taken_long_ago_does_not_count_against_what_was_just_sent(
    connection: AgentConnection, transport: Transport
) -> None:
    start = connection.heard_at
    connection.heard_at = start + 100
    assert connection.overdue(start + 100, TIMING) == ""
    connection.write(bytes(100))
    assert connection.overdue(start + 101, TIMING) == ""


async def test_a_hub_that_stood_still_blames_nobody(connection: AgentConnection) -> None:
    start = connection.heard_at
    connection.write(bytes(100))
    connection.excuse(start + 10)
    assert connection.overdue(start + 12.9, TIMING) == ""
    assert connection.overdue(start + 13.1, TIMING).startswith("silent for 3.1 s")


async def test_the_send_queue_is_bounded(connection: AgentConnection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_connection, "MAX_SEND_QUEUE_BYTES", 1000)
    assert connection.write(bytes(600))
    assert not connection.write(bytes(600))
    assert connection.write(bytes(400))


async def test_an_end_has_a_deadline(connection: AgentConnection, transport: Transport) -> None:
    connection.end(CloseCode.NORMAL_CLOSURE, "bye", close_seconds=0.0)
    assert connection.stage is Stage.ENDED
    assert transport.waiting > 0
    ended = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(0.001, ended.set_result, None)
    await ended
    assert transport.aborted


async def test_whatever_breaks_at_a_message_ends_this_connection(transport: Transport) -> None:
    ended: list[tuple[int, str]] = []

    def breaks(_: AgentConnection, data: bytes) -> None:
        raise RuntimeError(f"a bug at {len(data)} bytes")

    connection = AgentConnection(
        1, "peer", CLAIM, transport, asyncio.Protocol(), breaks, lambda _, code, reason: ended.append((code, reason))
    )
    connection.data_received(message_frame(b"hello", Side.CLIENT))
    assert ended == [(CloseCode.INTERNAL_ERROR, "handling its message broke: RuntimeError('a bug at 5 bytes')")]
