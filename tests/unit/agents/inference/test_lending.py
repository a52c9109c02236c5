"""A rank that lends what it serves to another one, over real NIXL and by the daemon's plan; and when it does not."""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from weightsync.agents.inference.holdings import Holdings
from weightsync.agents.inference.lending import UNREAD, Lending
from weightsync.agents.inference.weights import LiveWeights, landing_arenas
from weightsync.agents.memory.arena import host_arena, region_of
from weightsync.agents.transport.interface import Receiver, Sender, SourceMemory, TargetMemory
from weightsync.agents.transport.registry import TRANSPORTS, Transport
from weightsync.agents.transport.shares import NOT_READ, Reading
from weightsync.orchestrator.core.commands import Announced, MakePlan
from weightsync.orchestrator.daemon.planning import Planning
from weightsync.orchestrator.protocol.edges import Peer
from weightsync.orchestrator.protocol.landing import arena_bytes
from weightsync.orchestrator.protocol.layout import Lands, Layout, Tensor, row
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Announce,
    Closed,
    Connect,
    Grant,
    NixlSettings,
    Ready,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Member, RoundName, Version

CPU = torch.device("cpu")
LENDER, BORROWER, FOLLOWER = (Member("inference", name, 0) for name in ("e0", "e1", "e2"))
VERSION, ROUND, AFTER = Version(7, 3), RoundName(1, 5), RoundName(1, 6)
PATIENCE = 20.0
NOBODY = Peer(BORROWER, 1, "", b"", ())


@dataclass
class Model:
    layout: Layout
    tensors: list[torch.Tensor]
    standby_tensors: list[torch.Tensor] = field(default_factory=lambda: [host_arena(1 << 17)])
    no_flip: str = ""

    def check(self) -> None: ...

    def refresh(self) -> None: ...

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None: ...

    def rebalanced(self, known: str) -> None:
        return None

    def flip(self) -> None: ...

    def settle(self) -> None: ...


def welcome(lends: bool = True) -> Welcome:
    return Welcome(
        epoch=1, journal_id="j", heartbeat_seconds=1.0, lost_after_heartbeats=3, transport=NixlSettings(),
        rendezvous=None, lends=lends,
    )  # fmt: skip


