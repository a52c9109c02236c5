"""The push of a trainer rank, by the real planner over real NIXL into memory that stands in for an engine's."""

import asyncio
import contextlib
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
from msgspec import structs
from tiny_fleet import SHAPES, TRAINER, Target, made_slots, planned, replace_name, with_peers
from weightsync.agents.tables.runs import RUN_LENGTH
from weightsync.agents.trainer.thread_side import source_of
from weightsync.agents.transport.interface import HandedOver, PushError
from weightsync.agents.transport.nixl import sender as senders
from weightsync.agents.transport.nixl.edge import EdgeResult
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.agents.transport.nixl.errors import DeadlineError
from weightsync.agents.transport.nixl.sender import NixlSender
from weightsync.agents.transport.shares import Shares
from weightsync.orchestrator.protocol.layout import COPY_COLUMNS, COPY_GROUP, as_matrix
from weightsync.orchestrator.protocol.messages import NixlSettings
from weightsync.orchestrator.protocol.names import Member

PATIENCE = 20.0


@pytest.fixture
def endpoints():
    made = []

    def make(name):
        made.append(NixlEndpoint(name, NixlSettings()))
        return made[-1]

    yield make
    for endpoint in made:
        endpoint.close()


@asynccontextmanager
async def polling(targets):
    async def pump():
        while True:
            for target in targets:
                target.endpoint.poll()
            await asyncio.sleep(0.001)

    task = asyncio.create_task(pump())
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


class Rank:
    """A trainer rank's shares and its sender, as ``TrainerSide`` has them."""

    def __init__(self, slots, settings):
        self.shares = Shares(slots.layout, slots.arenas)
        self.sender = NixlSender(source_of(slots, TRAINER, 1))
        self.sender.open(settings)

    async def connect(self, connect):
        await self.sender.connect(self.shares.replan(connect))


@pytest.fixture
def make_rank():
    made = []

    def make(slots, settings=None):
        made.append(Rank(slots, settings or NixlSettings()))
        return made[-1]

    yield make
    for rank in made:
        rank.sender.close()


@pytest.fixture
def pretend(monkeypatch, make_rank):
    """A rank whose NIXL endpoint is the given double."""

    def make(slots, double):
        monkeypatch.setattr(senders, "open_endpoint", lambda name, settings, device: double)
        return make_rank(slots)

    return make


def engine_ranks(endpoints, engines="a", staging=0):
    """Registered tensor-parallel ranks of ``engines``, two each."""
    targets = [Target.of(engine, rank, staging) for engine in engines for rank in range(2)]
    for target in targets:
        target.endpoint = endpoints(str(target.member))
        target.endpoint.register(target.layout.regions)
    return targets


@pytest.mark.parametrize("staging", [0, 1 << 20], ids=["straight", "packed"])
async def test_a_push_gives_every_engine_rank_its_bytes(weights, endpoints, make_rank, staging):
    masters = weights.state(SHAPES)
    slots = made_slots(masters, staging)
    targets = engine_ranks(endpoints, staging=staging)
    plan, connect = planned(slots, targets)
    rank = make_rank(slots)
    async with polling(targets):
        await rank.connect(connect)
        digests = rank.shares.read().digests
        moved = await rank.sender.write([t.member for t in targets], PATIENCE)
        assert {m.member for m in moved} == {t.member for t in targets}
        assert sum(m.bytes for m in moved) == connect.expected_bytes
        packed = sum(len(plan.part(t.member).copies) for t in targets)
        assert (packed > 0) == (staging > 0)
        for target in targets:
            target.scatter(plan.part(target.member).copies)
            target.check(masters)
            assert digests[target.member] == target.digest(), "digest of the slots equals digest of what arrived"
        changed = {name: tensor + 1 for name, tensor in masters.items()}
        slots.convert(changed)
        await rank.sender.write([t.member for t in targets], PATIENCE)
        for target in targets:
            target.scatter(plan.part(target.member).copies)
            target.check(changed)
    assert not rank.sender.in_flight()


@pytest.mark.parametrize("staging", [0, 1 << 20], ids=["straight", "packed"])
async def test_groups_are_written_one_after_the_other(weights, endpoints, make_rank, staging):
    """What has no layer is a group of its own: after the first write only layer 0 has arrived, after both all has."""
    masters = weights.state(SHAPES)
    slots = made_slots(masters, staging)
    targets = engine_ranks(endpoints, staging=staging)
    plan, connect = planned(slots, targets)
    groups = np.unique(as_matrix(connect.copies, COPY_COLUMNS)[:, COPY_GROUP]).tolist()
    assert groups == [0, 1]
    rank = make_rank(slots)
    outside = {"embed", "norm", "head"}
    async with polling(targets):
        await rank.connect(connect)
        members = [t.member for t in targets]
        layer = await rank.sender.write(members, PATIENCE, groups=[0])
        for target in targets:
            target.scatter(plan.part(target.member).copies)
            target.check(masters, only=target.parameters.keys() - outside)
            assert not any(target.memory[target.parameters[name][0]].any() for name in outside)
        rest = await rank.sender.write(members, PATIENCE, groups=[1])
        for target in targets:
            target.scatter(plan.part(target.member).copies)
            target.check(masters)
    assert sum(m.bytes for m in layer + rest) == connect.expected_bytes
    whole = {share.peer.member: share for share in rank.shares.replan(connect)}
    for first, second in zip(layer, rest, strict=True):
        share = whole[first.member]
        assert first.bytes == share.runs[share.groups == 0, RUN_LENGTH].sum() > 0
        assert second.bytes == share.runs[share.groups == 1, RUN_LENGTH].sum() > 0


