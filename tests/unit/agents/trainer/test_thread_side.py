"""A trainer rank's side of grants: which it refuses, what it says when it closes, whom it tells the fate."""

import asyncio
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from weightsync.agents.errors import AgentError
from weightsync.agents.tables.runs import RunTableError
from weightsync.agents.tables.spans import NOWHERE, Spans
from weightsync.agents.trainer import thread_side
from weightsync.agents.trainer.errors import ConversionTableError
from weightsync.agents.trainer.publication import PublishError
from weightsync.agents.trainer.thread_side import TrainerSide
from weightsync.agents.transport import ahead
from weightsync.agents.transport.filling import Filled, Filling, whole
from weightsync.agents.transport.interface import Ended, HandedOver, Sender, SourceMemory
from weightsync.agents.transport.nixl.receiver import NixlReceiver
from weightsync.agents.transport.registry import TRANSPORTS, Transport
from weightsync.agents.transport.shares import Reading, Share, Shares
from weightsync.kernels.errors import KernelError
from weightsync.orchestrator.protocol.edges import PeerTransfer
from weightsync.orchestrator.protocol.layout import Layout, Note
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Announce,
    Closed,
    Connect,
    Converting,
    Fault,
    FilesystemSettings,
    Grant,
    Needs,
    NixlSettings,
    Outcome,
    Staged,
    Standing,
    TcpStoreRendezvous,
    TrainerStatus,
    TransportSettings,
    Welcome,
)
from weightsync.orchestrator.protocol.names import NO_BYTES, Member, RoundName, Version

MEMBER = Member("trainer", "", 0)
TARGET, OTHER, THIRD = (Member("inference", f"e{number}", 0) for number in range(3))
VERSION, ROUND = Version(7, 1), RoundName(3, 1)
GRANT = Grant(round=ROUND, version=VERSION, fingerprint="edges", members=(TARGET,), deadline_seconds=5.0)
BOTH = replace(GRANT, members=(TARGET, OTHER))
SENT = PeerTransfer(TARGET, 100, 1, 0.1, (1, 2))
LATE = PeerTransfer(OTHER, 40, 1, 0.1, (1, 2), "the deadline passed")


class NoRoute(AgentError):
    fault: Fault = "network"
    retry = True


class Wire(Sender):
    """A transport over which each member gets what ``ends`` says; one without an entry hangs until ``end``.

    A write that fails does so before the first of them unless ``late``.
    """

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.late = False
        self.refusal: Exception | None = None
        self.failed: dict[Member, Exception] = {}
        self.granted: list[Sequence[Member]] = []
        self.stopped: list[Member] = []
        self.stages: list[Version] = []
        self.shares: list[Sequence[Share]] = []
        self.ends = {TARGET: HandedOver(TARGET, 100, 1, 0.1)}
        self.left: dict[Member, Ended] = {}
        self.changed = False
        self.closed = False
        self.writes_ahead = True
        self.filled = -1

    def open(self, settings: Any) -> None: ...

    async def connect(self, shares: Sequence[Share]) -> Mapping[Member, Exception]:
        if self.refusal is not None:
            raise self.refusal
        self.shares.append(shares)
        return self.failed

    def stage(self, version: Version) -> None:
        self.stages.append(version)

    async def write(
        self,
        round_name: RoundName,
        members: Sequence[Member],
        deadline_seconds: float,
        ended: Ended,
        filled: Filled = whole,
    ) -> None:
        self.granted.append(members)
        self.filled = filled()
        if self.failure is not None and not self.late:
            raise self.failure
        for member in members:
            if member in self.ends:
                ended(self.ends[member])
            else:
                self.left[member] = ended
        if self.failure is not None:
            raise self.failure

    def end(self, member: Member, error: str = "the deadline passed") -> None:
        """Nothing is in flight to ``member`` any more."""
        self.left.pop(member)(HandedOver(member, 40, 1, 0.1, error))

    def stop(self, members: Collection[Member], reason: str) -> None:
        self.stopped += members

    def in_flight(self) -> Sequence[Member]:
        return tuple(self.left)

    def poll(self) -> bool:
        changed, self.changed = self.changed, False
        return changed

    def close(self) -> None:
        self.closed = True


