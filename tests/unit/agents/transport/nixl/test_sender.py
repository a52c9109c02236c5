"""The push of a trainer rank, by the real planner over real NIXL into memory that stands in for an engine's."""

import asyncio
import contextlib
import functools
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest
from msgspec import structs
from tiny_fleet import SHAPES, TRAINER, Target, handed_over, made_slots, planned, replace_name, with_peers
from weightsync.agents.tables.runs import digest_table
from weightsync.agents.trainer.publisher import source_of
from weightsync.agents.transport.interface import HandedOver
from weightsync.agents.transport.nixl import sender as senders
from weightsync.agents.transport.nixl.edge import TRIES, EdgeResult
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.agents.transport.nixl.errors import ConnectError, DisconnectedError, MetadataError, NixlError
from weightsync.agents.transport.nixl.receiver import reachable
from weightsync.agents.transport.nixl.sender import NixlSender
from weightsync.agents.transport.shares import Shares
from weightsync.agents.transport.ucx import Way
from weightsync.kernels.digest import digest
from weightsync.orchestrator.protocol.landing import landed
from weightsync.orchestrator.protocol.layout import COPY_COLUMNS, as_matrix
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
        return await self.sender.connect(self.shares.replan(connect))


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


def engine_ranks(endpoints, engines="a", staging=0, lands="live"):
    """Registered tensor-parallel ranks of ``engines``, two each."""
    targets = [Target.of(engine, rank, staging, lands) for engine in engines for rank in range(2)]
    for target in targets:
        target.endpoint = endpoints(str(target.member))
        target.endpoint.register(reachable(target.layout))
    return targets


@pytest.mark.parametrize("staging", [0, 1 << 20], ids=["straight", "packed"])
async def test_a_push_gives_every_engine_rank_its_bytes(weights, endpoints, make_rank, staging):
    masters = weights.state(SHAPES)
    slots = made_slots(masters, staging)
    targets = engine_ranks(endpoints, staging=staging)
    plan, connect = planned(slots, targets)
    rank = make_rank(slots)
    async with polling(targets):
        assert await rank.connect(connect) == {}
        digests = rank.shares.read().digests
        moved = await handed_over(rank.sender, [t.member for t in targets], PATIENCE)
        assert {(m.member, m.error) for m in moved.values()} == {(t.member, "") for t in targets}
        assert {m.member: m.bytes for m in moved.values()} == rank.shares.sizes
        assert {(m.link, m.by) for m in moved.values()} == {("shm", "cma/memory")}
        assert sum(m.bytes for m in moved.values()) == connect.expected_bytes
        packed = sum(len(plan.part(t.member).copies) for t in targets)
        assert (packed > 0) == (staging > 0)
        for target in targets:
            target.scatter(plan.part(target.member))
            target.check(masters)
            assert digests[target.member] == target.digest(), "digest of the slots equals digest of what arrived"
        changed = {name: tensor + 1 for name, tensor in masters.items()}
        slots.convert(changed)
        await handed_over(rank.sender, [t.member for t in targets], PATIENCE)
        for target in targets:
            target.scatter(plan.part(target.member))
            target.check(changed)
    assert list(rank.sender.in_flight()) == []


@pytest.mark.parametrize("ring", [0, 1024, 1 << 20], ids=["straight", "many chunks", "few chunks"])
async def test_into_a_shadow_engine_all_of_it_lands_and_nothing_else_can_be_reached(
    weights, endpoints, make_rank, ring
):
    masters = weights.state(SHAPES)
    slots, targets = made_slots(masters, ring), engine_ranks(endpoints, "ab", 2 << 20, "copy")
    plan, connect = planned(slots, targets)
    rank = make_rank(slots)
    async with polling(targets):
        assert await rank.connect(connect) == {}
        digests = rank.shares.read().digests
        moved = await handed_over(rank.sender, [t.member for t in targets], PATIENCE)
        assert {m.error for m in moved.values()} == {""}
    assert {m.member: m.bytes for m in moved.values()} == rank.shares.sizes
    for target in targets:
        rows = [memory for number, memory in enumerate(target.memory) if number != target.layout.staging]
        assert not any(memory.any() for memory in rows), "live memory is as it was"
        part = plan.part(target.member)
        copies = landed(as_matrix(part.copies, COPY_COLUMNS), part.berths)
        there = digest(target.memory, digest_table(copies, target.layout, landed=True))
        assert there == digests[target.member], "which can be digested where it lies"
        target.scatter(part)
        target.check(masters)
        assert there == target.digest()


