"""One connection of an agent on a clock of the test's own, over a transport that only records."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from websockets.frames import Close, CloseCode
from websockets.protocol import Side
from weightsync.agents.link import connection as link_connection
from weightsync.agents.link.connection import ConnectionLost, DaemonConnection, NotConnected, RefusedForGood
from weightsync.orchestrator.protocol.codec import decode_from_agent, encode
from weightsync.orchestrator.protocol.limits import MAX_FRAME_BYTES
from weightsync.orchestrator.protocol.messages import (
    FromDaemon,
    Heartbeat,
    HubRendezvous,
    NixlSettings,
    Outcome,
    Ready,
    Refused,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Version
from weightsync.orchestrator.protocol.websocket import Endpoint

WELCOME = Welcome(
    epoch=1, journal_id="j", heartbeat_seconds=100.0, lost_after_heartbeats=3, transport=NixlSettings(),
    rendezvous=HubRendezvous(),
)  # fmt: skip
OUTCOME = Outcome(version=Version(1, 2), committed=True)


class RecordingTransport(asyncio.Transport):
    """Takes everything at once, unless ``waiting`` says otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.waiting = 0
        self.closing = False

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        pass

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += data

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def is_closing(self) -> bool:
        return self.closing

    def abort(self) -> None:
        self.closing = True

    close = abort


class Harness:
    """A connection, the daemon's side of it, and the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        self._now = float(round(loop.time()))  # whole seconds: sums of whole seconds are exact
        monkeypatch.setattr(loop, "time", lambda: self._now)
        self.transport = RecordingTransport()
        held = SimpleNamespace(transport=self.transport, protocol=asyncio.Protocol())
        response: Any = SimpleNamespace(connection=held, close=lambda: None)
        self.heard: list[FromDaemon] = []
        self.connection = DaemonConnection(response, self.heard.append)
        self.daemon = Endpoint(Side.SERVER, MAX_FRAME_BYTES)

    def say(self, message: FromDaemon) -> None:
        self.connection.data_received(self.daemon.message(encode(message)))

    def said(self) -> list[object]:
        """What the agent has sent since it was last asked."""
        sent, self.transport.sent = self.transport.sent, b""
        return [decode_from_agent(data) for data in self.daemon.receive(sent)]

    async def pass_time(self, seconds: float) -> None:
        self._now += seconds
        for _ in range(3):
            await asyncio.sleep(0)

    @property
    def reason(self) -> str:
        return str(self.connection.lost.exception()) if self.connection.lost.done() else ""


@pytest.fixture
async def harness(monkeypatch: pytest.MonkeyPatch) -> Harness:
    return Harness(monkeypatch)


async def test_welcome_says_after_how_many_heartbeats_silence_is_a_loss(harness: Harness) -> None:
    harness.say(WELCOME)
    for _ in range(3):
        await harness.pass_time(100)
        assert harness.said() == [Heartbeat()]
        assert harness.reason == ""
    await harness.pass_time(100)
    assert harness.reason == "it was silent for 400.0 s"
    assert harness.transport.closing


async def test_a_heartbeat_of_the_daemon_ends_its_silence_and_is_no_message(harness: Harness) -> None:
    harness.say(WELCOME)
    for _ in range(10):
        await harness.pass_time(100)
        harness.say(Heartbeat())
    assert harness.reason == ""
    assert harness.heard == [WELCOME]


async def test_a_process_that_stood_still_gives_the_daemon_one_more_interval(harness: Harness) -> None:
    harness.say(WELCOME)
    await harness.pass_time(10_000)
    assert harness.reason == ""
    await harness.pass_time(100)
    assert harness.reason == ""
    await harness.pass_time(100)
    assert harness.reason.startswith("it was silent for")


async def test_before_its_welcome_only_the_attempts_own_deadline_watches(harness: Harness) -> None:
    await harness.pass_time(10_000)
    assert harness.reason == ""
    assert not harness.connection.welcomed.done()
    assert harness.said() == []


async def test_no_heartbeat_is_sent_behind_what_is_not_taken(harness: Harness) -> None:
    harness.say(WELCOME)
    harness.transport.waiting = 1
    await harness.pass_time(100)
    assert harness.said() == []


async def test_a_second_welcome_changes_no_deadline_and_is_delivered(harness: Harness) -> None:
    harness.say(WELCOME)
    harness.say(WELCOME)
    assert harness.heard == [WELCOME, WELCOME]


async def test_a_violation_is_told_to_the_daemon_by_its_code(harness: Harness) -> None:
    harness.say(WELCOME)
    harness.connection.data_received(b"\x82\x80" + bytes(4))  # masked, as only a client's frames are
    assert harness.reason == "it broke the protocol: incorrect masking"
    assert harness.said() == []
    assert harness.daemon.peer_closed == Close(CloseCode.PROTOCOL_ERROR, "incorrect masking")
    harness.say(OUTCOME)
    assert harness.heard == [WELCOME]


async def test_refusals(harness: Harness) -> None:
    refused = Refused(reason="wrong run", fault="config", retry=False)
    harness.say(refused)
    assert isinstance(harness.connection.welcomed.exception(), RefusedForGood)
    harness.say(WELCOME)
    assert harness.heard == [], "the first reason is the one that counts"


async def test_the_queue_to_the_daemon_is_bounded(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_connection, "MAX_SEND_QUEUE_BYTES", 1000)
    harness.say(WELCOME)
    data = encode(Ready(fingerprint="x" * 500))
    harness.connection.send(data)
    harness.transport.waiting = 1000 - len(data)
    harness.connection.send(data)
    harness.transport.waiting += 1
    with pytest.raises(NotConnected, match="takes no messages"):
        harness.connection.send(data)
    assert isinstance(harness.connection.lost.exception(), ConnectionLost)
    assert harness.reason == f"it takes no messages: {1001 - len(data)} bytes wait for it"
    with pytest.raises(NotConnected, match="is ending"):
        harness.connection.send(data)
