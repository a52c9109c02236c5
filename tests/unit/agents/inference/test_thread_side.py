"""An inference rank on the agent's thread: it passes on what concerns it, and tells when a round is open."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from weightsync.agents.inference.holdings import Holdings
from weightsync.agents.inference.thread_side import InferenceSide
from weightsync.agents.inference.window import Windows
from weightsync.agents.memory.errors import MemoryPlacementError
from weightsync.orchestrator.protocol.edges import Peer
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Announce,
    Commit,
    Connect,
    EngineStatus,
    Expose,
    FilesystemSettings,
    Grant,
    Hold,
    Holding,
    Left,
    Outcome,
    Ready,
    Renew,
    Verify,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Member, RoundName, Version

ROUND, VERSION = RoundName(1, 1), Version(7, 1)
PEER = Member("inference", "b", 0)


class Receivers:
    """One receiver, which is also the list of them."""

    def __init__(self) -> None:
        self.current = self
        self.connects: list[Connect] = []
        self.failed: dict[Member, Exception] = {}
        self.rounds: list[tuple[str, RoundName]] = []
        self.polls = self.reopened = 0

    def __iter__(self) -> Any:
        return iter([self])

    def announcement(self) -> tuple[str, bytes]:
        return "a/0-77", b"card"

    async def connect(self, connect: Connect) -> dict[Member, Exception]:
        self.connects.append(connect)
        return self.failed

    def begin(self, round_name: RoundName, relays: bool) -> None:
        self.rounds.append(("relayed" if relays else "begin", round_name))

    def end(self, round_name: RoundName) -> None:
        self.rounds.append(("end", round_name))

    def reopen(self) -> None:
        self.reopened += 1

    def poll(self) -> None:
        self.polls += 1


class Lends:
    """In the place of what lends: writes down what it is told."""

    def __init__(self) -> None:
        self.story: list[Any] = []
        self.stopped: list[tuple[Member, ...]] = []
        self.open_rounds: tuple[RoundName, ...] = ()

    def attach(self, link: Any, member: Member) -> None:
        self.story.append("attached")

    def welcomed(self, welcome: Welcome) -> None:
        self.story.append("welcomed")

    def announcement(self) -> tuple[str, bytes]:
        return "a/0-78", b"lends"

    def prepare(self, connect: Connect) -> None:
        self.story.append(connect)

    def granted(self, grant: Grant) -> None:
        self.story.append(grant)

    def stop(self, abort: Abort) -> bool:
        self.stopped.append(abort.members)
        return abort.round in self.open_rounds

    def changes(self) -> None:
        self.story.append("changes")

    def renew(self) -> None:
        self.story.append("renewed")

    def poll(self) -> bool:
        return bool(self.open_rounds)


@pytest.fixture
def rank() -> Any:
    """A side with doubles for its weights and its windows' inbox."""
    opened: list[Any] = []
    receivers, windows = Receivers(), Windows(Holdings())
    weights: Any = SimpleNamespace(
        layout=Layout((), (), b""),
        receivers=receivers,
        spares=3,
        replace_landing=lambda: opened.append("replaced"),
        open=lambda member, settings: opened.append((member, settings)),
        connect=receivers.connect,
    )
    shadow: Any = SimpleNamespace(words=[], open=False, gives_up=lambda copied: True)
    shadow.heard = shadow.words.append
    said: list[Any] = []
    link: Any = SimpleNamespace(send=said.append, say_once=said.append, announce=lambda: said.append("announced"))
    lending: Any = Lends()
    side = InferenceSide(link, Member("inference", "a", 0), weights, windows, shadow, lending)
    return SimpleNamespace(
        side=side,
        receivers=receivers,
        windows=windows,
        opened=opened,
        said=said,
        link=link,
        shadow=shadow,
        weights=weights,
        lending=lending,
    )


