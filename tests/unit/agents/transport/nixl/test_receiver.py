"""NIXL at an inference rank: what came packed is spread by the plan, derived tensors follow, and experts may move."""

import asyncio
import itertools
import threading
import time
from dataclasses import replace

import pytest
import row_parallel
import torch
from msgspec import structs
from tiny_fleet import SHAPES, TRAINER, Target, made_slots, planned
from weightsync.agents.memory.nic import NetDeviceMissing
from weightsync.agents.transport.interface import TargetMemory
from weightsync.agents.transport.nixl import receiver as receivers
from weightsync.agents.transport.nixl.arrivals import ChunksMissing
from weightsync.agents.transport.nixl.errors import ConnectError, NixlError
from weightsync.agents.transport.nixl.notices import Notice
from weightsync.agents.transport.nixl.receiver import NixlReceiver, reachable
from weightsync.orchestrator.protocol.edges import Peer
from weightsync.orchestrator.protocol.layout import COPY_COLUMNS, COPY_STAGED, Layout, Region, as_matrix
from weightsync.orchestrator.protocol.messages import Connect, NixlSettings
from weightsync.orchestrator.protocol.names import RoundName, Version

VERSION, ROUND = Version(7, 1), RoundName(1, 1)
STAGING = 1 << 20


def memory_of(target, story):
    return TargetMemory(
        str(target.member),
        torch.device("cpu"),
        target.layout,
        target.memory,
        lambda: story.append("refreshed"),
        lambda weights: story.append("loaded"),
    )


@pytest.fixture
def packed(weights):
    """(target, its Connect): an engine rank whose packed bytes are a ramp in its staging region."""
    slots = made_slots(weights.state(SHAPES), STAGING)
    targets = [Target.of("a", rank, STAGING) for rank in range(2)]
    plan, _ = planned(slots, targets)
    part = plan.part(targets[0].member)
    [berth] = part.berths
    peers = (Peer(TRAINER, 1, "", b"", (), berth),)
    connect = Connect(fingerprint=part.fingerprint, root=plan.root, peers=peers, copies=part.copies, expected_bytes=0)
    staging = targets[0].memory[targets[0].layout.staging]
    staging.copy_(torch.arange(STAGING, dtype=torch.int64).remainder(251).to(torch.uint8))
    return targets[0], connect


async def test_what_came_packed_is_spread_and_then_refreshed(packed):
    target, connect = packed
    receiver = NixlReceiver(memory_of(target, story := []))
    await receiver.connect(connect)
    receiver.arrive(VERSION)
    assert story == ["refreshed"]
    # A copy whose rows are whole arrives as it lay in the staging region; the norm is one of 128 bytes.
    copies = as_matrix(connect.copies, COPY_COLUMNS)
    norm = next(number for number, tensor in enumerate(target.layout.tensors) if tensor.name == "model.norm.weight")
    [line] = [copy for copy in copies if target.layout.matrix()[copy[1], 0] == norm]
    start = int(line[COPY_STAGED])
    index, _ = target.parameters["norm"]
    assert target.memory[index].tolist() == [(start + byte) % 251 for byte in range(128)]


async def test_after_experts_have_moved_the_old_plan_spreads_nothing(packed):
    target, connect = packed
    receiver = NixlReceiver(memory_of(target, []))
    await receiver.connect(connect)
    receiver.renew(memory_of(target, story := []))
    receiver.arrive(VERSION)
    assert story == ["refreshed"]
    assert not any(target.memory[index].any() for index, _ in target.parameters.values())


async def test_a_second_welcome_opens_no_second_endpoint(packed):
    receiver = NixlReceiver(memory_of(packed[0], []))
    receiver.poll()
    receiver.open(NixlSettings())
    name, card = receiver.announcement()
    assert name.startswith("a/0-")
    receiver.open(NixlSettings(rails=1))
    assert receiver.announcement()[0] == name
    assert card
    receiver.poll()
    receiver._endpoint.close()


