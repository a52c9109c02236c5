"""NIXL at an inference rank: what came packed is spread by the plan, derived tensors follow, and experts may move."""

import asyncio
import threading
from dataclasses import replace

import pytest
import torch
from tiny_fleet import SHAPES, TRAINER, Target, made_slots, planned
from weightsync.agents.transport.interface import TargetMemory
from weightsync.agents.transport.nixl import receiver as receivers
from weightsync.agents.transport.nixl.receiver import NixlReceiver
from weightsync.orchestrator.protocol.edges import Peer
from weightsync.orchestrator.protocol.layout import COPY_COLUMNS, COPY_STAGED, as_matrix
from weightsync.orchestrator.protocol.messages import Connect, NixlSettings
from weightsync.orchestrator.protocol.names import Version

VERSION = Version(7, 1)
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