def test_the_transport_of_the_welcome_is_opened_for_this_member(rank: Any) -> None:
    settings = FilesystemSettings("/runs/a")
    rank.side.welcomed(
        Welcome(
            epoch=1, journal_id="j", heartbeat_seconds=1.0, lost_after_heartbeats=3, transport=settings, rendezvous=None
        )
    )
    assert rank.opened == [(Member("inference", "a", 0), settings)]
    assert rank.side.announcement() == Announce(
        layout=Layout((), (), b""), endpoint_name="a/0-77", endpoint=b"card", lends_name="a/0-78", lends=b"lends",
        spares=3,
    )  # fmt: skip
    assert rank.lending.story == ["attached", "welcomed"]


async def test_a_connect_goes_to_the_receiver(rank: Any) -> None:
    connect = Connect(fingerprint="edges", root="root", peers=(), copies=b"", expected_bytes=0)
    assert await rank.side.connect(connect) == {}
    assert rank.receivers.connects == [connect]
    rank.receivers.failed = {Member("trainer", "", 0): RuntimeError("out of reach")}
    assert await rank.side.connect(connect) == rank.receivers.failed


def test_only_words_about_rounds_reach_the_window(rank: Any) -> None:
    heard: list[Any] = []
    rank.windows.heard = heard.append
    words = [
        Expose(round=ROUND),
        Verify(round=ROUND, version=VERSION, deadline_seconds=1.0),
        Commit(round=ROUND, version=VERSION),
        Abort(round=ROUND, torn=True, reason="a writer was lost"),
    ]
    for word in (*words, Outcome(version=VERSION, committed=True)):
        rank.side.heard(word)
    assert heard == words
    assert rank.shadow.words == []


def test_where_versions_land_beside_live_memory_they_reach_the_shadow_alone(rank: Any) -> None:
    """Which that is the layout says, and so it is for the daemon."""
    rank.weights.layout = Layout((), (), b"", lands="copy")
    rank.windows.heard = lambda word: pytest.fail("nobody stands in a window")
    words = [
        Expose(round=ROUND),
        Verify(round=ROUND, version=VERSION, deadline_seconds=1.0),
        Abort(round=ROUND, torn=True, reason="a writer was lost"),
    ]
    for word in (*words, Outcome(version=VERSION, committed=True)):
        rank.side.heard(word)
    assert rank.shadow.words == words


def test_bytes_are_let_near_live_memory_only_while_the_worker_stands_still_for_their_round(rank: Any) -> None:
    rank.side.heard(Expose(round=ROUND))
    assert rank.receivers.rounds == [], "it serves"
    rank.windows.holdings.status = EngineStatus(window=ROUND)
    rank.side.heard(Expose(round=RoundName(1, 2)))
    assert rank.receivers.rounds == []
    rank.side.heard(Expose(round=ROUND))
    rank.side.heard(Verify(round=ROUND, version=VERSION, deadline_seconds=1.0))
    rank.side.heard(Abort(round=ROUND, torn=True, reason="a writer was lost"))
    assert rank.receivers.rounds == [("begin", ROUND), ("end", ROUND), ("end", ROUND)]


def test_beside_live_memory_they_are_let_in_while_it_serves(rank: Any) -> None:
    rank.weights.layout = Layout((), (), b"", lands="flip")
    rank.side.heard(Expose(round=ROUND))
    assert rank.receivers.rounds == [("begin", ROUND)]


def test_the_transport_is_polled_and_an_open_window_means_often(rank: Any) -> None:
    assert not rank.side.poll()
    rank.windows.holdings.status = EngineStatus(window=ROUND)
    assert rank.side.poll()
    assert rank.receivers.polls == 2
    rank.windows.holdings.status = EngineStatus()
    assert not rank.side.poll()
    rank.shadow.open = True
    assert rank.side.poll(), "writers may be at work"
    rank.shadow.open, rank.windows.holdings.status = False, EngineStatus(window=ROUND)
    assert rank.side.status() == EngineStatus(window=ROUND)
    rank.side.shut()
    assert rank.side.poll(), "writers may still reach this memory"


def test_a_hold_is_answered_with_the_status(rank: Any) -> None:
    rank.side.heard(Hold(held=True, reason="an operator looks at it"))
    assert rank.side.status() == EngineStatus(held=True), "which Hello repeats"
    assert rank.windows.holdings.held_because == "an operator looks at it"
    rank.side.heard(Hold(held=False))
    assert rank.said == [Holding(status=EngineStatus(held=True)), Holding(status=EngineStatus())]