async def test_another_endpoint_takes_the_place_of_the_first(packed):
    """By a name of its own, for the same memory; what was connected to the first is not any more."""
    receiver = NixlReceiver(memory_of(packed[0], []))
    receiver.reopen()
    receiver.open(NixlSettings())
    before = receiver._endpoint
    name, card = receiver.announcement()
    await receiver.connect(packed[1])
    receiver.reopen()
    again, other = receiver.announcement()
    assert again.startswith("a/0-")
    assert (again != name, other != card, before._agent) == (True, True, None)
    assert receiver.landed_by(packed[1].fingerprint) is None
    receiver.poll()
    receiver._endpoint.close()


async def test_an_endpoint_that_something_keeps_is_not_taken_for_gone(packed):
    receiver = NixlReceiver(memory_of(packed[0], []))
    receiver.open(NixlSettings())
    kept = receiver._endpoint._agent
    with pytest.raises(NixlError, match="cannot be destroyed: something keeps it"):
        receiver.reopen()
    del kept


async def test_a_network_device_that_is_not_here_is_named(packed):
    receiver = NixlReceiver(memory_of(packed[0], []))
    with pytest.raises(NetDeviceMissing, match=r"transport\.net_devices names 'eth77'"):
        receiver.open(NixlSettings(net_devices=("eth77",)))
    receiver.open(NixlSettings(net_devices=("lo",)))
    receiver._endpoint.close()


def test_a_thread_that_takes_an_open_endpoint_over_binds_its_device(weights, monkeypatch):
    bound = []
    monkeypatch.setattr(receivers, "bind", bound.append)
    target = Target.of("a", 0, STAGING)
    for device in (torch.device("cpu"), torch.device("cuda", 1)):
        receiver = NixlReceiver(replace(memory_of(target, []), device=device))
        receiver._endpoint = object()
        receiver.open(NixlSettings())
    assert bound == [torch.device("cuda", 1)]


async def test_a_large_plan_is_prepared_while_the_loop_answers_heartbeats(packed, monkeypatch):
    """The table is made on another thread: it waits here for the loop, which therefore must be free."""
    target, connect = packed
    loop, turned = asyncio.get_running_loop(), threading.Event()
    make = receivers.scatter_table

    def slow(copies, layout):
        loop.call_soon_threadsafe(turned.set)
        assert turned.wait(10.0), "the loop stands still while the table is made"
        return make(copies, layout)

    story = []
    receiver = NixlReceiver(memory_of(target, story))
    monkeypatch.setattr(receivers, "scatter_table", slow)
    await receiver.connect(connect)
    receiver.arrive(VERSION)
    assert story == ["refreshed"]


async def test_a_plan_for_experts_that_have_moved_meanwhile_is_not_used(packed, monkeypatch):
    target, connect = packed
    receiver = NixlReceiver(memory_of(target, []))
    make = receivers.scatter_table

    def moved(copies, layout):
        table = make(copies, layout)
        if len(copies):
            receiver.renew(memory_of(target, []))
        return table

    monkeypatch.setattr(receivers, "scatter_table", moved)
    before = [memory.clone() for memory in target.memory]
    await receiver.connect(connect)
    receiver.arrive(VERSION)
    assert all(map(torch.equal, before, target.memory))


# ----------------------------------------------------------------------------------------- chunks that pass a landing
class EndpointDouble:
    """Remembers what it is asked for; ``refused`` cannot be reached."""

    def __init__(self):
        self.asked, self.refused = [], set()

    def connect(self, name, card):
        self.asked.append(("connect", name))
        if name in self.refused:
            raise ConnectError(f"no way to {name}")

    def forget(self, name):
        self.asked.append(("forget", name))

    def tell(self, name, notice):
        self.asked.append((notice.chunk, name))

    def poll(self): ...


@pytest.fixture
def passing():
    """(receiver, its endpoint's double, its Connect): half of the columns, from two ranks."""
    reader = row_parallel.target(1, 2, 2048)
    sources = [row_parallel.source(number, 2, 2048) for number in range(2)]
    reached = {rank.member: (rank.layout, f"{rank.member}-1", b"card") for rank in (*sources, reader)}
    receiver = NixlReceiver(reader.target())
    receiver._endpoint = EndpointDouble()
    return receiver, receiver._endpoint, row_parallel.connects(reached)[reader.member]


