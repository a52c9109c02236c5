"""The order of one edge's chunks: packed ahead, posted when packed, and where places come again, when they are free."""

import asyncio
import gc
import weakref
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from weightsync.agents.transport.nixl.cargo import Cargo, CargoChunk
from weightsync.agents.transport.nixl.flow import Flow, Loading, Packer
from weightsync.agents.transport.nixl.notices import Notice, decode
from weightsync.agents.transport.nixl.ring import NO_PLACE, PackingRing
from weightsync.orchestrator.protocol.landing import Berth
from weightsync.orchestrator.protocol.layout import Region
from weightsync.orchestrator.protocol.names import RoundName

NOTHING = np.empty((0, 3), np.uint64)


class Hands:
    """In the place of a Packer: chunks are packed when the test says so."""

    def __init__(self):
        self.begun, self.shifts = [], []

    def begin(self, pack, shift):
        self.shifts.append(shift)
        self.begun.append(asyncio.Future())
        return self.begun[-1]


def pack(shift=0): ...


def cargo_of(packed, *, straight=0, places=None):
    count = packed + straight
    chunks = [
        CargoChunk(n, 256, 256 if n < packed else 0, pack if n < packed else None, NOTHING, NOTHING)
        for n in range(count)
    ]
    return Cargo(Berth(0, 0, 256, places or count, 256 * count, places is not None), tuple(chunks), "DRAM", "DRAM")


def flow_of(cargo, ring_places):
    ring, hands = PackingRing(Region(4096, 256 * ring_places)), Hands()
    return Flow("peer", cargo, ring, hands), ring, hands


async def test_chunks_are_packed_ahead_and_posted_in_their_order():
    flow, _, hands = flow_of(cargo_of(3, straight=1), 2)
    assert flow.next() is None
    assert hands.shifts == [0, 256], "as many as there are places"
    hands.begun[1].set_result(None)
    assert flow.next() is None, "the first is not packed yet"
    assert flow.waits_for() == "chunk 0 of 4 is being packed"
    hands.begun[0].set_result(None)
    assert [flow.next()[0].number, flow.next()[0].number, flow.next()] == [0, 1, None]
    assert flow.waits_for() == "chunk 2 of 4 waits for a place to be packed in"
    flow.give(0)
    assert flow.next() is None
    hands.begun[2].set_result(None)
    assert flow.next()[1] == 0, "the place that was given back"
    chunk, place = flow.next()
    assert (chunk.number, place) == (3, NO_PLACE)
    assert not flow.open
    assert flow.waits_for() == ""


async def test_a_chunk_is_packed_when_what_it_is_read_from_is_filled():
    cargo, filled = cargo_of(2, straight=1), [0]
    chunks = tuple(replace(chunk, needs=100 * (chunk.number + 1)) for chunk in cargo.chunks)
    ring, hands = PackingRing(Region(4096, 1024)), Hands()
    flow = Flow("peer", replace(cargo, chunks=chunks), ring, hands, filled=lambda: filled[0])
    assert flow.next() is None
    assert (hands.shifts, flow.waits_for_slots) == ([], True)
    assert flow.waits_for() == "chunk 0 of 3 is still being converted"
    filled[0] = 199
    assert flow.next() is None
    assert hands.shifts == [0], "the second needs 200"
    assert not flow.waits_for_slots, "the first is being packed"
    hands.begun[0].set_result(None)
    assert flow.next()[0].number == 0
    assert flow.waits_for_slots
    filled[0] = 200
    flow.next()
    hands.begun[1].set_result(None)
    assert [flow.next()[0].number, flow.next()] == [1, None]
    filled[0] = 300
    assert flow.next()[0].number == 2
    assert not flow.open


async def test_a_chunk_waits_for_the_one_in_its_place_to_be_scattered():
    flow, _, hands = flow_of(cargo_of(3, places=2), 8)
    flow.next()
    assert len(hands.begun) == 3, "the third is packed meanwhile"
    assert not flow.waits_for_peer
    for one in hands.begun:
        one.set_result(None)
    assert [flow.next()[0].number, flow.next()[0].number, flow.next()] == [0, 1, None]
    assert flow.waits_for_peer
    assert flow.waits_for() == "chunk 2 of 3 waits for the peer to scatter chunk 0"
    flow.scattered(1)
    assert flow.next() is None
    flow.scattered(0)
    assert not flow.waits_for_peer
    assert flow.next()[0].number == 2
    assert flow.open
    assert flow.waits_for() == "the peer has yet to scatter 1 of 3 chunks"
    flow.scattered(2)
    assert not flow.open


async def test_nothing_is_packed_ahead_in_a_place_that_another_edge_may_want():
    ring, hands = PackingRing(Region(4096, 256)), Hands()
    slow, quick = (Flow(peer, cargo_of(2, places=1), ring, hands) for peer in ("slow", "quick"))
    slow.next()
    hands.begun[0].set_result(None)
    _, place = slow.next()
    slow.give(place)
    assert slow.next() is None
    assert (len(hands.begun), slow.waits_for_peer) == (1, True), "its peer has no place, and there is one here"
    quick.next()
    assert len(hands.begun) == 2
    hands.begun[1].set_result(None)
    assert quick.next()[0].number == 0