async def test_only_granted_members_are_written(weights, endpoints, make_rank):
    masters = weights.state(SHAPES)
    slots, targets = made_slots(masters, 0), engine_ranks(endpoints, "ab")
    rank = make_rank(slots)
    async with polling(targets):
        assert await rank.connect(planned(slots, targets)[1]) == {}
        granted = [t.member for t in targets if t.member.engine == "b"]
        moved = await handed_over(rank.sender, [*granted, Member("inference", "stranger", 0)], PATIENCE)
    assert sorted(moved) == sorted(granted)
    assert all(t.untouched() for t in targets if t.member.engine == "a")
    for target in targets[2:]:
        target.check(masters)


FIRST, SECOND = Member("inference", "a", 0), Member("inference", "a", 1)


@pytest.fixture
def fleet(weights, pretend):
    """A rank over a double, and the trainer's Connect for the given ranks of an engine under the given names."""

    class Fleet:
        def __init__(self):
            self.slots = made_slots(weights.state(SHAPES), 0)
            self.double = EndpointDouble()
            self.rank = pretend(self.slots, self.double)

        async def connect(self, **names):
            """By rank: ``r0="name"``; the result, and what the endpoint was asked meanwhile."""
            self.double.calls.clear()
            targets = [Target_of(int(rank[1:])) for rank in names]
            _, connect = planned(self.slots, targets)
            given = {target.member: name for target, name in zip(targets, names.values(), strict=True)}
            peers = tuple(replace_name(peer, given[peer.member]) for peer in connect.peers)
            return await self.rank.connect(with_peers(connect, peers)), list(self.double.calls)

        async def write(self, *members, seconds=PATIENCE):
            return await handed_over(self.rank.sender, members, seconds)

    return Fleet()


@functools.cache
def Target_of(rank):
    return Target.of("a", rank, 0)


def calls(asked, kind):
    return [name for call, name in asked if call == kind]


async def test_unchanged_edges_are_kept_and_replaced_processes_forgotten(fleet):
    failed, asked = await fleet.connect(r0="zero", r1="one")
    assert (failed, calls(asked, "edge")) == ({}, ["zero", "one"])
    assert await fleet.connect(r0="zero", r1="one") == ({}, []), "no edge is made, no first word sent again"
    failed, asked = await fleet.connect(r0="zero", r1="other")
    assert failed == {}
    assert asked == [
        ("stop", "one"),
        ("release", "one"),
        ("forget", "one"),
        ("connect", "other"),
        ("word", "other"),
        ("edge", "other"),
    ]


async def test_a_process_that_left_the_plan_is_forgotten_when_another_takes_its_place(fleet):
    """Else what was in flight to it would count for ever."""
    await fleet.connect(r0="zero", r1="one")
    assert await fleet.connect(r0="zero") == ({}, [("stop", "one"), ("release", "one")])
    _, asked = await fleet.connect(r0="zero", r1="other")
    assert calls(asked, "forget") == ["one"]


@pytest.mark.parametrize(("kept", "forgotten"), [(0, ["one"]), (1, [])])
async def test_of_those_that_left_the_plan_the_oldest_are_forgotten(fleet, monkeypatch, kept, forgotten):
    """An engine that scales comes back under another name, so nobody would ever take its place."""
    monkeypatch.setattr(senders, "KEPT_ABSENT", kept)
    await fleet.connect(r0="zero", r1="one")
    _, asked = await fleet.connect(r0="zero")
    assert calls(asked, "forget") == forgotten
    _, asked = await fleet.connect(r1="one")
    assert calls(asked, "edge") == ["one"]
    assert calls(asked, "forget") == (["zero"] if kept == 0 else [])


async def test_one_that_left_the_plan_is_not_forgotten_while_a_write_to_it_is_in_flight(fleet, monkeypatch):
    monkeypatch.setattr(senders, "KEPT_ABSENT", 0)
    await fleet.connect(r0="zero", r1="one")
    fleet.double.hung["one"] = "posted"
    _, asked = await fleet.connect(r0="zero")
    assert calls(asked, "forget") == []
    assert fleet.rank.sender.in_flight() == [SECOND]
    fleet.double.hung.clear()
    _, asked = await fleet.connect(r0="zero")
    assert calls(asked, "forget") == ["one"]


