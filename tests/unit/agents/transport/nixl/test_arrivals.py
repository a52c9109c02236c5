"""Chunks that land: scattered one after the other, told of when that is done, and of no round but the open one."""

import asyncio

import pytest
import torch
from msgspec import structs
from row_parallel import connects, expected, masters, source, target
from weightsync.agents.transport import digesting
from weightsync.agents.transport.nixl import arrivals
from weightsync.agents.transport.nixl.arrivals import Arrivals, ChunksMissing, Inbound, inbound
from weightsync.agents.transport.nixl.errors import NixlError
from weightsync.agents.transport.nixl.notices import Notice
from weightsync.orchestrator.protocol.landing import Berth
from weightsync.orchestrator.protocol.layout import COPY_COLUMNS, as_matrix
from weightsync.orchestrator.protocol.names import Member, RoundName

ROUND, EARLIER, LATER = RoundName(1, 5), RoundName(1, 4), RoundName(1, 6)
SENDER = Member("trainer", "", 0)


class Hands:
    """In the place of a Packer: copies are done when the test says so."""

    def __init__(self):
        self.begun = []

    def begin(self, pack, shift):
        assert shift == 0
        self.begun.append((pack, asyncio.Future()))
        return self.begun[-1][1]

    def finish(self, number):
        self.begun[number][1].set_result(None)


class Rank:
    """Arrivals of one edge of five chunks in two places; copies are the numbers of their chunks."""

    def __init__(self, at_once=1):
        self.hands, self.told, self.deaf = Hands(), [], False
        self.arrivals = Arrivals(self.hands, self.tell, at_once)
        edge = Inbound(SENDER, "t-0", Berth(1, 0, 256, 2, 1280, passes=True), range(5))
        self.arrivals.connect([edge])

    def tell(self, peer, notice):
        if self.deaf:
            raise NixlError("it is gone")
        self.told.append((peer, notice))

    def lands(self, *chunks, round_name=ROUND, peer="t-0"):
        for chunk in chunks:
            self.arrivals.heard(peer, Notice("landed", round_name, chunk))

    @property
    def copied(self):
        return [pack for pack, _ in self.hands.begun]


async def test_a_chunk_is_scattered_and_then_its_sender_told():
    rank = Rank()
    rank.arrivals.begin(ROUND)
    rank.lands(0, 1)
    assert rank.arrivals.turn()
    assert not rank.arrivals.turn()
    assert (rank.copied, rank.told) == ([0], []), "one after the other"
    rank.hands.finish(0)
    assert rank.arrivals.turn()
    assert rank.copied == [0, 1]
    assert rank.told == [("t-0", Notice("scattered", ROUND, 0))]
    rank.arrivals.begin(ROUND)
    rank.hands.finish(1)
    rank.arrivals.turn()
    assert [notice.chunk for _, notice in rank.told] == [0, 1], "saying again that it is open changes nothing"


async def test_on_a_device_several_are_begun():
    rank = Rank(at_once=2)
    rank.arrivals.begin(ROUND)
    rank.lands(1, 0)
    rank.arrivals.turn()
    assert rank.copied == [1, 0]
    rank.hands.finish(1)
    rank.arrivals.turn()
    assert rank.told == [], "they are done in their order"


class Digests:
    """In the place of a CargoDigest: notes what was known of the round when it was asked to advance."""

    def __init__(self, rank):
        self.rank, self.seen = rank, []

    def begin(self):
        pass

    def advance(self, scattered):
        self.seen.append((sorted(scattered), len(self.rank.told), self.rank.copied))


async def test_what_senders_wait_for_comes_before_the_digests():
    rank = Rank(at_once=2)
    digests = Digests(rank)
    edge = Inbound(SENDER, "t-0", Berth(1, 0, 256, 4, 1280, passes=True), range(5), digests)
    rank.arrivals.connect([edge])
    rank.arrivals.begin(ROUND)
    rank.lands(0, 1, 2, 3)
    rank.arrivals.turn()
    assert (rank.copied, digests.seen) == ([0, 1], [])
    rank.hands.finish(0)
    rank.hands.finish(1)
    assert rank.arrivals.turn()
    assert digests.seen == [([0, 1], 2, [0, 1, 2, 3])], "once for all that was scattered, when all else has begun"


async def test_what_lands_is_scattered_before_anybody_is_told_of_what_was():
    rank = Rank(at_once=8)
    rank.arrivals.begin(ROUND)
    rank.lands(0)
    rank.arrivals.turn()
    rank.hands.finish(0)
    rank.lands(1)
    told_after = []
    begin = rank.hands.begin
    rank.hands.begin = lambda pack, shift: told_after.append(len(rank.told)) or begin(pack, shift)
    rank.arrivals.turn()
    assert (rank.copied, told_after, len(rank.told)) == ([0, 1], [0], 1)


