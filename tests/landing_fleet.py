"""Trainer ranks of this process and engine ranks of others, over real NIXL: cargo that passes a landing of a few
KiB."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from row_parallel import connects, expected, fill, source
from weightsync.agents.transport.nixl.sender import NixlSender
from weightsync.agents.transport.shares import Shares
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.messages import NixlSettings
from weightsync.orchestrator.protocol.names import Member, RoundName

HERE = Path(__file__).parent
PEER = HERE / "unit/agents/transport/nixl/landing_peer.py"
PATIENCE = 30.0
CHUNK, CHUNKS = 256, 96
"""Two sources and two targets: each edge carries 24 KiB, and of a landing of 2 KiB it has four places of 256 bytes."""


async def until(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  (of other processes)
            await asyncio.sleep(0.005)


class Peer:
    """The process of an engine's rank."""

    def __init__(self, number, of, landing, lands):
        command = [sys.executable, str(PEER), str(number), str(of), str(landing), lands]
        paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
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

    @property
    def stands(self):
        """Whether it is stopped by a signal."""
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    async def has_stopped(self):
        await until(lambda: self.stands)

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