async def test_a_process_that_comes_back_into_the_plan_gets_its_edge_again(fleet):
    """Also if a plan between failed: an edge that was given back is never written by."""
    await fleet.connect(r0="zero", r1="one")
    fleet.double.refused["other"] = NixlError("refused")
    failed, _ = await fleet.connect(r1="other")
    assert {member: str(error) for member, error in failed.items()} == {SECOND: "refused"}
    failed, asked = await fleet.connect(r0="zero")
    assert (failed, calls(asked, "edge")) == ({}, ["zero"])
    ends = await fleet.write(FIRST, SECOND)
    assert ends == {FIRST: HandedOver(FIRST, fleet.rank.shares.sizes[FIRST], 1, 0.001, "", "nic", "rc_mlx5/mlx5_0:1")}


async def test_a_peer_that_is_refused_costs_nobody_else_its_edge(fleet):
    fleet.double.refused["one"] = ConnectError("out of reach")
    failed, asked = await fleet.connect(r0="zero", r1="one")
    assert {member: str(error) for member, error in failed.items()} == {SECOND: "out of reach"}
    assert calls(asked, "edge") == ["zero"]
    ends = await fleet.write(FIRST, SECOND)
    assert (ends[FIRST].error, ends[FIRST].bytes) == ("", fleet.rank.shares.sizes[FIRST])
    assert ends[SECOND] == HandedOver(SECOND, 0, error="there is no edge to a/1: out of reach")
    fleet.double.refused.clear()
    failed, asked = await fleet.connect(r0="zero", r1="one")
    assert (failed, calls(asked, "edge")) == ({}, ["one"]), "it is tried again, and nothing else is done"
    assert (await fleet.write(SECOND))[SECOND].error == ""


async def test_what_no_retry_helps_is_not_tried_again_under_the_same_plan(fleet):
    fleet.double.refused["one"] = MetadataError("a card of another schema")
    for expected in (["zero", "one"], []):
        failed, asked = await fleet.connect(r0="zero", r1="one")
        assert {member: str(error) for member, error in failed.items()} == {SECOND: "a card of another schema"}
        assert calls(asked, "connect") == expected
    assert (await fleet.connect(r0="zero", r1="another card"))[0] == {}


async def test_an_edge_that_cannot_be_prepared_leaves_nothing_behind(fleet, monkeypatch):
    """Whatever it is that goes wrong."""
    monkeypatch.setattr(senders, "plain_runs", broken)
    failed, asked = await fleet.connect(r0="zero")
    assert [str(error) for error in failed.values()] == ["out of memory"]
    assert calls(asked, "edge") == []
    monkeypatch.undo()
    assert (await fleet.write(FIRST))[FIRST].error == "there is no edge to a/0: out of memory"


def broken(*_):
    raise RuntimeError("out of memory")


async def test_a_peer_that_does_not_take_the_first_word_is_waited_for_once(fleet, monkeypatch):
    """Then it is named, and used as soon as it has."""
    monkeypatch.setattr(senders, "FIRST_WORD_SECONDS", 0.01)
    fleet.double.silent.add("one")
    failed, asked = await fleet.connect(r0="zero", r1="one")
    assert {member: str(error) for member, error in failed.items()} == {
        SECOND: "a/1 does not answer: it has not taken the first word"
    }
    assert calls(asked, "edge") == ["zero"]
    monkeypatch.setattr(senders, "FIRST_WORD_SECONDS", 3600.0)
    failed, asked = await fleet.connect(r0="zero", r1="one")
    assert (list(failed), asked) == ([SECOND], [("connect", "one"), ("word", "one")])
    assert not fleet.rank.sender.poll()
    fleet.double.silent.clear()
    assert fleet.rank.sender.poll(), "there is something to connect"
    assert not fleet.rank.sender.poll()
    assert (await fleet.connect(r0="zero", r1="one"))[0] == {}


async def test_a_first_word_that_is_refused_makes_way_for_a_new_connection(fleet):
    fleet.double.gone.add("one")
    failed, asked = await fleet.connect(r0="zero", r1="one")
    assert [(member, type(error)) for member, error in failed.items()] == [(SECOND, DisconnectedError)]
    assert calls(asked, "forget") == ["one"]
    fleet.double.gone.clear()
    failed, asked = await fleet.connect(r0="zero", r1="one")
    assert (failed, calls(asked, "connect"), calls(asked, "edge")) == ({}, ["one"], ["one"])


