"""What binds an agent: the highest epoch that it obeyed, one journal per epoch, its process's incarnation."""

import asyncio
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from weightsync.agents.errors import AgentError
from weightsync.agents.link.connection import NotObeyed
from weightsync.agents.link.introduction import Identity
from weightsync.agents.link.thread import AgentThread, ControlAddress
from weightsync.agents.memory.nic import NicError
from weightsync.orchestrator.protocol.edges import EdgeFailure
from weightsync.orchestrator.protocol.findings import Finding
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.messages import (
    Announce,
    Closed,
    Connect,
    Examined,
    Fault,
    FromAgent,
    FromDaemon,
    HubRendezvous,
    NixlSettings,
    Ready,
    TcpStoreRendezvous,
    TrainerStatus,
    Verify,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Member, RoundName, Version

MEMBER = Member("trainer", "", 0)


class Hopeless(AgentError):
    fault: Fault = "daemon"


class Side:
    """A side that writes down what it is asked; ``failed`` is what ``connect`` returns."""

    def __init__(self) -> None:
        self.welcomes: list[Welcome] = []
        self.connects: list[Connect] = []
        self.words: list[FromDaemon] = []
        self.failed: dict[Member, Exception] = {}
        self.is_shut = False

    here: Fault = "trainer"

    def status(self) -> TrainerStatus:
        return TrainerStatus()

    def welcomed(self, welcome: Welcome) -> None:
        self.welcomes.append(welcome)

    def announcement(self) -> Announce:
        return Announce(layout=Layout((), (), b""), endpoint_name="endpoint", endpoint=b"where")

    async def connect(self, connect: Connect) -> Mapping[Member, Exception]:
        self.connects.append(connect)
        return self.failed

    def heard(self, message: FromDaemon) -> None:
        self.words.append(message)

    def poll(self) -> bool:
        return False

    def shut(self) -> None:
        self.is_shut = True


class Alone(AgentThread[Side]):
    """An agent whose daemon is the test: what it says is in ``said``. Its thread is not started."""

    def __init__(self, obeyed: "Alone | None" = None) -> None:
        address = ControlAddress("ws://127.0.0.1:1/agents", Path("token"))
        super().__init__(Identity("run", MEMBER, 1), address, lambda thread: Side(), lambda transport: (), obeyed)
        self.said: list[FromAgent] = []
        self.at_rest = False

    def send(self, message: FromAgent) -> bool:
        self.said.append(message)
        return True

    def hears(self, *messages: FromDaemon) -> None:
        async def listen() -> None:
            for message in messages:
                self._heard(message)
            for _ in range(5):  # what was awake goes on
                await asyncio.sleep(0)
            while not self.at_rest and not all(task.done() for task in self._tasks):  # noqa: ASYNC110  (threads, too)
                await asyncio.sleep(0)

        self._loop.run_until_complete(listen())

    def ends(self) -> None:
        async def wait() -> None:
            await asyncio.gather(*self._tasks, return_exceptions=True)

        self._loop.run_until_complete(wait())
        self._loop.close()

    async def rests(self, event: asyncio.Event, seconds: float | None) -> None:
        """Between two looks at a plan's edges: no time passes."""
        self.at_rest = True
        await event.wait()
        self.at_rest = False


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Any:
    alone = Alone()
    monkeypatch.setattr("weightsync.agents.link.edges._happened", alone.rests)
    yield alone
    alone._leave_group()
    alone.ends()


def welcome(epoch: int, journal: str = "j", **more: Any) -> Welcome:
    return Welcome(**{
        "epoch": epoch, "journal_id": journal, "heartbeat_seconds": 1.0, "lost_after_heartbeats": 3,
        "transport": NixlSettings(), "rendezvous": HubRendezvous(), **more,
    })  # fmt: skip


CONNECT = Connect(fingerprint="edges", root="root", peers=(), copies=b"", expected_bytes=0)


def test_a_welcome_is_answered_with_the_layout(agent: Alone) -> None:
    agent.hears(welcome(3))
    assert agent.said == [Announce(layout=Layout((), (), b""), endpoint_name="endpoint", endpoint=b"where")]
    assert agent.wait_welcome(0.0).epoch == 3
    assert agent.epoch == 3


def test_each_connection_is_told_what_is_wrong_around_the_process(agent: Alone) -> None:
    wrong = Finding("warning", "64 MB are free", "more", "shared memory")
    agent._look = lambda transport: [wrong]

    def told() -> list[FromAgent]:
        return [word for word in agent.said if isinstance(word, Examined)]

    agent._hello()
    agent.hears(welcome(3))
    assert told() == [Examined(findings=(wrong,))]
    agent.hears(welcome(3))  # on the same connection, which tells another way to meet
    assert len(told()) == 1
    agent._hello()
    agent.hears(welcome(3))
    assert len(told()) == 2


@pytest.mark.parametrize(
    "stale",
    [welcome(2), welcome(3, "another journal"), welcome(3, life="another")],
    ids=["lower epoch", "foreign journal", "another life"],
)
def test_a_daemon_that_is_not_ours_loses_the_connection(
    agent: Alone, stale: Welcome, caplog: pytest.LogCaptureFixture
) -> None:
    agent.hears(welcome(3))
    with pytest.raises(NotObeyed):
        agent.hears(stale)
    assert len(agent.said) == len(agent.side.welcomes) == 1
    assert (agent.epoch, agent._hello().journal_id) == (3, "j")
    assert "trainer/0: the daemon at ws://127.0.0.1:1/agents is refused: " in caplog.text


def test_words_of_the_last_round_are_said_again_to_each_new_connection(agent: Alone) -> None:
    agent.hears(welcome(3))
    closed = Closed(round=RoundName(3, 1))
    agent.say_once(Closed(round=RoundName(2, 9)))
    agent.say_once(closed)
    agent.said.clear()
    agent.hears(welcome(3))
    assert [type(word) for word in agent.said] == [Announce], "the same connection has heard it"
    agent._hello()
    agent.hears(welcome(4))
    assert agent.said[2:] == [closed], "behind the layout"
    heir = Alone(obeyed=agent)
    heir._hello()
    heir.hears(welcome(4, rendezvous=None))
    assert heir.said == [closed]
    heir._loop.close()


@pytest.mark.parametrize("next_one", [welcome(3), welcome(4), welcome(4, "another journal")])
def test_the_same_or_a_later_one_is(agent: Alone, next_one: Welcome) -> None:
    agent.hears(welcome(3), next_one)
    assert len(agent.said) == 2
    assert agent._hello().epoch_seen == next_one.epoch


def test_hello_says_what_was_obeyed(agent: Alone) -> None:
    assert (agent._hello().epoch_seen, agent._hello().journal_id) == (0, "")
    agent.hears(welcome(9))
    hello = agent._hello()
    assert (hello.epoch_seen, hello.journal_id, hello.incarnation) == (9, "j", agent.obedience.incarnation)


def test_an_agent_in_the_place_of_another_is_bound_by_what_that_one_obeyed(agent: Alone) -> None:
    """Same process, same memory: round 1.1 of a new journal must not be taken for the one that is over here."""
    agent.hears(welcome(9))
    heir = Alone(obeyed=agent)
    with pytest.raises(NotObeyed):
        heir.hears(welcome(1, "a new journal"))
    assert heir.said == []
    assert heir._hello().epoch_seen == 9
    assert heir._hello().incarnation == agent._hello().incarnation
    heir._loop.close()


def test_edges_are_confirmed_when_they_are_warm(agent: Alone) -> None:
    agent.hears(welcome(1), CONNECT)
    assert agent.side.connects == [CONNECT]
    assert agent.said[1:] == [Ready(fingerprint="edges")]


def test_an_edge_that_is_lost_is_told_and_one_that_comes_back_too(agent: Alone) -> None:
    agent.hears(welcome(1), CONNECT)
    peer = Member("inference", "e0", 1)
    agent.side.failed = {peer: NicError("the port is down")}
    agent.reconnect()
    agent.hears()
    agent.side.failed = {}
    agent.reconnect()
    agent.hears()
    lost = Ready(fingerprint="edges", failed=(EdgeFailure(peer, "the port is down"),))
    assert agent.said[1:] == [Ready(fingerprint="edges"), lost, Ready(fingerprint="edges")]


@pytest.mark.parametrize("newer", ["a Connect", "another layout"])
def test_only_the_present_plan_is_kept(agent: Alone, newer: str) -> None:
    agent.hears(welcome(1), CONNECT)
    if newer == "a Connect":
        agent.hears(replace(CONNECT, fingerprint="others"))
    else:
        agent.announce()
    agent.side.connects.clear()
    agent.reconnect()
    agent.hears()
    assert [connect.fingerprint for connect in agent.side.connects] == (["others"] if newer == "a Connect" else [])


def test_other_words_go_to_the_side(agent: Alone) -> None:
    word = Verify(round=RoundName(1, 1), version=Version(1, 1), deadline_seconds=1.0)
    agent.hears(welcome(1), word)
    assert agent.side.words == [word]


def test_a_welcome_without_a_way_waits_for_the_next(agent: Alone) -> None:
    agent.hears(welcome(1, rendezvous=None))
    assert agent.said == []
    assert agent.wait_welcome(0.0).rendezvous is None


class Group:
    """In the place of ``SpgRendezvous``; joins fail as often as ``failures`` says."""

    failures = 0
    told: list[Any] = []  # noqa: RUF012  (one list for all of a test's)

    def __init__(self, place: TcpStoreRendezvous) -> None:
        from weightsync.agents.link.process_group import GroupError

        type(self).failures -= 1
        if self.failures >= 0:
            raise GroupError("the store is another group's")

    def announce(self, announce: Announce) -> None:
        self.told.append(announce)

    def connect(self) -> Connect:
        return CONNECT

    def ready(self, ready: Ready) -> None:
        self.told.append(ready)

    def barrier(self, seconds: float) -> None:
        self.told.append(seconds)

    def close(self) -> None:
        self.told.append("closed")


PLACE = TcpStoreRendezvous("127.0.0.1", 1, 1, 2, 30.0)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> type[Group]:
    monkeypatch.setattr("weightsync.agents.link.process_group.SpgRendezvous", Group)
    monkeypatch.setattr("weightsync.agents.link.thread.GROUP_RETRY_SECONDS", 0.0)
    Group.failures, Group.told = 0, []
    return Group


@pytest.mark.parametrize("failures", [0, 2], ids=["at once", "after the last group's store has gone"])
def test_both_rounds_over_the_group(agent: Alone, group: type[Group], failures: int) -> None:
    group.failures = failures
    agent.hears(welcome(1, rendezvous=None), welcome(1, rendezvous=PLACE))
    kinds = [type(word) for word in group.told]
    assert kinds == [Announce, Ready, float]
    assert agent.said == [], "nothing of the rendezvous goes over the hub"
    agent.side.failed = {MEMBER: NicError("the port is down")}
    agent.reconnect()
    agent.hears()
    assert agent.said == [Ready(fingerprint="edges", failed=(EdgeFailure(MEMBER, "the port is down"),))], (
        "once it is over"
    )


def test_a_connect_over_the_hub_is_not_heard_in_a_group(agent: Alone, group: type[Group]) -> None:
    agent.hears(welcome(1, rendezvous=PLACE))
    agent.hears(CONNECT)
    assert agent.said == []


def test_a_daemon_with_the_hub_ends_the_group(agent: Alone, group: type[Group]) -> None:
    agent.hears(welcome(1, rendezvous=PLACE))
    agent.hears(welcome(2), CONNECT)
    assert group.told[-1] == "closed"
    assert agent.said[-1] == Ready(fingerprint="edges")


def test_waiting_for_nobody_says_why(agent: Alone) -> None:
    with pytest.raises(TimeoutError, match=r"trainer/0: no Welcome from ws://127\.0\.0\.1:1/agents within 0 s"):
        agent.wait_welcome(0.0)


@pytest.mark.timeout(30)
def test_a_wrong_token_file_is_told_at_once(tmp_path: Path) -> None:
    """To the thread that waits for the Welcome."""
    address = ControlAddress("ws://127.0.0.1:1", tmp_path / "none")
    lost = AgentThread(Identity("run", MEMBER, 1), address, lambda thread: Side(), lambda transport: ())
    lost.start()
    with pytest.raises(ValueError, match="none"):
        lost.wait_welcome(20.0)
    lost.close()
    assert lost.side.is_shut


# ------------------------------------------------------------------------------------------------------------ the end
class Client:
    """In the place of ``ControlClient``: connected until ``close``, which says Bye and waits for ``run`` to end."""

    trouble = ""
    connected = True
    heard_at = 0.0

    def __init__(self, *_: Any) -> None:
        self.running = threading.Event()
        self.byes: list[str] = []
        self._closing, self._ended = asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        self.running.set()
        await self._closing.wait()
        self._ended.set()

    async def close(self, reason: str) -> None:
        self.byes.append(reason)
        self._closing.set()
        await self._ended.wait()
        # The farewell outlives the client: here the thread's main task has long gone on.
        for _ in range(20):
            await asyncio.sleep(0)
        self.byes.append("done")


@pytest.fixture
def thread(monkeypatch: pytest.MonkeyPatch) -> AgentThread[Side]:
    """Not started, and with a double for its connection."""
    monkeypatch.setattr("weightsync.agents.link.thread.ControlClient", Client)
    return AgentThread(
        Identity("run", MEMBER, 1), ControlAddress("ws://x", Path("token")), lambda thread: Side(), lambda transport: ()
    )


def watched(thread: AgentThread[Any]) -> list["asyncio.Task[Any]"]:
    """Every task that the thread's loop makes from now on."""
    made: list[asyncio.Task[Any]] = []

    def make(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> "asyncio.Task[Any]":
        made.append(asyncio.Task(coroutine, loop=loop, **options))
        return made[-1]

    thread._loop.set_task_factory(make)
    return made


def running(thread: AgentThread[Side]) -> Client:
    thread.start()
    while thread._client is None:
        thread.call(lambda: None)  # a turn of its loop
    client: Any = thread._client
    assert client.running.wait(10)
    return client


def test_closing_waits_for_the_farewell_and_leaves_no_task(thread: AgentThread[Side]) -> None:
    tasks = watched(thread)
    client = running(thread)
    thread.close("the trainer ends")
    assert client.byes == ["the trainer ends", "done"]
    assert thread.side.is_shut
    assert tasks
    assert all(task.done() for task in tasks), "none is destroyed while it is pending"
    assert thread._loop.is_closed()


def test_closing_again_does_nothing(thread: AgentThread[Side]) -> None:
    client = running(thread)
    thread.close("first")
    thread.close("second")
    assert client.byes == ["first", "done"]


def test_two_closes_at_once_say_one_farewell(thread: AgentThread[Side]) -> None:
    tasks = watched(thread)
    client = running(thread)
    thread.post(lambda: thread._stop("first"))
    thread.close("second")
    assert client.byes == ["first", "done"]
    assert all(task.done() for task in tasks)


def test_a_thread_that_is_closed_before_its_first_turn_never_connects(thread: AgentThread[Side]) -> None:
    tasks = watched(thread)
    thread._loop.call_soon(thread._stop, "at once")  # what ``close`` posts, ahead of all else
    thread.start()
    thread.close()
    assert thread._client is None
    assert thread.side.is_shut
    assert all(task.done() for task in tasks)


def test_a_stop_that_comes_when_the_loop_is_ending_begins_nothing(
    thread: AgentThread[Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(client: Client) -> None:
        raise Hopeless("another run")

    tasks, shut = watched(thread), thread.side.shut

    def stop_then_shut() -> None:
        thread._stop("too late")
        shut()

    monkeypatch.setattr(Client, "run", refused)
    thread.side.shut = stop_then_shut  # type: ignore[method-assign]
    thread.start()
    thread._thread.join(10)
    thread.close("nobody is there")
    assert isinstance(thread.failure, Hopeless)
    assert thread.ended == "the agent of this worker has ended: another run"
    assert thread.side.is_shut
    assert all(task.done() for task in tasks)


def test_the_lease_runs_while_the_thread_lives_and_the_daemon_is_silent(thread: AgentThread[Side]) -> None:
    running(thread)
    assert thread.connected
    assert thread.ended == ""
    assert thread.lease is None, "no daemon has given one"
    thread.call(lambda: thread._heard(welcome(1, rendezvous=None, lease_seconds=60.0)))
    first = thread.lease
    assert first is not None
    assert first[0] == 60.0
    deadline = time.monotonic() + 10
    while (later := thread.lease) is not None and later[1] <= first[1]:
        assert time.monotonic() < deadline
    assert later is not None
    thread.close()
    assert thread.lease is None
