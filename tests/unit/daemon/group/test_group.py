"""The tcpstore rendezvous for the runner: what is gathered becomes events, what fails sends everybody home."""

import asyncio
from collections.abc import Callable, Mapping

import pytest
from weightsync.orchestrator.core.events import AgentLost, AgentSaid, Event
from weightsync.orchestrator.daemon.group import child as tcpstore
from weightsync.orchestrator.daemon.group.child import TcpStoreError
from weightsync.orchestrator.daemon.group.group import Group
from weightsync.orchestrator.daemon.inbox import Inbox
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.messages import Announce, Connect, Ready, TcpStoreRendezvous
from weightsync.orchestrator.protocol.names import Member

TRAINER, ENGINE, STRANGER = Member("trainer", "", 0), Member("inference", "e0", 0), Member("inference", "e1", 0)
MEMBERS = {TRAINER: 11, ENGINE: 12}
STORE = TcpStoreRendezvous("127.0.0.1", 1, 0, 3, 30.0)


def connect(name: str) -> Connect:
    return Connect(fingerprint=name, root="root", peers=(), copies=b"", expected_bytes=0)


class Server:
    """In the place of the child's side: everybody says at once what they are to say."""

    fails_at = ""
    made: "list[Server]" = []  # noqa: RUF012  (one list for all of a test's)

    def __init__(self, info: TcpStoreRendezvous) -> None:
        self.calls: list[str] = []
        self.delivered: Mapping[int, Connect] = {}
        self.done = asyncio.Event()
        Server.made.append(self)

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails_at:
            raise TcpStoreError(f"{name} did not work")

    async def start(self, world: int) -> None:
        self._call("start")

    async def gather_announces(self) -> dict[int, Announce]:
        self._call("gather_announces")
        return {rank: Announce(layout=Layout((), (), b""), endpoint_name=f"rank {rank}") for rank in (1, 2)}

    async def deliver(self, connects: Mapping[int, Connect]) -> None:
        self._call("deliver")
        self.delivered = dict(connects)

    async def gather_ready(self) -> dict[int, Ready]:
        self._call("gather_ready")
        return {rank: Ready(fingerprint=f"edges of {rank}") for rank in (1, 2)}

    async def barrier(self) -> None:
        self._call("barrier")

    async def close(self) -> None:
        self.calls.append("close")
        self.done.set()


class Around:
    """A group and what it does to the core and to the hub."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.dropped: dict[Member, str] = {}
        self.inbox = Inbox(self.events.extend)
        self.group = Group(self.inbox, self._drop)

    def _drop(self, member: Member, connection: int, reason: str) -> bool:
        assert connection == MEMBERS[member]
        self.dropped[member] = reason
        return True

    def said(self, kind: type) -> list[tuple[Member, int]]:
        words = [event for event in self.events if isinstance(event, AgentSaid)]
        return [(word.member, word.connection) for word in words if isinstance(word.message, kind)]


@pytest.fixture
def around(monkeypatch: pytest.MonkeyPatch) -> Around:
    monkeypatch.setattr(tcpstore, "TcpStoreRendezvousServer", Server)
    Server.fails_at, Server.made = "", []
    return Around()


async def turns(holds: Callable[[], object]) -> None:
    """Let the loop turn until ``holds``."""
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0)
    raise AssertionError("the loop turns in vain")


async def finished(number: int = 0) -> Server:
    """The server of a group that has ended."""
    await turns(lambda: len(Server.made) > number)
    await asyncio.wait_for(Server.made[number].done.wait(), 10)
    await asyncio.sleep(0)  # what was posted last is decided in a turn of its own
    return Server.made[number]


async def test_what_is_gathered_is_said_by_the_members(around: Around) -> None:
    around.group.open(STORE, MEMBERS)
    assert around.group.deliver(TRAINER, connect("a"))
    assert around.group.deliver(ENGINE, connect("b"))
    server = await finished()
    assert around.said(Announce) == around.said(Ready) == [(TRAINER, 11), (ENGINE, 12)]
    assert server.delivered == {1: connect("a"), 2: connect("b")}
    assert server.calls == ["start", "gather_announces", "deliver", "gather_ready", "barrier", "close"]
    assert around.dropped == {}


async def test_nothing_is_delivered_before_everybody_has_a_plan(around: Around) -> None:
    around.group.open(STORE, MEMBERS)
    around.group.deliver(TRAINER, connect("a"))
    await turns(lambda: around.said(Announce))
    assert Server.made[0].calls == ["start", "gather_announces"]
    await around.group.close()
    assert Server.made[0].calls[-1] == "close"


def test_others_are_not_the_groups_affair() -> None:
    assert not Around().group.deliver(STRANGER, connect("c"))


@pytest.mark.parametrize("call", ["start", "gather_announces", "deliver", "gather_ready", "barrier"])
async def test_a_failure_ends_everybodys_connection(around: Around, call: str) -> None:
    """They say Hello again, and the core opens a new group."""
    Server.fails_at = call
    around.group.open(STORE, MEMBERS)
    for member in MEMBERS:
        around.group.deliver(member, connect(str(member)))
    await finished()
    lost = [(event.member, event.connection) for event in around.events if isinstance(event, AgentLost)]
    assert lost == list(MEMBERS.items())
    assert set(around.dropped) == set(MEMBERS)
    assert f"{call} did not work" in around.dropped[TRAINER]


async def test_so_does_a_deadline(around: Around) -> None:
    around.group.open(TcpStoreRendezvous("127.0.0.1", 1, 0, 3, 0.01), MEMBERS)
    await finished()
    assert "its deadline passed" in around.dropped[ENGINE]


async def test_a_new_group_ends_the_old_one_first(around: Around) -> None:
    around.group.open(STORE, MEMBERS)
    await turns(lambda: around.said(Announce))
    around.group.open(STORE, {TRAINER: 21, ENGINE: 22})
    for member in MEMBERS:
        around.group.deliver(member, connect(str(member)))
    await finished(1)
    assert Server.made[0].calls == ["start", "gather_announces", "close"]
    assert around.said(Ready) == [(TRAINER, 21), (ENGINE, 22)]
    assert around.dropped == {}, "it was replaced, and has not failed"
    assert isinstance(around.events[0], AgentSaid)


async def test_a_child_that_cannot_be_started_is_such_a_failure(
    around: Around, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_process(_: Server, world: int) -> None:
        raise OSError("out of processes")

    monkeypatch.setattr(Server, "start", no_process)
    around.group.open(STORE, MEMBERS)
    await finished()
    assert set(around.dropped) == set(MEMBERS)
    assert "out of processes" in around.dropped[TRAINER]
    assert around.inbox.failure is None