FINITE = Spans.of(np.array([[8, 0, 0, 0, 0, *[1, 0, 0] * 3]]))


class Owed(Shares):
    """Three peers, whose bytes have the digest (1, 2); counts how often that is computed."""

    def __init__(self) -> None:
        self.computed = self.plans = 0

    def replan(self, connect: Connect) -> Sequence[Share]:
        self.plans += 1
        return ()

    @property
    def sizes(self) -> dict[Member, int]:
        return {TARGET: 100, OTHER: 100, THIRD: 100}

    def read(self) -> Reading:
        self.computed += 1
        return Reading(dict.fromkeys(self.sizes, (1, 2)), FINITE)


class Thread:
    """What the side says to the daemon, and which epoch counts."""

    epoch = 3

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.announced = self.reconnects = 0

    def reconnect(self) -> None:
        self.reconnects += 1

    def announce(self) -> None:
        self.announced += 1

    def send(self, message: Any) -> bool:
        self.said.append(message)
        return True

    def say_once(self, word: Any) -> None:
        self.send(word)

    def spawn(self, work: Any) -> "asyncio.Task[None]":
        return asyncio.get_running_loop().create_task(work)


CONNECT = Connect(fingerprint="edges", root="root", peers=(), copies=b"", expected_bytes=0)


