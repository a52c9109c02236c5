"""Cargo that passes a landing of a few KiB, over real NIXL into other processes: places come again dozens of times."""

import json
import re
import signal

import pytest
from landing_fleet import CHUNK, CHUNKS, fleet
from row_parallel import expected, fill, masters
from weightsync.agents.tables.runs import digest_table
from weightsync.kernels.digest import digest

__all__ = ["fleet"]


@pytest.mark.parametrize(("lands", "tls"), [("live", "all"), ("flip", "tcp")])
async def test_several_writers_and_readers_version_after_version(fleet, monkeypatch, lands, tls):
    monkeypatch.setenv("UCX_TLS", tls)
    two = fleet(2, 2, 2048, 2048, lands=lands)
    await two.connect()
    berths = [peer.berth for connect in two.plan.values() for peer in connect.peers]
    assert {(berth.chunk_bytes, berth.places, berth.chunks, berth.passes) for berth in berths} == {
        (CHUNK, 4, CHUNKS, True)
    }
    for seed in (1, 2):
        weights = masters(seed)
        await two.begin(weights)
        ends = await two.write()
        assert {(end.error, end.bytes, end.descriptors) for end in ends.values()} == {("", CHUNK * CHUNKS, CHUNKS)}
        assert len(ends) == 4
        for peer in two.peers:
            await two.arrived(weights, peer)
            found = json.loads(await peer.ask("digest"))
            assert found == (digest_of(peer, weights) if lands == "flip" else None)
            assert json.loads(await peer.ask("digest")) is None, "what is there afterwards is another question"


def digest_of(peer, weights):
    """As a digest of all of its memory has it."""
    due = expected(peer.member.rank, 2, weights)
    return list(digest([due], digest_table(peer.layout.matrix(), peer.layout)))


async def test_more_edges_than_places_of_the_ring_share_them(fleet):
    one = fleet(1, 2, 2048, 256)
    await one.connect()
    weights = masters(3)
    await one.begin(weights)
    assert [end.error for end in (await one.write()).values()] == ["", ""]
    for peer in one.peers:
        await one.arrived(weights, peer)


async def test_a_reader_that_is_killed_at_a_chunk_costs_its_own_edges_only(fleet):
    two = fleet(2, 2, 2048, 2048)
    await two.connect()
    weights = masters(4)
    await two.begin(weights)
    await two.peers[1].ask("SIGKILL", 40)
    ends = await two.write()
    assert {key for key, end in ends.items() if end.error} == {(0, 1), (1, 1)}
    assert len(ends) == 4
    for number in (0, 1):
        assert 0 < ends[number, 1].bytes < CHUNK * CHUNKS
        assert re.search(r"chunk \d+ of 96|scatter \d+ of 96 chunks", ends[number, 1].error)
    await two.arrived(weights, two.peers[0])


async def test_a_connection_that_breaks_in_mid_write_costs_nobody_the_round(fleet, monkeypatch):
    """Another one takes its place, over which only that goes again which has not been scattered."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    two = fleet(2, 2, 2048, 2048, lands="flip")
    await two.connect()
    for seed in (11, 12):
        weights = masters(seed)
        await two.begin(weights)
        await two.peers[1].ask("SEVER", 60)
        ends = await two.write()
        assert {(end.error, end.bytes) for end in ends.values()} == {("", CHUNK * CHUNKS)}
        anew = [ends[number, 1].descriptors for number in (0, 1)]
        assert min(anew) <= CHUNKS - 52, "of the one whose chunk it was, all that came before were scattered"
        assert [ends[number, 0].descriptors for number in (0, 1)] == [CHUNKS, CHUNKS]
        for peer in two.peers:
            await two.arrived(weights, peer)
            assert json.loads(await peer.ask("digest")) == digest_of(peer, weights)


async def test_a_connection_that_breaks_is_made_anew_while_another_reader_hangs(fleet, monkeypatch):
    monkeypatch.setenv("UCX_TLS", "tcp")
    two = fleet(2, 2, 2048, 2048, lands="flip")
    await two.connect()
    weights = masters(13)
    await two.begin(weights)
    await two.peers[0].ask("SIGSTOP", 30)
    await two.peers[1].ask("SEVER", 60)
    ends = await two.write(seconds=5.0)
    assert (ends[0, 1].error, ends[1, 1].error) == ("", "")
    await two.arrived(weights, two.peers[1])


async def test_a_reader_that_hangs_is_named_with_its_chunk_and_comes_back_with_the_next_attempt(fleet):
    """What it hears of the first attempt when it goes on is of no round that is open any more."""
    two = fleet(2, 2, 2048, 2048)
    await two.connect()
    first, second = masters(5), masters(6)
    await two.begin(first)
    await two.peers[1].ask("SIGSTOP", 30)
    ends = await two.write(seconds=5.0)
    assert (ends[0, 0].error, ends[1, 0].error) == ("", "")
    await two.arrived(first, two.peers[0])
    two.peers[1].process.send_signal(signal.SIGCONT)
    await two.ended(ends)
    for number in (0, 1):
        assert "the deadline passed" in ends[number, 1].error
        assert "waits for the peer to scatter chunk" in ends[number, 1].error
    await two.begin(second)
    assert {end.error for end in (await two.write()).values()} == {""}
    for peer in two.peers:
        await two.arrived(second, peer)


async def test_a_writer_that_stops_at_a_chunk_leaves_a_rank_that_knows_what_is_missing(fleet):
    two = fleet(2, 2, 2048, 2048)
    await two.connect()
    first, second = masters(7), masters(8)
    await two.begin(first)
    peer, other = two.peers
    sender = two.senders[0]

    def stop_at_forty(name, notice):
        if (name, notice.chunk) == (peer.name, 40):
            sender.stop([peer.member], "it is over")
        sender._heard(name, notice)

    sender._opened.heard = stop_at_forty
    ends = await two.write()
    await two.ended(ends)
    assert "it is over" in ends[0, 0].error
    assert {key for key, end in ends.items() if end.error} == {(0, 0)}
    await two.arrived(first, other)
    sender._opened.heard = sender._heard
    await peer.ask("end", 1, two.round)
    missing = await peer.ask("arrive")
    assert missing.startswith("ChunksMissing: ")
    assert "from trainer/0 were not scattered" in missing
    await two.begin(second)
    assert {end.error for end in (await two.write()).values()} == {""}
    for one in two.peers:
        await two.arrived(second, one)


async def test_chunks_of_no_open_round_change_nothing(fleet):
    """A writer of an attempt that is over: its bytes reach the landing and nothing else."""
    two = fleet(1, 2, 2048, 2048)
    await two.connect()
    fill(two.ranks, masters(9))
    two.round = 7
    ends = await two.write(seconds=0.5)
    for peer in two.peers:
        assert "waits for the peer to scatter chunk 0" in ends[0, peer.member.rank].error
        assert not (await peer.memory()).any()
    await two.begin(masters(10))
    assert {end.error for end in (await two.write()).values()} == {""}
    for peer in two.peers:
        await two.arrived(masters(10), peer)
