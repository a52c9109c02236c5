"""What peers say of a write's chunks reaches the edge that it is about, of this round and of no other."""

import numpy as np
from weightsync.agents.transport.nixl.cargo import Cargo, CargoChunk
from weightsync.agents.transport.nixl.edge import Edge
from weightsync.agents.transport.nixl.flow import Packer
from weightsync.agents.transport.nixl.loading import Loading
from weightsync.agents.transport.nixl.notices import Notice, decode
from weightsync.orchestrator.protocol.landing import Berth
from weightsync.orchestrator.protocol.names import RoundName

NOTHING = np.empty((0, 3), np.uint64)
ROUND, EARLIER = RoundName(2, 5), RoundName(2, 4)


def cargo_of(places):
    chunks = tuple(CargoChunk(n, 256, 0, None, NOTHING, NOTHING) for n in range(3))
    return Cargo(Berth(0, 0, 256, places, 768, places < 3), chunks, "DRAM", "DRAM")


def test_a_place_is_free_when_its_peer_says_so_of_this_round():
    loading = Loading(ROUND, None, Packer(None))
    a, b = (loading.begin(peer, cargo_of(1)) for peer in "ab")
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
    again, whole = (Edge("a", [], lambda region, offset: "", cargo_of(places)) for places in (1, 3))
    assert decode(loading.notice(again, again.cargo.chunks[2])) == Notice("landed", ROUND, 2)
    assert loading.notice(whole, whole.cargo.chunks[2]) == b""