@pytest.fixture
async def rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A side with its doubles beside it, welcomed over ``Wire`` and connected."""
    wire, owed, thread = Wire(), Owed(), Thread()
    monkeypatch.setitem(TRANSPORTS, NixlSettings, Transport(lambda memory: wire, NixlReceiver))
    memory = SourceMemory(MEMBER, 1, Layout((), (), b""), [torch.zeros(8, dtype=torch.uint8)], ())
    side = TrainerSide(thread, memory, 8)
    side._shares = owed
    side.welcomed(welcome(NixlSettings()))
    await side.connect(CONNECT)
    return SimpleNamespace(side=side, thread=thread, wire=wire, owed=owed)


def welcome(transport: TransportSettings) -> Welcome:
    return Welcome(
        epoch=3, journal_id="j", heartbeat_seconds=1.0, lost_after_heartbeats=3, transport=transport, rendezvous=None
    )


async def write(rank: Any, grant: Grant = GRANT) -> None:
    """Until nothing more is posted."""
    before = set(asyncio.all_tasks())
    rank.side.heard(grant)
    await asyncio.gather(*(asyncio.all_tasks() - before))


async def granted(rank: Any, grant: Grant = GRANT) -> Closed:
    """The last CLOSED that follows a grant."""
    await write(rank, grant)
    closed = rank.thread.said[-1]
    assert isinstance(closed, Closed)
    return closed


async def test_a_grant_is_carried_out_and_closed(rank: Any) -> None:
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    assert await granted(rank) == Closed(round=ROUND, peers=(SENT,))
    assert rank.wire.granted == [[TARGET]]
    assert rank.side.status().open_rounds == ()


@pytest.mark.parametrize(
    ("grant", "reason"),
    [
        ({"round": RoundName(2, 1)}, "grant of epoch 2; this agent obeys epoch 3"),
        ({"fingerprint": "edges of another plan"}, "grant for the edges edges of ano; this rank has edges"),
        ({"version": Version(7, 2)}, "the slots hold step 1 (generation 7), not step 2 (generation 7)"),
    ],
)
async def test_a_grant_of_something_else_is_refused_and_nothing_written(
    rank: Any, grant: dict[str, Any], reason: str
) -> None:
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    closed = await granted(rank, replace(GRANT, **grant))
    assert closed.fault == "trainer"
    assert reason in closed.error
    assert rank.wire.granted == []


async def test_slots_in_the_making_are_written_by_nobody(rank: Any) -> None:
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    assert rank.side.reserve() == ""
    rank.side.take()
    closed = await granted(rank)
    assert "the slots hold a version in the making" in closed.error
    assert rank.wire.granted == []


async def converting(rank: Any) -> Filling:
    """VERSION is being converted, and has been granted."""
    assert rank.side.reserve() == ""
    rank.side.take()
    filling = rank.side.convert(VERSION)
    assert isinstance(filling, Filling)
    assert rank.thread.said == [Converting(version=VERSION)]
    assert rank.side.status() == TrainerStatus(converting=VERSION)
    filling.reached(4)
    rank.side.heard(GRANT)
    await asyncio.sleep(0.01)
    assert rank.wire.granted == [[TARGET]]
    assert rank.wire.filled == 4
    return filling


async def test_what_is_being_converted_is_written_and_closed_when_it_is_staged(rank: Any) -> None:
    await converting(rank)
    assert rank.thread.said[1:] == [], "all bytes are there, and nobody knows their digest"
    assert rank.owed.computed == 0
    assert "has not ended" in rank.side.reserve()
    rank.side.prepare(VERSION)
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    await asyncio.sleep(0.05)
    assert [type(said) for said in rank.thread.said[1:]] == [Staged, Closed]
    assert rank.thread.said[-1] == Closed(round=ROUND, peers=(SENT,))
    assert rank.side.status() == TrainerStatus(staged=VERSION)
    assert rank.side.reserve() == ""


async def test_what_is_given_up_is_said_before_its_grants_are_closed(rank: Any) -> None:
    await converting(rank)
    rank.side.give_up("a tensor has no numbers in it")
    await asyncio.sleep(0.01)
    first, second = rank.thread.said[1:]
    assert first == Converting(version=None)
    assert second == Closed(round=ROUND, peers=(), error="a tensor has no numbers in it", fault="trainer")
    assert rank.wire.stopped == [TARGET]
    assert rank.side.status() == TrainerStatus()
    assert "a version in the making" in (await granted(rank, replace(GRANT, round=RoundName(3, 2)))).error
    rank.side.give_up("again")
    assert len(rank.thread.said) == 4, "there is nothing to give up"


@pytest.mark.parametrize("members", [(), (TARGET,)])
async def test_a_conversion_that_hangs_keeps_no_engine_that_the_daemon_has_let_go(
    rank: Any, monkeypatch: pytest.MonkeyPatch, members: tuple[Member, ...]
) -> None:
    monkeypatch.setattr(ahead, "LOOK_SECONDS", 0.001)
    filling = await converting(rank)
    rank.side.heard(Abort(round=ROUND, torn=False, reason="trainer/1 was lost", members=members))
    await asyncio.sleep(0.05)
    assert not filling.ended.done()
    [closed] = rank.thread.said[1:]
    assert closed.final
    assert [(end.peer, end.error) for end in closed.peers] == [(TARGET, "the daemon ended it: trainer/1 was lost")]
    assert rank.side.status() == TrainerStatus(converting=VERSION), "no grant is open"


async def test_what_is_staged_cannot_be_given_up(rank: Any) -> None:
    await converting(rank)
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    rank.side.give_up("another rank has failed")
    await asyncio.sleep(0.05)
    assert rank.side.status().staged == VERSION
    assert Converting(version=None) not in rank.thread.said


async def test_over_a_transport_that_takes_all_at_once_nothing_is_said_before_it_is_there(rank: Any) -> None:
    rank.wire.writes_ahead = False
    assert rank.side.convert(VERSION) is None
    assert rank.thread.said == []
    assert rank.side.status() == TrainerStatus()


async def test_a_grant_waits_until_all_ranks_have_agreed_on_the_next_version(rank: Any) -> None:
    """Refused by one rank and carried out by the others, it would tear an engine."""
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    assert rank.side.reserve() == ""
    rank.side.heard(GRANT)
    await asyncio.sleep(0)
    assert rank.wire.granted == []
    assert rank.side.status().staged == VERSION
    before = set(asyncio.all_tasks())
    rank.side.release()  # another rank was busy
    await asyncio.gather(*(asyncio.all_tasks() - before))
    assert rank.thread.said[-1] == Closed(round=ROUND, peers=(SENT,))
    assert rank.side.reserve() == ""
    rank.side.heard(replace(GRANT, round=RoundName(3, 2)))
    before = set(asyncio.all_tasks())
    rank.side.take()
    await asyncio.gather(*(asyncio.all_tasks() - before))
    assert "a version in the making" in rank.thread.said[-1].error


async def test_a_grant_that_waits_is_open(rank: Any) -> None:
    """A daemon that meets this rank again must not believe that it is closed."""
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    assert rank.side.reserve() == ""
    rank.side.heard(GRANT)
    assert rank.side.status().open_rounds == (ROUND,)
    assert rank.side.reserve() == "edge to e0/0 has not ended (round 3.1)"


async def test_a_closing_rank_obeys_no_further_grant_and_is_done_when_the_last_is_closed(rank: Any) -> None:
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    await write(rank, BOTH)
    assert not rank.side.retire(), "a write is in flight"
    rank.wire.end(OTHER)
    assert rank.side.retire()
    assert "is closing its agent" in (await granted(rank, replace(GRANT, round=RoundName(3, 2)))).error


async def test_what_went_wrong_on_our_side_is_said(rank: Any) -> None:
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    rank.wire.failure = NoRoute("no port is up")
    closed = await granted(rank, replace(GRANT, members=()))
    assert (closed.error, closed.final) == ("", True), "nobody is owed anything, so nothing is asked of the transport"
    closed = await granted(rank, replace(BOTH, round=RoundName(3, 2)))
    assert (closed.error, closed.fault, closed.retry, closed.peers) == ("no port is up", "network", True, ())
    assert closed.final
    assert rank.side.status().open_rounds == ()


async def test_a_heartbeat_passes_while_the_digest_of_a_grant_computes(rank: Any) -> None:
    computing, go_on = threading.Event(), threading.Event()

    def stopped() -> Reading:
        computing.set()
        assert go_on.wait(10), "only the loop lets it go on"
        return Reading({TARGET: (1, 2)}, NOWHERE)

    rank.owed.read = stopped
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    rank.side.heard(GRANT)
    assert await asyncio.to_thread(computing.wait, 10)
    heartbeat = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(heartbeat.set_result, "answered")
    assert await heartbeat == "answered"
    assert rank.wire.granted == [], "nothing is written before it is digested"
    assert rank.side.status().open_rounds == (ROUND,)
    go_on.set()
    await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))
    assert rank.thread.said[-1] == Closed(round=ROUND, peers=(SENT,))


async def test_a_heartbeat_passes_while_the_tables_of_a_plan_are_made(rank: Any) -> None:
    computing, go_on = threading.Event(), threading.Event()

    def stopped(connect: Connect) -> Sequence[Share]:
        computing.set()
        assert go_on.wait(10), "only the loop lets it go on"
        return ()

    rank.owed.replan = stopped
    connecting = asyncio.create_task(rank.side.connect(replace(CONNECT, fingerprint="others")))
    assert await asyncio.to_thread(computing.wait, 10)
    go_on.set()
    await connecting


# ----------------------------------------------------------------------------------------------- each peer for itself
async def test_a_peer_that_fails_is_told_beside_those_that_were_written(rank: Any) -> None:
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    rank.wire.ends[OTHER] = HandedOver(OTHER, 40, 1, 0.1, "the peer is gone")
    closed = await granted(rank, BOTH)
    gone = PeerTransfer(OTHER, 40, 1, 0.1, (1, 2), "the peer is gone")
    assert closed == Closed(round=ROUND, peers=(SENT, gone))
    assert rank.side.reserve() == ""


async def test_a_peer_that_hangs_holds_up_nobody(rank: Any) -> None:
    """Neither the word about the others nor a grant to them; the slots, by name, until it is left out."""
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    rank.wire.ends[THIRD] = HandedOver(THIRD, 40, 1, 0.1, "the peer is gone")
    gone = PeerTransfer(THIRD, 40, 1, 0.1, (1, 2), "the peer is gone")
    assert await granted(rank, replace(BOTH, members=(TARGET, OTHER, THIRD))) == Closed(
        round=ROUND, peers=(SENT, gone), final=False
    )
    assert rank.side.status().open_rounds == (ROUND,)
    assert rank.side.reserve() == "edge to e1/0 has not ended (round 3.1)"
    assert rank.side.poll(), "a grant is open"

    second = RoundName(3, 2)
    assert await granted(rank, replace(GRANT, round=second)) == Closed(round=second, peers=(SENT,))
    busy = PeerTransfer(OTHER, 0, 0, 0.0, NO_BYTES, "edge to e1/0 has not ended (round 3.1)")
    third = RoundName(3, 3)
    assert await granted(rank, replace(BOTH, round=third)) == Closed(round=third, peers=(busy, SENT))
    assert rank.wire.granted[-1] == [TARGET], "nothing is posted to it again"
    assert rank.side.status().open_rounds == (ROUND,)

    rank.side.heard(Abort(round=ROUND, torn=True, reason="e1 is left out", members=(OTHER,)))
    assert rank.side.reserve() == "", "what it still reads of the slots arrives where nobody serves it"
    assert not rank.side.retire(), "but the memory must stay"

    rank.wire.end(OTHER)
    assert rank.thread.said[-1] == Closed(round=ROUND, peers=(SENT, gone, LATE))
    assert rank.side.status().open_rounds == ()
    assert rank.side.reserve() == ""


async def test_bytes_that_are_not_those_of_the_table_are_an_error(rank: Any) -> None:
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    rank.wire.ends[TARGET] = HandedOver(TARGET, 0)
    closed = await granted(rank)
    assert [peer.error for peer in closed.peers] == ["0 bytes were written to e0/0, which is owed 100"]


async def test_members_that_are_owed_nothing_by_this_rank_are_left_out(rank: Any) -> None:
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    closed = await granted(rank, replace(GRANT, members=(TARGET, Member("inference", "stranger", 0))))
    assert closed == Closed(round=ROUND, peers=(SENT,))
    assert rank.wire.granted == [[TARGET]]


async def test_an_abort_ends_the_edges_that_it_names(rank: Any) -> None:
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    await write(rank, replace(GRANT, members=(OTHER, TARGET)))
    rank.side.heard(Abort(round=ROUND, torn=True, reason="e1 is left out", members=(TARGET, OTHER)))
    assert rank.wire.stopped == [OTHER], "the other one has ended"
    rank.side.heard(Abort(round=RoundName(3, 9), torn=True, reason="unknown"))
    assert rank.wire.stopped == [OTHER]
    assert rank.side.status().open_rounds == (ROUND,), "what is in flight is waited for"


async def test_an_abort_without_names_ends_all(rank: Any) -> None:
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    rank.wire.ends = {}
    await write(rank, BOTH)
    rank.side.heard(Abort(round=ROUND, torn=True, reason="a rank was lost"))
    assert sorted(rank.wire.stopped) == [TARGET, OTHER]
    for member in (TARGET, OTHER):
        rank.wire.end(member, "stopped")
    assert rank.thread.said[-1].final


@pytest.mark.parametrize("members", [(), (OTHER,)], ids=["all", "one"])
async def test_an_abort_before_the_first_post_leaves_nothing_to_post(rank: Any, members: tuple[Member, ...]) -> None:
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    before = set(asyncio.all_tasks())
    rank.side.heard(BOTH)
    rank.side.heard(Abort(round=ROUND, torn=True, reason="a rank was lost", members=members))
    await asyncio.gather(*(asyncio.all_tasks() - before))
    closed = rank.thread.said[-1]
    assert closed.final
    errors = {peer.peer: peer.error for peer in closed.peers}
    assert errors[OTHER] == "the daemon ended it: a rank was lost"
    assert rank.wire.granted == ([[TARGET]] if members else [])
    assert (errors[TARGET] == "") is bool(members)


async def test_an_abort_reaches_a_grant_that_waits(rank: Any) -> None:
    """It must not begin afterwards."""
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    assert rank.side.reserve() == ""
    rank.side.heard(BOTH)
    rank.side.heard(Abort(round=ROUND, torn=True, reason="a rank was lost", members=(OTHER,)))
    assert [(said.final, [end.peer for end in said.peers]) for said in rank.thread.said[1:]] == [(False, [OTHER])]
    rank.side.heard(Abort(round=ROUND, torn=True, reason="a rank was lost"))
    closed = rank.thread.said[-1]
    assert closed.final
    assert {(end.peer, end.error) for end in closed.peers} == {
        (member, "the daemon ended it: a rank was lost") for member in (TARGET, OTHER)
    }
    rank.side.release()
    await asyncio.sleep(0)
    assert rank.wire.granted == []
    assert rank.side.status().open_rounds == ()


async def test_a_grant_that_is_said_again_is_one_grant(rank: Any) -> None:
    """The daemon says it again to a rank that has connected anew."""
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    await write(rank, BOTH)
    await write(rank, BOTH)
    assert rank.wire.granted == [[TARGET, OTHER]]
    rank.wire.end(OTHER)
    assert await granted(rank, BOTH) == Closed(round=ROUND, peers=(SENT, LATE))
    assert rank.wire.granted == [[TARGET, OTHER]]
    assert rank.side.status().open_rounds == ()


async def test_no_more_grants_are_open_than_a_hello_can_tell(rank: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_side, "MAX_OPEN_GRANTS", 1)
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    await write(rank, BOTH)
    closed = await granted(rank, replace(GRANT, round=RoundName(3, 2)))
    assert closed.error == "1 grants are open: edge to e1/0 has not ended (round 3.1)"
    assert rank.side.status().open_rounds == (ROUND,)


async def test_edges_that_have_changed_are_looked_after(rank: Any) -> None:
    assert not rank.side.poll()
    assert rank.thread.reconnects == 0
    rank.wire.changed = True
    rank.side.poll()
    assert rank.thread.reconnects == 1


async def test_edges_that_cannot_be_used_are_told_and_the_others_are(rank: Any) -> None:
    """And a second look at the same plan does not void what is granted meanwhile."""
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    rank.wire.failed = {OTHER: NoRoute("no route")}
    plans = rank.owed.plans
    assert await rank.side.connect(replace(CONNECT, fingerprint="others")) == {OTHER: rank.wire.failed[OTHER]}
    assert await rank.side.connect(replace(CONNECT, fingerprint="others")) == {OTHER: rank.wire.failed[OTHER]}
    assert rank.owed.plans == plans + 1
    assert (await granted(rank, replace(GRANT, fingerprint="others"))).error == ""


@pytest.mark.parametrize(
    ("error", "fault", "retry"),
    [
        (RuntimeError("CUDA error: out of memory"), "trainer", True),
        (RunTableError("a copy outside its row"), "daemon", False),
        (KernelError("a table that is none"), "trainer", False),
    ],
)
async def test_the_blame_follows_the_kind_of_error(rank: Any, error: Exception, fault: str, retry: bool) -> None:
    """torch's RuntimeErrors are no network's, and a table that does not fit is no bug of the trainer."""
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    rank.wire.failure = error
    closed = await granted(rank)
    assert (closed.fault, closed.retry) == (fault, retry)


async def test_a_bug_closes_the_grant_too(rank: Any) -> None:
    """Else its targets were tainted until this process ends."""
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    rank.wire.failure = KeyError("e0/0")
    closed = await granted(rank)
    assert (closed.error, closed.fault, closed.retry) == ("KeyError('e0/0')", "trainer", True)
    assert rank.side.status().open_rounds == ()


async def test_a_bug_in_mid_write_leaves_the_grant_open_for_what_is_in_flight(rank: Any) -> None:
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    rank.wire.failure, rank.wire.late = KeyError("e0/0"), True
    closed = await granted(rank, BOTH)
    assert (closed.error, closed.final, closed.peers) == ("KeyError('e0/0')", False, (SENT,))
    rank.wire.end(OTHER)
    assert rank.thread.said[-1] == replace(closed, final=True, peers=(SENT, LATE))


def test_staged_is_reported_with_its_cost(rank: Any) -> None:
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    assert rank.thread.said == [Staged(version=VERSION, bytes=8, convert_seconds=0.5, digest_seconds=0.25)]
    assert rank.side.status().staged == VERSION


def test_the_fate_of_the_version_ends_the_publish(rank: Any) -> None:
    committed: Future[int] = Future()
    rank.side.staged(VERSION, 0.5, 0.25, committed)
    rank.side.heard(Outcome(version=Version(7, 9), committed=True, sequence=1))
    assert not committed.done()
    rank.side.heard(Outcome(version=VERSION, committed=True, sequence=5))
    rank.side.heard(Outcome(version=VERSION, committed=True, sequence=6))
    assert committed.result(0) == 5
    failed: Future[int] = Future()
    rank.side.staged(Version(7, 2), 0.5, 0.25, failed)
    rank.side.heard(Outcome(version=Version(7, 2), committed=False, reason="no plan fits"))
    with pytest.raises(PublishError, match="no plan fits"):
        failed.result(0)


def test_a_closed_agent_leaves_nobody_waiting(rank: Any) -> None:
    waiting: Future[int] = Future()
    rank.side.staged(VERSION, 0.5, 0.25, waiting)
    rank.side.shut()
    with pytest.raises(PublishError, match="closed before"):
        waiting.result(0)
    assert rank.wire.closed


async def test_a_version_is_digested_once_for_a_plan(rank: Any) -> None:
    """At STAGED; a grant finds it done, and a new plan does it again."""
    rank.side.prepare(VERSION)
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    await granted(rank)
    assert rank.owed.computed == 1
    await rank.side.connect(replace(CONNECT, fingerprint="edges of another plan"))
    await granted(rank, replace(GRANT, fingerprint="edges of another plan", round=RoundName(3, 2)))
    assert rank.owed.computed == 2


async def test_a_version_that_comes_again_is_read_again(rank: Any) -> None:
    """A step that FAILED is the same version with other weights."""
    known = SimpleNamespace(layout=rank.side._memory.layout)
    assert rank.side.read(VERSION, known) is FINITE
    rank.side.prepare(VERSION)
    assert rank.owed.computed == 1
    assert rank.side.read(VERSION, known) is FINITE
    assert rank.owed.computed == 2


async def test_nothing_is_known_of_slots_without_edges_or_that_the_daemon_does_not_know(rank: Any) -> None:
    assert rank.side.read(VERSION, SimpleNamespace(layout=Layout((), (), b""))) is NOWHERE
    rank.wire.refusal = NoRoute("e0/0 did not take the first word")
    with pytest.raises(NoRoute):
        await rank.side.connect(replace(CONNECT, fingerprint="other edges"))
    assert rank.side.read(VERSION, SimpleNamespace(layout=rank.side._memory.layout)) is NOWHERE
    assert rank.owed.computed == 0


async def test_the_transport_takes_the_version_before_it_is_reported(rank: Any) -> None:
    rank.side.prepare(VERSION)
    assert rank.wire.stages == [VERSION]
    assert rank.thread.said == []


async def test_a_connect_that_fails_leaves_no_plan_to_write_by(rank: Any) -> None:
    rank.side.staged(VERSION, 0.5, 0.25, Future())
    rank.wire.refusal = NoRoute("e0/0 did not take the first word")
    with pytest.raises(NoRoute):
        await rank.side.connect(replace(CONNECT, fingerprint="other edges"))
    assert "grant for the edges edges; this rank has none" in (await granted(rank)).error
    assert rank.wire.granted == []
    rank.wire.refusal = None
    await rank.side.connect(replace(CONNECT, fingerprint="other edges"))
    assert (await granted(rank, replace(GRANT, fingerprint="other edges", round=RoundName(3, 2)))).error == ""


async def test_another_daemon_may_choose_another_transport(rank: Any, tmp_path: Path) -> None:
    """The first one's endpoint stays open and is polled: a late write may still be in flight there."""
    rank.side.welcomed(welcome(FilesystemSettings(str(tmp_path))))
    assert rank.side.announcement() == Announce(layout=Layout((), (), b""))
    rank.wire.changed = True
    rank.side.poll()
    assert rank.thread.reconnects == 1
    rank.side.shut()
    assert rank.wire.closed