def model(seed: int) -> Model:
    """A dense matrix of 48 KiB, one of which every second column is ours, and a vector."""
    memory = host_arena(1 << 17)
    memory.copy_(torch.randint(0, 256, (1 << 17,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))
    tensors = (
        Tensor("a", "bfloat16", (96, 256)), Tensor("b", "bfloat16", (32, 256)), Tensor("c", "float32", (100,)),
    )  # fmt: skip
    rows = np.array([
        row(0, 0, 0, (0, 0), (96, 256), (512, 2)),
        row(1, 0, 65536, (0, 0), (32, 256), (1024, 4)),
        row(2, 0, 114688, (0,), (100,), (4,)),
    ], dtype="<i8")  # fmt: skip
    return Model(Layout(tensors, (region_of(memory),), rows.tobytes()), [memory])


class Thread:
    """In the place of the agent's thread, on the test's loop."""

    def __init__(self) -> None:
        self.epoch = 1
        self.said: asyncio.Queue[Any] = asyncio.Queue()
        self.tasks: list[asyncio.Task[None]] = []

    def send(self, message: Any) -> bool:
        self.said.put_nowait(message)
        return True

    say_once = send

    def announce(self) -> None: ...

    def reconnect(self) -> None: ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        self.tasks.append(asyncio.get_running_loop().create_task(work))
        return self.tasks[-1]

    async def hears(self, kind: type) -> Any:
        """The next word of this kind."""
        async with asyncio.timeout(PATIENCE):
            while not isinstance(said := await self.said.get(), kind):
                pass
        return said


class Rank:
    """One rank of an engine, with what it lends by."""

    def __init__(self, member: Member, seed: int, lands: Lands, landing: int | None = None) -> None:
        self.member, self.model, self.thread = member, model(seed), Thread()
        self.connected: Connect
        """By which it is written to …"""
        self.lends: Connect
        """… and by which it writes."""
        size = arena_bytes(self.model.layout) if landing is None else landing
        self.weights = LiveWeights(self.model, CPU, landing_arenas(size, CPU), lands)
        self.holdings = Holdings()
        self.lending = Lending(self.weights, self.holdings)
        self.lending.attach(self.thread, member)
        self.weights.open(member, NixlSettings())
        self.lending.welcomed(welcome())

    def announced(self) -> Announced:
        name, endpoint = self.weights.receivers.current.announcement()
        lends_name, lends = self.lending.announcement()
        layout = self.weights.layout
        said = Announce(layout=layout, endpoint_name=name, endpoint=endpoint, lends_name=lends_name, lends=lends)
        return Announced(self.member, 100, said)

    def poll(self) -> None:
        self.weights.receivers.current.poll()
        self.lending.poll()


@asynccontextmanager
async def polled(*ranks: Rank) -> AsyncIterator[None]:
    """Both sides' transports make progress meanwhile."""

    async def work() -> None:
        while True:
            for rank in ranks:
                rank.poll()
            await asyncio.sleep(0.0005)

    task = asyncio.get_running_loop().create_task(work())
    try:
        yield
    finally:
        for each in (task, *(task for rank in ranks for task in rank.thread.tasks)):
            each.cancel()
        await asyncio.gather(task, return_exceptions=True)


def grant(connect: Connect, **more: Any) -> Grant:
    fields = {"round": ROUND, "version": VERSION, "fingerprint": connect.fingerprint, "members": (BORROWER,)}
    return Grant(**{**fields, "deadline_seconds": PATIENCE, **more})


async def lent(lender: Rank, borrower: Rank, round_name: RoundName = ROUND) -> tuple[Closed, Connect]:
    """A round's grant, as the daemon gives it; what the lender says at its end."""
    lender.holdings.committed(VERSION)
    parties = (lender.announced(),), (borrower.announced(),)
    facts = Planning().make(MakePlan(1, *parties, lends=True))
    connect = facts.connects[lender.member]
    assert (connect.lends, facts.connects[borrower.member].lends) == (True, False)
    lender.lending.prepare(connect)
    lender.lends = connect
    borrower.connected = facts.connects[borrower.member]
    assert await borrower.weights.connect(borrower.connected) == {}
    assert await lender.thread.hears(Ready) == Ready(fingerprint=connect.fingerprint)
    borrower.weights.receivers.current.begin(round_name)
    lender.lending.granted(grant(connect, round=round_name, members=(borrower.member,)))
    closed = await lender.thread.hears(Closed)
    borrower.weights.receivers.current.end(round_name)
    return closed, connect


@pytest.mark.parametrize(
    ("lends", "borrows", "landing"),
    [
        ("copy", "copy", None),
        ("live", "copy", None),
        ("copy", "live", 8192),
        ("flip", "copy", None),
        ("flip", "live", 8192),
        pytest.param("live", "live", 0, id="without a landing"),
    ],
)
async def test_what_is_served_arrives_bit_for_bit(lends: Lands, borrows: Lands, landing: int | None) -> None:
    """Also by a landing that is gone through many times, of which the borrower tells the lender; and from pages, of
    which nothing is registered."""
    lender, borrower = Rank(LENDER, 1, lends), Rank(BORROWER, 2, borrows, landing)
    right = lender.weights.digest()
    assert borrower.weights.digest() != right
    async with polled(lender, borrower):
        closed, connect = await lent(lender, borrower)
        (sent,) = closed.peers
        assert (closed.final, closed.error, sent.error) == (True, "", "")
        assert (sent.peer, sent.bytes, sent.digest) == (BORROWER, lender.weights.bytes, right)
        if borrows == "copy":
            assert borrower.weights.landed(VERSION) == right
            borrower.weights.take(VERSION)
        else:
            borrower.weights.arrive(VERSION)
        lender.lending.granted(grant(connect))
        assert await lender.thread.hears(Closed) == closed, "said again it is one grant"
    assert borrower.weights.digest() == right == lender.weights.digest()
    first, second = lender.model.tensors[0], borrower.model.tensors[0]
    assert torch.equal(first[:49152], second[:49152])
    assert torch.equal(first[65536:98304].view(torch.int16)[::2], second[65536:98304].view(torch.int16)[::2])
    assert not torch.equal(first[98304:114688], second[98304:114688]), "what no row names is not touched"
    assert lender.lending.open_rounds == ()


async def relayed(seed: Rank, follower: Rank, main: Connect) -> tuple[Closed, Connect]:
    """The second wave of a round: what the seed has verified, by ``main``, goes on to the follower."""
    parties = (seed.announced(),), (follower.announced(),)
    facts = Planning().make(MakePlan(2, *parties, lends=True, standby={seed.member: main}))
    writes, reads = facts.connects[seed.member], facts.connects[follower.member]
    assert ((writes.lends, writes.relays), (reads.lends, reads.relays)) == ((True, True), (False, True))
    assert await follower.weights.connect(reads) == {}
    seed.lending.prepare(writes)
    assert await seed.thread.hears(Ready) == Ready(fingerprint=writes.fingerprint)
    follower.weights.receivers.current.begin(AFTER, relays=True)
    seed.lending.granted(grant(writes, round=AFTER, members=(follower.member,)))
    closed = await seed.thread.hears(Closed)
    follower.weights.receivers.current.end(AFTER)
    return closed, writes


@pytest.mark.parametrize("follows", ["copy", "flip"])
@pytest.mark.parametrize("mode", ["copy", "flip"])
async def test_what_is_verified_is_relayed_bit_for_bit_before_it_is_served(mode: Lands, follows: Lands) -> None:
    """Out of a landing whose bytes lie in the order of the plan, and out of pages that nothing may read but the ring;
    beside the edges by which each takes what the trainer writes."""
    origin, seed, follower = Rank(BORROWER, 1, "live"), Rank(LENDER, 2, mode), Rank(FOLLOWER, 3, follows)
    right, served = origin.weights.digest(), seed.weights.digest()
    async with polled(origin, seed, follower):
        await lent(origin, seed)
        await lent(origin, follower, RoundName(1, 4))
        assert seed.weights.landed(VERSION) == right
        seed.holdings.keep(VERSION, right)
        forget(follower)
        closed, writes = await relayed(seed, follower, seed.connected)
        (sent,) = closed.peers
        assert (closed.final, closed.error, sent.error) == (True, "", "")
        assert (sent.peer, sent.bytes, sent.digest) == (FOLLOWER, seed.weights.bytes, right)
        assert follower.weights.landed(VERSION) == right
        if follows == "copy":
            follower.weights.take(VERSION)
            assert follower.weights.digest() == right
        assert seed.weights.digest() == served, "what it serves meanwhile is what it was"
        seed.holdings.keep(None)
        seed.lending.granted(grant(writes, round=RoundName(1, 7), members=(FOLLOWER,)))
        refused = await seed.thread.hears(Closed)
        assert refused.error == f"this rank has nothing in its standby, not {VERSION}"
        await lent(origin, follower, RoundName(1, 8))  # by the edges that it has kept
        assert follower.weights.landed(VERSION) == right


def forget(rank: Rank) -> None:
    """What has landed there is nothing that a test may take for what comes."""
    rank.weights.tensors[-1].zero_()
    for tensor in rank.model.standby_tensors:
        tensor.zero_()


async def test_what_has_landed_by_another_plan_is_not_relayed() -> None:
    origin, seed = Rank(BORROWER, 1, "live"), Rank(LENDER, 2, "copy")
    async with polled(origin, seed):
        await lent(origin, seed)
        other = Connect(
            fingerprint="x", root="", peers=(NOBODY,), copies=b"", expected_bytes=0, lends=True, relays=True,
            landed=seed.connected.fingerprint + "?",
        )  # fmt: skip
        seed.lending.prepare(other)
        (failed,) = (await seed.thread.hears(Ready)).failed
    assert "it has nothing to relay" in failed.error


class NoSender(Sender):
    """A transport's end by which nothing is ever written."""

    def __init__(self, memory: SourceMemory) -> None: ...

    def open(self, settings: Any) -> None: ...

    async def write(self, *arguments: Any) -> None:
        raise AssertionError("nothing is to be written")


class NoReceiver(Receiver):
    lands_beside = True

    def __init__(self, memory: TargetMemory) -> None: ...

    def open(self, settings: Any) -> None: ...

    def renew(self, memory: TargetMemory) -> None: ...

    def arrive(self, version: Version) -> None: ...


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Rank:
    """A rank in copy whose transport opens nothing."""
    monkeypatch.setitem(TRANSPORTS, NixlSettings, Transport(NoSender, NoReceiver))
    return Rank(LENDER, 1, "copy")


@pytest.mark.parametrize(
    ("more", "objection"),
    [
        ({"version": Version(7, 4)}, "this rank holds step 3 (generation 7), not step 4 (generation 7)"),
        ({"fingerprint": "of another feed"}, "grant for the edges of another f; this rank has none"),
        ({"round": RoundName(2, 5)}, "grant of epoch 2; this agent obeys epoch 1"),
        ({"fingerprint": "", "version": Version(7, 3)}, f"this rank holds {VERSION}, torn, not {VERSION}"),
    ],
)
async def test_it_lends_what_it_was_asked_for_or_nothing(more: dict[str, Any], objection: str, silent: Rank) -> None:
    lender = silent
    lender.holdings.committed(VERSION)
    lender.holdings.tear("torn" in objection)
    lender.lending.granted(grant(Connect(fingerprint="", root="", peers=(), copies=b"", expected_bytes=0), **more))
    closed = await lender.thread.hears(Closed)
    assert (closed.final, closed.peers, closed.error, closed.fault) == (True, (), objection, "engine")


async def test_in_no_feed_it_is_told_by_which_endpoint_a_peer_is_reached() -> None:
    """For the sake of what may still be on its way to the one before. It lends nothing by that."""
    lender, borrower = Rank(LENDER, 1, "copy"), Rank(BORROWER, 2, "copy")
    async with polled(lender, borrower):
        await lent(lender, borrower)
        borrower.weights.receivers.current.reopen()
        said = borrower.announced()
        peer = Peer(BORROWER, said.incarnation, said.announce.endpoint_name, said.announce.endpoint, ())
        rest = Connect(fingerprint="rest", root="", peers=(peer,), copies=b"", expected_bytes=0, lends=True)
        lender.lending.prepare(rest)
        assert await lender.thread.hears(Ready) == Ready(fingerprint="rest")
        lender.lending.granted(grant(rest, round=RoundName(1, 6)))
        (sent,) = (await lender.thread.hears(Closed)).peers
    assert (sent.bytes, sent.error) == (0, "")


@pytest.mark.parametrize("transports", ["tcp,self", "tcp,self,sm"])
async def test_a_writer_that_wakes_up_reaches_nothing_of_who_has_taken_a_spare(
    transports: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has all that it needs to write where the landing was, and writes. What it was granted comes from another."""
    monkeypatch.setenv("UCX_TLS", transports)
    late, lender, borrower = Rank(LENDER, 1, "copy"), Rank(FOLLOWER, 4, "copy"), Rank(BORROWER, 2, "copy")
    right = lender.weights.digest()
    async with polled(late, lender, borrower):
        await lent(late, borrower)
        reached = borrower.weights.tensors[-1]
        borrower.weights.replace_landing()
        borrower.lending.renew()
        await lent(lender, borrower, AFTER)
        assert borrower.weights.landed(VERSION) == right
        late.lending.granted(grant(late.lends, round=RoundName(1, 7)))
        (sent,) = (await late.thread.hears(Closed)).peers
        assert bool(sent.error) != bool(reached.any()), "it fails, or has written into what is nobody's"
        assert borrower.weights.landed(VERSION) == right
        borrower.weights.take(VERSION)
    assert borrower.weights.digest() == right


async def test_who_has_taken_a_spare_lends_by_another_end() -> None:
    lender, borrower = Rank(LENDER, 1, "copy"), Rank(BORROWER, 2, "copy")
    name, _ = lender.lending.announcement()
    lender.weights.replace_landing()
    lender.lending.renew()
    assert lender.lending.announcement()[0] not in ("", name)
    async with polled(lender, borrower):
        (sent,) = (await lent(lender, borrower))[0].peers
        assert (sent.bytes, sent.error) == (lender.weights.bytes, "")
        assert borrower.weights.landed(VERSION) == lender.weights.digest()


async def test_nothing_is_posted_any_more_when_another_version_is_about_to_land() -> None:
    lender, borrower = Rank(LENDER, 1, "copy"), Rank(BORROWER, 2, "live", 8192)
    lender.holdings.committed(VERSION)
    async with polled(lender):  # the borrower does not move, so that the lender cannot end
        facts = Planning().make(MakePlan(1, (lender.announced(),), (borrower.announced(),), lends=True))
        connect = facts.connects[LENDER]
        await borrower.weights.connect(facts.connects[BORROWER])
        async with polled(borrower):
            lender.lending.prepare(connect)
            await lender.thread.hears(Ready)
        lender.lending.granted(grant(connect))
        assert lender.lending.open_rounds == (ROUND,)
        assert not lender.lending.stop(Abort(round=RoundName(1, 4), torn=False, reason="an older round"))
        async with polled(borrower):
            lender.lending.changes()
            closed = await lender.thread.hears(Closed)
    assert "another version lands here" in closed.peers[0].error
    assert lender.lending.open_rounds == ()


async def test_a_digest_that_hangs_keeps_no_borrower() -> None:
    """The device does not answer, and the agent's thread does: nothing was posted, so it says so."""
    lender, borrower = Rank(LENDER, 1, "copy"), Rank(BORROWER, 2, "live", 8192)
    lender.holdings.committed(VERSION)
    computing, go_on = threading.Event(), threading.Event()

    def hangs() -> Reading:
        computing.set()
        assert go_on.wait(PATIENCE), "the test lets it go on"
        return NOT_READ

    async with polled(lender, borrower):
        facts = Planning().make(MakePlan(1, (lender.announced(),), (borrower.announced(),), lends=True))
        lender.lending.prepare(facts.connects[LENDER])
        await lender.thread.hears(Ready)
        lender.lending._shares.read = hangs  # type: ignore[method-assign]
        lender.lending.granted(grant(facts.connects[LENDER]))
        assert await asyncio.to_thread(computing.wait, PATIENCE)
        assert lender.lending.stop(Abort(round=ROUND, torn=False, reason="it took too long", members=(BORROWER,)))
        closed = await lender.thread.hears(Closed)
        go_on.set()
    assert closed.final
    assert [(end.peer, end.error) for end in closed.peers] == [(BORROWER, "the daemon ended it: it took too long")]
    assert lender.lending.open_rounds == ()


async def test_what_moves_is_neither_offered_nor_lent(silent: Rank) -> None:
    """Experts do, while the engine serves."""
    rank = silent
    lending = Lending(rank.weights, rank.holdings)
    rank.weights.layout = msgspec.structs.replace(rank.weights.layout, expert_map="of 8")
    lending.attach(rank.thread, LENDER)
    lending.welcomed(welcome())
    assert lending.announcement() == ("", b"")
    connect = Connect(fingerprint="edges", root="", peers=(NOBODY,), copies=b"", expected_bytes=0, lends=True)
    lending.prepare(connect)
    (failed,) = (await rank.thread.hears(Ready)).failed
    assert failed.error == UNREAD
    lending.granted(grant(connect))
    assert (await rank.thread.hears(Closed)).error == UNREAD
    assert lending.open_rounds == ()


def test_a_daemon_that_lends_nothing_has_nothing_opened(silent: Rank) -> None:
    rank = silent
    lending = Lending(rank.weights, rank.holdings)
    lending.attach(rank.thread, LENDER)
    lending.welcomed(welcome(lends=False))
    assert lending.announcement() == ("", b"")
    assert not lending.poll()