MADE_ANEW = [
    ("stop", "one"),
    ("release", "one"),
    ("forget", "one"),
    ("connect", "one"),
    ("word", "one"),
    ("edge", "one"),
]


@pytest.mark.parametrize("times", [1, 2])
async def test_an_edge_that_breaks_is_written_to_anew_over_another_connection(fleet, times):
    await fleet.connect(r0="zero", r1="one")
    fleet.double.failing["one"] = times
    fleet.double.calls.clear()
    ends = await fleet.write(FIRST, SECOND)
    assert {member: (end.error, end.bytes) for member, end in ends.items()} == {
        member: ("", fleet.rank.shares.sizes[member]) for member in (FIRST, SECOND)
    }
    assert fleet.double.calls == MADE_ANEW * times
    assert fleet.double.resumed == ["one"] * times, "it goes on where the one before was"
    assert await fleet.connect(r0="zero", r1="one") == ({}, [])


async def test_one_that_breaks_again_and_again_is_named_and_made_anew_for_the_next_round(fleet):
    await fleet.connect(r0="zero", r1="one")
    fleet.double.failing["one"] = TRIES
    ends = await fleet.write(FIRST, SECOND)
    assert (ends[FIRST].error, ends[SECOND].bytes) == ("", 0)
    assert "the peer is gone" in ends[SECOND].error
    assert fleet.rank.sender.poll(), "there is an edge to look after"
    assert await fleet.connect(r0="zero", r1="one") == ({}, MADE_ANEW)


async def test_what_was_told_to_stop_or_cannot_be_reached_is_not_tried_again(fleet):
    await fleet.connect(r0="zero", r1="one")
    fleet.double.failing["one"] = 1
    fleet.double.refused["one"] = ConnectError("out of reach")
    assert "the peer is gone" in (await fleet.write(FIRST, SECOND))[SECOND].error
    fleet.double.refused.clear()
    assert (await fleet.connect(r0="zero", r1="one"))[0] == {}
    fleet.double.failing["one"] = 1
    fleet.double.during = lambda: fleet.rank.sender.stop([SECOND], "left out")
    assert "the peer is gone" in (await fleet.write(FIRST, SECOND))[SECOND].error


async def test_an_edge_that_has_not_ended_is_named_until_it_has(fleet):
    await fleet.connect(r0="zero", r1="one")
    fleet.double.hung["one"] = "the deadline passed"
    assert list(fleet.rank.sender.in_flight()) == [SECOND]
    failed, asked = await fleet.connect(r0="zero", r1="one")
    assert {member: str(error) for member, error in failed.items()} == {
        SECOND: "edge to a/1 has not ended: an earlier write may still reach its memory"
    }
    assert asked == [], "and it is left alone"
    assert (await fleet.connect(r0="zero", r1="one"))[0].keys() == {SECOND}
    fleet.double.hung.clear()
    assert await fleet.connect(r0="zero", r1="one") == ({}, [])


async def test_a_write_that_is_given_up_is_told_at_the_next_look(fleet):
    await fleet.connect(r0="zero", r1="one")
    assert not fleet.rank.sender.poll()
    fleet.double.hung["one"] = "nothing has moved"
    assert fleet.rank.sender.poll(), "``connect`` names it, also while others are written to"
    assert not fleet.rank.sender.poll()


async def test_what_hangs_on_its_way_to_an_endpoint_that_is_no_more_is_over(fleet):
    await fleet.connect(r0="zero", r1="one")
    fleet.double.hung["one"] = "nothing has moved"
    failed, asked = await fleet.connect(r0="zero", r1="renewed")
    assert (failed, calls(asked, "forget"), calls(asked, "edge")) == ({}, ["one"], ["renewed"])
    assert fleet.rank.sender.in_flight() == []


async def test_by_shared_memory_it_may_still_arrive(fleet):
    await fleet.connect(r0="zero", r1="one")
    fleet.double.hung["one"] = "nothing has moved"
    fleet.double.sharing.add("renewed")
    for _ in range(2):
        failed, asked = await fleet.connect(r0="zero", r1="renewed")
        assert (list(failed), calls(asked, "forget"), calls(asked, "edge")) == ([SECOND], [], [])
        assert fleet.rank.sender.in_flight() == [SECOND]
    fleet.double.hung.clear()
    failed, asked = await fleet.connect(r0="zero", r1="renewed")
    assert (failed, calls(asked, "forget"), calls(asked, "edge")) == ({}, ["one"], ["renewed"])