def test_an_outcome_of_an_earlier_staging_is_not_this_ones(rank: Any) -> None:
    """The daemon may tell it twice, the second time when the version is staged again already."""
    waiting: Future[int] = Future()
    rank.side.staged(VERSION, 0.5, 0.25, waiting, 1)
    assert rank.side.status().restaged == rank.thread.said[-1].restaged == 1
    rank.side.heard(Outcome(version=VERSION, committed=False, reason="no engine came"))
    assert not waiting.done()
    rank.side.heard(Outcome(version=VERSION, committed=True, sequence=3, restaged=1))
    assert waiting.result(0) == 3


# ------------------------------------------------------------------------------------------ slots that come later
NEEDS = Needs(tensors=(), quantized=(), fingerprint="f")


@pytest.fixture
async def follower(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A side without slots, welcomed; ``wires`` are the senders that were made for the slots that it was given."""
    thread, wires = Thread(), []

    def sender(memory: SourceMemory) -> Wire:
        wires.append(Wire())
        return wires[-1]

    monkeypatch.setitem(TRANSPORTS, NixlSettings, Transport(sender, NixlReceiver))
    side = TrainerSide(thread, None, 0)
    side.welcomed(welcome(NixlSettings()))
    return SimpleNamespace(side=side, thread=thread, wires=wires)


def slots_of(size: int) -> SourceMemory:
    layout = Layout((), (), b"", notes=(Note(0, size, "sharded", ""),))
    return SourceMemory(MEMBER, 1, layout, [torch.zeros(size, dtype=torch.uint8)], ())


async def test_without_slots_it_asks_for_needs_and_announces_nothing(follower: Any) -> None:
    assert follower.side.status() == TrainerStatus(follows_needs=True)
    assert follower.side.announcement() is None
    assert follower.wires == []
    follower.side.heard(NEEDS)
    assert follower.side.needs == NEEDS


async def test_slots_are_announced_when_they_come_and_replaced_when_others_do(follower: Any) -> None:
    for size in (8, 16):
        done = follower.side.hold(slots_of(size), size)
        await asyncio.sleep(0.01)
        done.result(timeout=0)
        assert follower.thread.announced == size // 8
        layout = follower.side.announcement().layout
        assert layout.notes[0].end_row == size
        await follower.side.connect(CONNECT)
    first, second = follower.wires
    assert (first.closed, second.closed) == (True, False)
    follower.side.staged(VERSION, 0.0, 0.0, Future())
    assert follower.thread.said[-1].bytes == 16


async def test_a_grant_for_the_edges_of_former_slots_is_refused(follower: Any) -> None:
    follower.side.hold(slots_of(8), 8)
    await asyncio.sleep(0.01)
    await follower.side.connect(CONNECT)
    follower.side.hold(slots_of(16), 16)
    await asyncio.sleep(0.01)
    follower.side.staged(VERSION, 0.0, 0.0, Future())
    follower.side.heard(GRANT)
    await asyncio.sleep(0.01)
    assert follower.thread.said[-1].error == "grant for the edges edges; this rank has none"


async def test_slots_that_no_transport_takes_are_the_trainers_to_know(
    follower: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(memory: SourceMemory) -> Wire:
        raise NoRoute("memory that no NIC reaches")

    monkeypatch.setitem(TRANSPORTS, NixlSettings, Transport(refuses, NixlReceiver))
    done = follower.side.hold(slots_of(8), 8)
    await asyncio.sleep(0.01)
    with pytest.raises(NoRoute):
        done.result(timeout=0)


async def test_a_group_that_wants_layouts_first_is_refused(follower: Any) -> None:
    place = TcpStoreRendezvous("127.0.0.1", 1, 1, 2, 1.0)
    with pytest.raises(ConversionTableError, match=r"tcpstore wants every layout .* give TrainerAgent a table"):
        follower.side.welcomed(replace(welcome(NixlSettings()), rendezvous=place))


def test_what_the_daemon_does_is_kept_for_whoever_waits(rank: Any) -> None:
    rank.side.heard(Standing(sentence="waiting for engines e0"))
    assert rank.side.standing == "waiting for engines e0"