async def scattered(receiver, endpoint, chunk, name="trainer/0-1"):
    """One chunk lands; until it was scattered."""
    receiver._arrivals.heard(name, Notice("landed", ROUND, chunk))
    async with asyncio.timeout(10):
        while (chunk, name) not in endpoint.asked:
            receiver.poll()
            await asyncio.sleep(0)


async def test_whoever_sends_chunks_can_be_told_of_them(passing):
    receiver, endpoint, connect = passing
    endpoint.refused.add("trainer/1-1")
    failed = await receiver.connect(connect)
    assert {str(member): str(error) for member, error in failed.items()} == {"trainer/1": "no way to trainer/1-1"}
    endpoint.refused.clear()
    assert await receiver.connect(connect) == {}, "another call tries it again"
    receiver.begin(ROUND)
    await scattered(receiver, endpoint, 0)
    assert receiver.landed.shape[0] == 0, "nothing stays where it lands"


async def test_the_same_plan_again_in_the_middle_of_a_round_changes_nothing(passing):
    receiver, endpoint, connect = passing
    await receiver.connect(connect)
    receiver.begin(ROUND)
    await scattered(receiver, endpoint, 0)
    await receiver.connect(connect)
    await scattered(receiver, endpoint, 4)
    receiver.end(ROUND)
    with pytest.raises(ChunksMissing, match="94 of 96 chunks from trainer/0"):
        receiver.arrive(VERSION)


async def test_a_sender_that_is_replaced_is_forgotten(passing):
    receiver, endpoint, connect = passing
    await receiver.connect(connect)
    first = structs.replace(connect.peers[0], endpoint_name="trainer/0-2")
    endpoint.asked.clear()
    await receiver.connect(structs.replace(connect, fingerprint="another", peers=(first, connect.peers[1])))
    assert endpoint.asked == [("forget", "trainer/0-1"), ("connect", "trainer/0-2"), ("connect", "trainer/1-1")]


async def test_chunks_of_experts_that_have_moved_are_nobodys(passing):
    receiver, endpoint, connect = passing
    await receiver.connect(connect)
    receiver.begin(ROUND)
    receiver.renew(receiver._memory)
    receiver._arrivals.heard("trainer/0-1", Notice("landed", ROUND, 0))
    endpoint.asked.clear()
    receiver.poll()
    receiver.arrive(VERSION)
    assert endpoint.asked == []


@pytest.mark.parametrize(("lands", "staging", "expected"), [
    ("live", 1, (0, 1)), ("live", -1, (0, 1)), ("copy", 1, (1,)), ("flip", 1, (1,)), ("copy", -1, ()),
])  # fmt: skip
def test_of_a_shadow_engine_peers_reach_the_landing_alone(lands, staging, expected):
    regions = (Region(4096, 256), Region(8192, 256))
    found = reachable(Layout((), regions, b"", staging, lands=lands))
    assert list(found) == [regions[number] for number in expected]


async def test_while_chunks_come_the_next_is_looked_for_before_an_event_loop_would(packed, monkeypatch):
    receiver, looks = NixlReceiver(memory_of(packed[0], [])), []

    class Endpoint:
        def poll(self):
            looks.append(time.monotonic())

    monkeypatch.setattr(receiver, "_endpoint", Endpoint())
    moved = iter([True])
    monkeypatch.setattr(receiver._arrivals, "turn", lambda: next(moved, False))
    receiver.poll()
    await asyncio.sleep(0.05)
    assert len(looks) == 1, "of host memory nobody waits for it: the agent polls"
    monkeypatch.setattr(receiver, "_eager_seconds", 0.05)
    moved = iter([True])
    receiver.poll()
    await asyncio.sleep(0.2)
    assert min(after - before for before, after in itertools.pairwise(looks)) < 0.0009
    assert receiver._next_look is None, "and when none has come for a while, no more"