async def test_an_edge_of_another_plan_waits_for_the_end_of_the_one_before(fleet):
    await fleet.connect(r0="zero", r1="one")
    fleet.double.hung["one"] = "the deadline passed"
    await fleet.connect(r0="zero")
    failed, asked = await fleet.connect(r0="zero", r1="one")
    assert (list(failed), calls(asked, "edge")) == ([SECOND], [])
    fleet.double.hung.clear()
    failed, asked = await fleet.connect(r0="zero", r1="one")
    assert (failed, calls(asked, "edge")) == ({}, ["one"])


async def test_only_the_edges_that_are_named_are_stopped(fleet):
    await fleet.connect(r0="zero", r1="one")
    fleet.double.calls.clear()
    fleet.rank.sender.stop([SECOND, Member("inference", "stranger", 0)], "the round is over")
    assert fleet.double.calls == [("stop", "one")]


async def test_a_peer_that_is_owed_nothing_has_no_edge(weights, pretend):
    masters = weights.state(SHAPES)
    slots, targets = made_slots(masters, 0), [Target.of("a", rank, 0) for rank in range(2)]
    double = EndpointDouble()
    rank = pretend(slots, double)
    _, connect = planned(slots, targets)
    idle = Member("inference", "idle", 0)
    await rank.connect(with_peers(connect, (*connect.peers, structs.replace(connect.peers[0], member=idle))))
    assert [call for call, _ in double.calls].count("edge") == 2
    assert await handed_over(rank.sender, [idle], PATIENCE) == {idle: HandedOver(idle, 0)}


@dataclass
class EdgeDouble:
    peer: str
    size: int
    broken: bool = False
    before: EdgeResult | None = None


class EndpointDouble:
    """Remembers what it is asked for.

    ``refused`` is what ``connect`` raises, ``silent`` do not take the first word, to those that are ``gone`` it is
    refused, writes to ``failing`` fail, ``hung`` have transfers in flight, which may still arrive at the process of
    those that are ``sharing``.
    """

    def __init__(self):
        self.calls, self.refused, self.silent, self.gone, self.failing, self.hung = [], {}, set(), set(), {}, {}
        self.warmed, self.sharing, self.resumed, self.during = set(), set(), [], lambda: None

    @property
    def tainted_peers(self):
        return self.hung

    def register(self, regions):
        self.regions = regions

    def close(self):
        self.calls.append(("close", ""))

    def poll(self): ...

    def connect(self, name, card):
        self.calls.append(("connect", name))
        if name in self.refused:
            raise self.refused[name]

    def warm(self, name):
        if name in self.warmed:
            return True
        self.calls.append(("word", name))
        if name in self.gone:
            raise self.error(name, DisconnectedError)
        if name not in self.silent:
            self.warmed.add(name)
        return name not in self.silent

    def is_replaced(self, name, other_name, other):
        return other_name not in self.sharing

    def way_to(self, name):
        return Way("nic", "rc_mlx5/mlx5_0:1")

    def forget(self, name):
        self.calls.append(("forget", name))
        self.hung.pop(name, None)
        self.warmed.discard(name)
        self.failing[name] = self.failing.get(name, 0) - 1
        if self.failing[name] <= 0:
            del self.failing[name]

    def prepare_edge(self, name, local, remote, runs, *, cargo, describe):
        self.calls.append(("edge", name))
        return EdgeDouble(name, int(runs[:, 5].sum()))

    def release_edge(self, edge):
        self.calls.append(("release", edge.peer))

    def stop(self, peers, reason):
        self.calls += [("stop", peer) for peer in peers]

    async def write(self, edges, *, loading, deadline_seconds, ended):
        self.resumed += [edge.peer for edge in edges if edge.before is not None]
        self.during()
        results = [self.result(edge) for edge in edges]
        for result in results:
            ended(result)
        return results

    def result(self, edge):
        done = EdgeResult(edge.peer, edge.size, 1, 0.001)
        if edge.peer not in self.failing:
            return done
        edge.broken = True
        return replace(done, bytes=0, error=self.error(edge.peer, DisconnectedError))

    def error(self, peer, kind):
        return kind(
            "the peer is gone", rank="trainer/0", peer=peer, tensor="", bytes_done=0, fault="engine", retry=True
        )
