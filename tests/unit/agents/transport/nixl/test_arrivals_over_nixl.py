"""Cargo that passes a landing of a few KiB, over real NIXL into other processes: places come again dozens of times."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from row_parallel import connects, expected, fill, masters, source
from weightsync.agents.transport.nixl.sender import NixlSender
from weightsync.agents.transport.shares import Shares
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.messages import NixlSettings
from weightsync.orchestrator.protocol.names import Member, RoundName

HERE = Path(__file__).parent
PATIENCE = 30.0
CHUNK, CHUNKS = 256, 96
"""Two sources and two targets: each edge carries 24 KiB, and of a landing of 2 KiB it has four places of 256 bytes."""


class Peer:
    """The process of an engine's rank."""

    def __init__(self, number, of, landing, lands):
        command = [sys.executable, str(HERE / "landing_peer.py"), str(number), str(of), str(landing), lands]
        paths = [str(HERE.parents[3]), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "UCX_LOG_FILE": "stderr"},  # it answers on stdout
        )  # fmt: skip
        self.member = Member("inference", "a", number)

    def meet(self):
        """Once it has begun, which takes seconds: several do so at the same time."""
        facts = json.loads(self.process.stdout.readline())
        self.layout = msgspec.msgpack.decode(bytes.fromhex(facts["layout"]), type=Layout)
        self.name, self.card = facts["name"], bytes.fromhex(facts["card"])

    async def ask(self, *words):
        def talk():
            self.process.stdin.write(" ".join(map(str, words)) + "\n")
            self.process.stdin.flush()
            return self.process.stdout.readline().strip()

        return await asyncio.to_thread(talk)

    async def memory(self):
        return torch.frombuffer(bytearray.fromhex(await self.ask("memory")), dtype=torch.uint8)

    def end(self):
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.communicate()


class Fleet:
    """Sources of this process, targets of others."""

    def __init__(self, sources, targets, landing, ring, lands="live"):
        self.ranks = [source(number, sources, ring) for number in range(sources)]
        self.senders = [NixlSender(rank.source()) for rank in self.ranks]
        self.shares = [Shares(rank.layout, rank.memory) for rank in self.ranks]
        self.peers = [Peer(number, targets, landing, lands) for number in range(targets)]
        self.round = 0
        for peer in self.peers:
            peer.meet()

    async def connect(self):
        for sender in self.senders:
            sender.open(NixlSettings())
        reached = {
            rank.member: (rank.layout, *sender.announcement())
            for rank, sender in zip(self.ranks, self.senders, strict=True)
        } | {peer.member: (peer.layout, peer.name, peer.card) for peer in self.peers}
        self.plan = connects(reached)
        for peer in self.peers:
            assert await peer.ask("connect", msgspec.msgpack.encode(self.plan[peer.member]).hex()) == "{}"
        for rank, sender, shares in zip(self.ranks, self.senders, self.shares, strict=True):
            assert await sender.connect(shares.replan(self.plan[rank.member])) == {}

    async def begin(self, weights, peers=None):
        fill(self.ranks, weights)
        self.round += 1
        for peer in self.peers if peers is None else peers:
            await peer.ask("begin", 1, self.round)

    async def write(self, seconds=PATIENCE, members=None):
        """The ends of all edges, by source and target."""
        members = members or [peer.member for peer in self.peers]
        ends = {}

        async def one(rank, sender):
            told = lambda end: ends.__setitem__((rank.member.rank, end.member.rank), end)  # noqa: E731
            await sender.write(RoundName(1, self.round), members, seconds, told)

        await asyncio.gather(*map(one, self.ranks, self.senders))
        return ends

    async def ended(self, ends):
        """Until each edge's end is told: what was on its way ends after the write."""
        async with asyncio.timeout(PATIENCE):
            while len(ends) < len(self.senders) * len(self.peers):
                for sender in self.senders:
                    sender.poll()
                await asyncio.sleep(0)

    async def arrived(self, weights, peer):
        await peer.ask("end", 1, self.round)
        assert await peer.ask("arrive") == "done"
        assert torch.equal(await peer.memory(), expected(peer.member.rank, len(self.peers), weights))


@pytest.fixture
def fleet():
    made = []

    def make(*arguments, **options):
        made.append(Fleet(*arguments, **options))
        return made[-1]

    yield make
    for one in made:
        for peer in one.peers:
            peer.end()
        for sender in one.senders:
            sender.close()


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