def test_memory_that_a_late_word_has_mended_is_told(rank: Any) -> None:
    rank.windows.heard = lambda word: EngineStatus(applied=VERSION)
    rank.side.heard(Commit(round=ROUND, version=VERSION))
    assert rank.said == [Left(round=ROUND, status=EngineStatus(applied=VERSION))]


def test_another_endpoint_is_announced_when_the_transport_has_it(rank: Any) -> None:
    rank.side.heard(Renew(reason="what trainer/0 wrote hangs"))
    assert (rank.receivers.reopened, rank.said) == (1, ["announced"])


def test_a_spare_takes_the_landings_place_and_what_lay_there_is_gone(rank: Any) -> None:
    rank.side.heard(Renew(reason="trainer/0 has gone", spare=True))
    assert (rank.opened, rank.lending.story[-1]) == (["replaced"], "renewed")
    assert rank.said == [Holding(status=EngineStatus()), "announced"]


def test_what_there_is_no_room_for_is_not_announced(rank: Any) -> None:
    """The core knows by that that it is within reach as before, and asks again."""

    def full() -> None:
        raise MemoryPlacementError("no room for a host arena of 8 bytes")

    rank.weights.replace_landing = full
    rank.side.heard(Renew(reason="trainer/0 has gone", spare=True))
    assert rank.said == [Holding(status=EngineStatus())]


@pytest.mark.parametrize("because", ["it switches", "it lends"])
def test_a_landing_in_use_is_kept_until_it_is_asked_for_again(rank: Any, because: str) -> None:
    rank.shadow.gives_up = lambda copied: because != "it switches"
    rank.lending.open_rounds = (ROUND,) if because == "it lends" else ()
    rank.side.heard(Renew(reason="trainer/0 has gone", spare=True))
    assert (rank.opened, rank.said) == ([], [])


def test_what_it_lends_is_told_to_what_lends(rank: Any) -> None:
    """What names peers is to the writer alone; before something lands, lending stops."""
    connect = Connect(fingerprint="edges", root="root", peers=(), copies=b"", expected_bytes=0, lends=True)
    grant = Grant(round=ROUND, version=VERSION, fingerprint="edges", members=(), deadline_seconds=1.0)
    rank.lending.story.clear()
    for message in (connect, grant, Expose(round=ROUND)):
        rank.side.heard(message)
    assert rank.lending.story == [connect, grant, "changes"]
    heard: list[Any] = []
    rank.windows.heard = heard.append
    rank.lending.open_rounds = (ROUND,)
    rank.side.heard(Abort(round=ROUND, torn=False, reason="the daemon says so", members=(PEER,)))
    assert heard == []
    out = Abort(round=ROUND, torn=False, reason="its engine is out")
    rank.side.heard(out)
    assert heard == [out], "also of a round in which it writes to others"
    assert rank.lending.stopped == [(PEER,), ()]
    assert rank.side.status().lending == (ROUND,)
    assert rank.side.poll(), "a grant is open"


async def test_edges_of_others_of_a_round_are_kept_beside_those_of_the_plan(rank: Any) -> None:
    """And used in the rounds that say so."""
    tasks: list[asyncio.Task[None]] = []
    rank.link.spawn = lambda work: tasks.append(asyncio.get_running_loop().create_task(work)) or tasks[-1]
    peers = (Peer(PEER, 7, "b/0-1", b"card", ()),)
    relayed = Connect(fingerprint="beside", root="root", peers=peers, copies=b"", expected_bytes=0, relays=True)
    rank.side.heard(relayed)
    await asyncio.sleep(0)
    assert (rank.receivers.connects, rank.said) == ([relayed], [Ready(fingerprint="beside")])
    rank.weights.layout = Layout((), (), b"", lands="copy")
    rank.side.heard(Expose(round=ROUND, relays=True))
    rank.side.heard(Expose(round=RoundName(1, 2)))
    assert rank.receivers.rounds == [("relayed", ROUND), ("begin", RoundName(1, 2))]
    tasks[0].cancel()