async def test_only_granted_members_are_written(weights, endpoints, make_rank):
    masters = weights.state(SHAPES)
    slots, targets = made_slots(masters, 0), engine_ranks(endpoints, "ab")
    rank = make_rank(slots)
    async with polling(targets):
        await rank.connect(planned(slots, targets)[1])
        granted = [t.member for t in targets if t.member.engine == "b"]
        moved = await rank.sender.write([*granted, Member("inference", "stranger", 0)], PATIENCE)
    assert sorted(m.member for m in moved) == sorted(granted)
    assert all(t.untouched() for t in targets if t.member.engine == "a")
    for target in targets[2:]:
        target.check(masters)


async def test_unchanged_edges_are_kept_and_replaced_processes_forgotten(weights, pretend):
    masters = weights.state(SHAPES)
    slots, targets = made_slots(masters, 0), [Target.of("a", rank, 0) for rank in range(2)]
    double = EndpointDouble()
    rank = pretend(slots, double)
    _, connect = planned(slots, targets)
    peers = tuple(replace_name(peer, f"{peer.member}-old") for peer in connect.peers)
    await rank.connect(with_peers(connect, peers))
    assert [name for call, name in double.calls if call == "edge"] == ["a/0-old", "a/1-old"]
    double.calls.clear()
    await rank.connect(with_peers(connect, peers))
    assert not [call for call in double.calls if call[0] in ("edge", "release", "forget")]
    double.calls.clear()
    await rank.connect(with_peers(connect, (peers[0], replace_name(peers[1], "a/1-new"))))
    assert double.calls == [
        ("release", "a/1-old"),
        ("forget", "a/1-old"),
        ("connect", "a/1-new"),
        ("edge", "a/1-new"),
        ("warm", "a/0-old"),
        ("warm", "a/1-new"),
    ]


async def test_a_peer_that_fails_does_not_hide_the_others(weights, pretend):
    masters = weights.state(SHAPES)
    slots, targets = made_slots(masters, 0), [Target.of("a", rank, 0) for rank in range(2)]
    rank = pretend(slots, EndpointDouble(failing="a/1"))
    _, connect = planned(slots, targets)
    await rank.connect(with_peers(connect, tuple(replace_name(p, str(p.member)) for p in connect.peers)))
    with pytest.raises(PushError, match=r"a/1: .*the deadline") as caught:
        await rank.sender.write([t.member for t in targets], PATIENCE)
    assert [m.member for m in caught.value.moved] == [targets[0].member]
    assert list(caught.value.failures) == [targets[1].member]
    assert (caught.value.fault, caught.value.retry) == ("network", True)


async def test_a_peer_that_does_not_take_the_first_word_fails_the_connect(weights, pretend):
    masters = weights.state(SHAPES)
    slots, targets = made_slots(masters, 0), [Target.of("a", rank, 0) for rank in range(2)]
    double = EndpointDouble(failing="a/1")
    double.warm_up_fails = True
    rank = pretend(slots, double)
    _, connect = planned(slots, targets)
    with pytest.raises(DeadlineError):
        await rank.connect(with_peers(connect, tuple(replace_name(p, str(p.member)) for p in connect.peers)))


async def test_a_peer_that_is_owed_nothing_has_no_edge(weights, pretend):
    masters = weights.state(SHAPES)
    slots, targets = made_slots(masters, 0), [Target.of("a", rank, 0) for rank in range(2)]
    double = EndpointDouble()
    rank = pretend(slots, double)
    _, connect = planned(slots, targets)
    idle = Member("inference", "idle", 0)
    await rank.connect(with_peers(connect, (*connect.peers, structs.replace(connect.peers[0], member=idle))))
    assert [call for call, _ in double.calls].count("edge") == 2
    assert await rank.sender.write([idle], PATIENCE) == (HandedOver(idle, 0),)


@dataclass(frozen=True)
class EdgeDouble:
    peer: str
    size: int


class EndpointDouble:
    """Remembers what it is asked for; fails writes to the peer ``failing``."""

    def __init__(self, failing=""):
        self.calls, self.failing, self.warm_up_fails = [], failing, False

    def register(self, regions):
        self.regions = regions

    def close(self):
        self.calls.append(("close", ""))

    def connect(self, name, card):
        self.calls.append(("connect", name))

    def forget(self, name):
        self.calls.append(("forget", name))

    def prepare_edge(self, name, local, remote, runs, *, groups, describe):
        self.calls.append(("edge", name))
        return EdgeDouble(name, int(runs[:, 5].sum()))

    def release_edge(self, edge):
        self.calls.append(("release", edge.peer))

    async def warm_up(self, edges, deadline_seconds):
        self.calls += [("warm", edge.peer) for edge in edges]
        return await self.write(edges, deadline_seconds=deadline_seconds, fail=self.warm_up_fails)

    async def write(self, edges, *, groups=None, deadline_seconds, fail=True):
        return [self.result(edge, fail and edge.peer == self.failing) for edge in edges]

    def result(self, edge, fails):
        done = EdgeResult(edge.peer, edge.size, 1, 0.001)
        if not fails:
            return done
        error = DeadlineError(
            "the deadline passed",
            rank="trainer/0",
            peer=edge.peer,
            tensor="",
            bytes_done=0,
            fault="network",
            retry=True,
        )
        return replace(done, bytes=0, error=error)