async def test_what_was_packed_ahead_makes_room_for_an_edge_that_begins_later():
    ring, hands = PackingRing(Region(4096, 256 * 6)), Hands()
    hangs = Flow("hangs", cargo_of(9, places=1), ring, hands)
    hangs.next()
    for one in hands.begun:
        one.set_result(None)
    assert (hangs.next()[0].number, hangs.next(), len(hands.begun)) == (0, None, 5)
    later = Flow("later", cargo_of(9, places=9), ring, hands)
    for turns in range(3):
        assert hangs.next() is None
        assert later.next() is None
        assert len(hands.begun) == 6 + turns, "two places come back, one at a time, as they are wanted"
    later.next()
    assert len(hands.begun) == 8, "each has its part"
    hangs.scattered(0)
    assert hangs.next()[0].number == 1
    hangs.scattered(1)
    assert hangs.next()[0].number == 2
    hangs.scattered(2)
    assert hangs.next() is None
    assert hangs.waits_for() == "chunk 3 of 9 waits for a place to be packed in", "it is packed again"


async def test_where_chunks_pass_all_of_them_are_waited_for_however_many_places_there_are():
    flow, _, hands = flow_of(cargo_of(1, places=4), 8)
    flow.next()
    hands.begun[0].set_result(None)
    flow.next()
    assert flow.open
    flow.scattered(0)
    assert not flow.open


async def test_one_that_is_stopped_gives_its_places_back_when_nothing_writes_to_them():
    flow, ring, hands = flow_of(cargo_of(3), 2)
    flow.next()
    hands.begun[0].set_result(None)
    posted = flow.next()
    flow.stop()
    assert not flow.open
    assert flow.next() is None
    other = Flow("other", cargo_of(1), ring, hands)
    assert other.next() is None
    assert other.lost() == "no packing chunk is left: writes to peer have not ended"
    hands.begun[1].set_result(None)
    await asyncio.sleep(0)
    assert other.lost() == ""
    assert other.next() is None
    assert hands.shifts[-1] == 256
    flow.give(posted[1])
    flow.stop()


async def test_what_goes_wrong_in_packing_is_raised_and_its_place_free():
    flow, ring, hands = flow_of(cargo_of(1), 1)
    flow.next()
    hands.begun[0].set_exception(MemoryError("no memory"))
    with pytest.raises(MemoryError):
        flow.next()
    flow.stop()
    other = Flow("other", cargo_of(1), ring, hands)
    other.next()
    assert len(hands.begun) == 2


async def test_the_cpu_packs_beside_the_loop():
    packed = []
    packing = Packer(None).begin(packed.append, 512)
    await asyncio.wait_for(packing, 10.0)
    assert packed == [512]


class Stream:
    """In the place of a CUDA stream, whose work is done as far as the test says."""

    device = torch.device("cuda:0")

    def __init__(self, monkeypatch):
        self.done, self.given, current = 0, 0, []
        monkeypatch.setattr(torch.cuda, "Event", lambda: Event(self))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(current.append(stream)))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])


class Event:
    def __init__(self, stream):
        self.stream = stream

    def record(self, stream):
        stream.given += 1
        self.number = stream.given

    def query(self):
        return self.stream.done >= self.number


def test_what_a_device_has_yet_to_pack_is_kept_although_its_edge_is_given_back(monkeypatch):
    """Its tables are read when the stream comes to it; freed, they would be others' memory by then."""
    packer = Packer(stream := Stream(monkeypatch))
    tables = [Table() for _ in range(3)]
    known = [weakref.ref(table) for table in tables]
    packings = [packer.begin(tables.pop(0), 0) for _ in range(2)]
    assert not any(packing.done() for packing in packings)
    packings.clear()
    gc.collect()
    assert [table() is not None for table in known] == [True, True, True]
    stream.done = 2
    assert not packer.begin(tables.pop(), 0).done()
    gc.collect()
    assert [table() is not None for table in known] == [False, False, True], "and not for ever"


class Table:
    """A prepared copy."""

    def __call__(self, shift=0): ...


# ------------------------------------------------------------------------------------------------ a write's flows
ROUND, EARLIER = RoundName(2, 5), RoundName(2, 4)


def test_a_place_is_free_when_its_peer_says_so_of_this_round():
    loading = Loading(ROUND, None, Packer(None))
    a, b = (loading.begin(peer, cargo_of(0, straight=3, places=1)) for peer in "ab")
    assert a.next()[0].number == b.next()[0].number == 0
    loading.heard("a", Notice("scattered", EARLIER, 0))
    loading.heard("a", Notice("landed", ROUND, 0))
    loading.heard("stranger", Notice("scattered", ROUND, 0))
    assert a.next() is None
    loading.heard("a", Notice("scattered", ROUND, 0))
    assert a.next()[0].number == 1
    assert b.next() is None


def test_only_a_peer_that_has_to_scatter_meanwhile_is_told_of_a_chunk():
    loading = Loading(ROUND, None, Packer(None))
    again, whole = cargo_of(0, straight=3, places=1), cargo_of(0, straight=3)
    assert decode(loading.notice(again, again.chunks[2])) == Notice("landed", ROUND, 2)
    assert loading.notice(whole, whole.chunks[2]) == b""


async def test_an_edge_that_packs_nothing_takes_no_part_of_the_ring():
    ring, hands = PackingRing(Region(4096, 512)), Hands()
    Flow("straight", cargo_of(0, straight=3), ring, hands)
    packs = Flow("packs", cargo_of(2), ring, hands)
    packs.next()
    assert hands.shifts == [0, 256]