async def test_only_chunks_of_the_open_round_count():
    rank = Rank()
    rank.lands(0)
    rank.arrivals.begin(ROUND)
    rank.lands(0, round_name=EARLIER)
    rank.lands(0, peer="stranger")
    rank.arrivals.heard("t-0", Notice("scattered", ROUND, 0))
    assert not rank.arrivals.turn()
    rank.arrivals.end(EARLIER)
    rank.lands(0)
    assert rank.arrivals.turn()
    rank.lands(1)
    rank.arrivals.end(ROUND)
    rank.hands.finish(0)
    rank.arrivals.turn()
    assert (rank.copied, rank.told) == ([0], [])


@pytest.mark.parametrize("chunk", [5, 2, 0])
async def test_a_chunk_that_cannot_have_landed_is_left_alone(chunk):
    """There is no fifth; chunk 0 is in the place of chunk 2 until it is scattered; and none lands twice."""
    rank = Rank()
    rank.arrivals.begin(ROUND)
    rank.lands(0)
    rank.arrivals.turn()
    rank.lands(chunk)
    rank.hands.finish(0)
    rank.arrivals.turn()
    assert rank.copied == [0]
    rank.lands(2)
    rank.arrivals.turn()
    assert rank.copied == [0, 2]


async def test_the_next_attempt_begins_anew_behind_what_the_last_one_left():
    rank = Rank()
    rank.arrivals.begin(EARLIER)
    rank.lands(0, 1, round_name=EARLIER)
    rank.arrivals.turn()
    rank.arrivals.begin(ROUND)
    rank.lands(0)
    rank.arrivals.turn()
    assert rank.copied == [0], "what the last attempt has begun comes before anything of this one"
    rank.hands.finish(0)
    rank.arrivals.turn()
    assert (rank.copied, rank.told) == ([0, 0], [])
    rank.hands.finish(1)
    rank.arrivals.turn()
    assert rank.told == [("t-0", Notice("scattered", ROUND, 0))]


async def test_what_is_missing_is_named():
    rank = Rank()
    rank.arrivals.begin(ROUND)
    rank.lands(0, 1)
    for number in (0, 1):
        rank.arrivals.turn()
        rank.hands.finish(number)
    rank.arrivals.turn()
    with pytest.raises(ChunksMissing, match="3 of 5 chunks from trainer/0 were not scattered, chunk 2 first"):
        rank.arrivals.check()
    rank.arrivals.connect([])
    rank.arrivals.check()


async def test_a_copy_that_fails_and_a_sender_that_is_gone_disturb_nobody():
    rank = Rank()
    rank.arrivals.begin(ROUND)
    rank.lands(0, 1)
    rank.arrivals.turn()
    rank.hands.begun[0][1].set_exception(RuntimeError("no device"))
    rank.deaf = True
    rank.arrivals.turn()
    rank.hands.finish(1)
    rank.arrivals.turn()
    assert (rank.copied, rank.told) == ([0, 1], [])
    with pytest.raises(ChunksMissing, match="chunk 0 first"):
        rank.arrivals.check()


def test_each_chunk_goes_from_its_place_to_its_rows():
    """By the real plan: half the columns of every matrix, through four places of 256 bytes."""
    sources, reader = [source(number, 2, 2048) for number in range(2)], target(1, 2, 2048)
    plan = connects({rank.member: (rank.layout, "", b"") for rank in (*sources, reader)})
    connect = plan[reader.member]
    edges = inbound(as_matrix(connect.copies, COPY_COLUMNS), connect.peers, reader.layout, reader.memory)
    weights = masters(1)
    due = expected(1, 2, weights).reshape(6, 64, 128)
    for edge in edges:
        rows = due[:, 32 * edge.member.rank : 32 * (edge.member.rank + 1)].reshape(-1)
        assert (len(edge.scatter), edge.berth.chunk_bytes) == (96, 256)
        for number, scatter in enumerate(edge.scatter):
            place = edge.berth.place(number)
            reader.memory[1][place : place + 256] = rows[256 * number : 256 * (number + 1)]
            scatter()
    assert torch.equal(reader.memory[0], due.reshape(-1))
    stays = [structs.replace(peer, berth=Berth(1, 0, 256, 96, 24576)) for peer in connect.peers]
    assert inbound(as_matrix(connect.copies, COPY_COLUMNS), stays, reader.layout, reader.memory) == ()


def test_what_lands_beside_batches_is_scattered_and_digested_beside_them(monkeypatch):
    asked = []

    def noted(prepare, name):
        return lambda *given, **options: asked.append((name, options)) or prepare(*given, **options)

    monkeypatch.setattr(arrivals, "prepare_copy", noted(arrivals.prepare_copy, "copy"))
    monkeypatch.setattr(digesting, "prepare", noted(digesting.prepare, "digest"))
    sources, reader = [source(number, 2, 2048) for number in range(2)], target(1, 2, 2048, "flip")
    connect = connects({rank.member: (rank.layout, "", b"") for rank in (*sources, reader)})[reader.member]
    digester = digesting.Digester(None)
    inbound(as_matrix(connect.copies, COPY_COLUMNS), connect.peers, reader.layout, reader.memory, digester)
    assert {name for name, _ in asked} == {"copy", "digest"}
    assert all(options == {"beside": "batches"} for _, options in asked)
