"""The push of a trainer rank, by the real planner over real NIXL into memory that stands in for an engine's."""

import asyncio
import contextlib
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from weightsync.agents.memory.arena import host_arena, region_of
from weightsync.agents.tables.runs import digest_table, scatter_table
from weightsync.agents.trainer.models import model_table
from weightsync.agents.trainer.slots.slots import SlotOptions, TrainerSlots
from weightsync.agents.transport.nixl.edge import EdgeResult
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.agents.transport.nixl.errors import DeadlineError
from weightsync.agents.transport.nixl.sender import PlanMismatch, PushError, TransportPlan
from weightsync.kernels.copy import strided_copy
from weightsync.kernels.digest import digest
from weightsync.orchestrator.planner import CostModel, Party, make_plan
from weightsync.orchestrator.protocol.layout import COPY_COLUMNS, Layout, Tensor, as_matrix, row
from weightsync.orchestrator.protocol.messages import Connect, NixlSettings, Peer
from weightsync.orchestrator.protocol.names import Member

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (96, 64),
    "model.norm.weight": (64,),
    "lm_head.weight": (96, 64),
    LAYER + "input_layernorm.weight": (64,),
    LAYER + "post_attention_layernorm.weight": (64,),
    LAYER + "self_attn.q_proj.weight": (64, 64),
    LAYER + "self_attn.k_proj.weight": (32, 64),
    LAYER + "self_attn.v_proj.weight": (32, 64),
    LAYER + "self_attn.o_proj.weight": (64, 64),
    LAYER + "mlp.gate_proj.weight": (128, 64),
    LAYER + "mlp.up_proj.weight": (128, 64),
    LAYER + "mlp.down_proj.weight": (64, 128),
}
TRAINER = Member("trainer", "", 0)
PATIENCE = 20.0


@dataclass
class Target:
    """A tensor-parallel rank of an engine: each parameter of ``parts`` stacks slices of logical tensors by rows."""

    member: Member
    memory: list[torch.Tensor]
    layout: Layout
    parameters: dict[str, tuple[int, list[tuple[str, tuple[slice, ...]]]]]
    endpoint: NixlEndpoint | None = None

    @staticmethod
    def of(engine: str, rank: int, staging: int) -> "Target":
        def share(name, dim):
            size = SHAPES[name][dim] // 2
            index = [slice(0, extent) for extent in SHAPES[name]]
            index[dim] = slice(rank * size, (rank + 1) * size)
            return name, tuple(index)

        def full(name):
            return name, tuple(slice(0, extent) for extent in SHAPES[name])

        fused = {
            "embed": [share("model.embed_tokens.weight", 0)],
            "norm": [full("model.norm.weight")],
            "head": [share("lm_head.weight", 0)],
            "norm1": [full(LAYER + "input_layernorm.weight")],
            "norm2": [full(LAYER + "post_attention_layernorm.weight")],
            "qkv": [share(f"{LAYER}self_attn.{p}_proj.weight", 0) for p in "qkv"],
            "o": [share(LAYER + "self_attn.o_proj.weight", 1)],
            "gate_up": [share(f"{LAYER}mlp.{p}_proj.weight", 0) for p in ("gate", "up")],
            "down": [share(LAYER + "mlp.down_proj.weight", 1)],
        }
        tensors, rows, memory, parameters = [], [], [], {}
        for name, parts in fused.items():
            offset = 0
            for logical, index in parts:
                extent = tuple(s.stop - s.start for s in index)
                stride = (extent[1] * 2, 2) if len(extent) == 2 else (2,)
                rows.append(row(len(tensors), len(memory), offset, tuple(s.start for s in index), extent, stride))
                tensors.append(Tensor(logical, "bfloat16", SHAPES[logical]))
                offset += 2 * torch.Size(extent).numel()
            parameters[name] = (len(memory), parts)
            memory.append(host_arena(offset))
        at = -1
        if staging:
            at = len(memory)
            memory.append(host_arena(staging))
        regions = tuple(region_of(m.zero_()) for m in memory)
        layout = Layout(tuple(tensors), regions, np.array(rows, dtype="<i8").tobytes(), at)
        return Target(Member("inference", engine, rank), memory, layout, parameters)

    def check(self, masters):
        for index, parts in self.parameters.values():
            expected = torch.cat([masters[name][index].to(torch.bfloat16).reshape(-1) for name, index in parts])
            assert torch.equal(self.memory[index].view(torch.bfloat16), expected)

    def untouched(self):
        return not any(m.any() for m in self.memory)

    def scatter(self, copies):
        strided_copy(self.memory, self.memory, scatter_table(as_matrix(copies, COPY_COLUMNS), self.layout))

    def digest(self):
        return digest(self.memory, digest_table(self.layout.matrix(), self.layout))


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


def made_slots(masters, staging):
    slots = TrainerSlots(masters, model_table(CONFIG), options=SlotOptions(staging_bytes=staging))
    slots.convert(masters)
    return slots


def planned(slots, targets, incarnation=1):
    """(plan, the trainer's Connect)."""
    sources = [Party(TRAINER, 1, slots.layout)]
    plan = make_plan(sources, [Party(t.member, incarnation, t.layout) for t in targets], CostModel())
    part, by_member = plan.part(TRAINER), {t.member: t for t in targets}
    peers = tuple(
        Peer(
            member,
            incarnation,
            by_member[member].endpoint.name if by_member[member].endpoint else "",
            by_member[member].endpoint.metadata() if by_member[member].endpoint else b"",
            by_member[member].layout.regions,
        )
        for member in part.peers
    )
    connect = Connect(
        fingerprint=part.fingerprint,
        root=plan.root,
        peers=peers,
        copies=part.copies,
        expected_bytes=part.expected_bytes,
    )
    return plan, connect


@pytest.mark.parametrize("staging", [0, 1 << 20], ids=["straight", "packed"])
async def test_a_push_gives_every_engine_rank_its_bytes(weights, endpoints, staging):
    masters = weights.state(SHAPES)
    slots = made_slots(masters, staging)
    targets = [Target.of("a", rank, staging) for rank in range(2)]
    for target in targets:
        target.endpoint = endpoints(str(target.member))
        target.endpoint.register(target.layout.regions)
    plan, connect = planned(slots, targets)
    transport = TransportPlan(slots)
    transport.register(endpoints("trainer/0"))
    assert transport.fingerprint == ""
    async with polling(targets):
        await transport.connect(connect)
        assert transport.fingerprint == connect.fingerprint
        sent = await transport.push([t.member for t in targets], PATIENCE, transport.digest())
        assert {t.peer for t in sent} == {t.member for t in targets}
        assert {t.peer: t.bytes for t in sent} == dict(transport.bytes_per_peer())
        packed = sum(len(plan.part(t.member).copies) for t in targets)
        assert (packed > 0) == (staging > 0)
        for target in targets:
            target.scatter(plan.part(target.member).copies)
            target.check(masters)
        for transfer in sent:
            target = next(t for t in targets if t.member == transfer.peer)
            assert transfer.digest == target.digest(), "digest of the slots equals digest of what arrived"
        changed = {name: tensor + 1 for name, tensor in masters.items()}
        slots.convert(changed)
        await transport.push([t.member for t in targets], PATIENCE)
        for target in targets:
            target.scatter(plan.part(target.member).copies)
            target.check(changed)


async def test_only_granted_members_are_written(weights, endpoints):
    masters = weights.state(SHAPES)
    slots, targets = made_slots(masters, 0), [Target.of(engine, rank, 0) for engine in "ab" for rank in range(2)]
    for target in targets:
        target.endpoint = endpoints(str(target.member))
        target.endpoint.register(target.layout.regions)
    transport = TransportPlan(slots)
    transport.register(endpoints("trainer/0"))
    async with polling(targets):
        await transport.connect(planned(slots, targets)[1])
        granted = [t.member for t in targets if t.member.engine == "b"]
        sent = await transport.push([*granted, Member("inference", "stranger", 0)], PATIENCE)
    assert sorted(t.peer for t in sent) == sorted(granted)
    assert all(t.untouched() for t in targets if t.member.engine == "a")
    for target in targets[2:]:
        target.check(masters)


async def test_unchanged_edges_are_kept_and_replaced_processes_forgotten(weights):
    masters = weights.state(SHAPES)
    slots, targets = made_slots(masters, 0), [Target.of("a", rank, 0) for rank in range(2)]
    double = EndpointDouble()
    transport = TransportPlan(slots)
    transport.register(double)
    _, connect = planned(slots, targets)
    peers = tuple(replace_name(peer, f"{peer.member}-old") for peer in connect.peers)
    await transport.connect(with_peers(connect, peers))
    assert [name for call, name in double.calls if call == "edge"] == ["a/0-old", "a/1-old"]
    double.calls.clear()
    await transport.connect(with_peers(connect, peers))
    assert not [call for call in double.calls if call[0] in ("edge", "release", "forget")]
    double.calls.clear()
    await transport.connect(with_peers(connect, (peers[0], replace_name(peers[1], "a/1-new"))))
    assert double.calls == [
        ("release", "a/1-old"),
        ("forget", "a/1-old"),
        ("connect", "a/1-new"),
        ("edge", "a/1-new"),
        ("warm", "a/0-old"),
        ("warm", "a/1-new"),
    ]


async def test_a_peer_that_fails_does_not_hide_the_others(weights):
    masters = weights.state(SHAPES)
    slots, targets = made_slots(masters, 0), [Target.of("a", rank, 0) for rank in range(2)]
    double = EndpointDouble(failing="a/1")
    transport = TransportPlan(slots)
    transport.register(double)
    _, connect = planned(slots, targets)
    await transport.connect(with_peers(connect, tuple(replace_name(p, str(p.member)) for p in connect.peers)))
    with pytest.raises(PushError, match=r"a/1: .*the deadline") as caught:
        await transport.push([t.member for t in targets], PATIENCE)
    assert [t.peer for t in caught.value.transfers] == [targets[0].member]
    assert list(caught.value.failures) == [targets[1].member]
    assert (caught.value.fault, caught.value.retry) == ("network", True)


async def test_a_peer_that_does_not_take_the_first_word_leaves_the_plan_unready(weights):
    masters = weights.state(SHAPES)
    slots, targets = made_slots(masters, 0), [Target.of("a", rank, 0) for rank in range(2)]
    double = EndpointDouble(failing="a/1")
    double.warm_up_fails = True
    transport = TransportPlan(slots)
    transport.register(double)
    _, connect = planned(slots, targets)
    with pytest.raises(DeadlineError):
        await transport.connect(with_peers(connect, tuple(replace_name(p, str(p.member)) for p in connect.peers)))
    assert transport.fingerprint == ""


async def test_a_table_that_is_not_worth_its_bytes_is_refused(weights):
    masters = weights.state(SHAPES)
    slots, targets = made_slots(masters, 0), [Target.of("a", rank, 0) for rank in range(2)]
    _, connect = planned(slots, targets)
    transport = TransportPlan(slots)
    with pytest.raises(PlanMismatch, match="are worth"):
        await transport.connect(rebuilt(connect, copies=connect.copies[: -8 * COPY_COLUMNS]))
    with pytest.raises(PlanMismatch, match="peers that it does not name"):
        await transport.connect(with_peers(connect, connect.peers[:1]))
    assert transport.fingerprint == ""


async def test_without_an_endpoint_it_only_digests(weights):
    """The transport that goes through files needs the digests of what is in them."""
    masters = weights.state(SHAPES)
    slots, targets = made_slots(masters, 0), [Target.of("a", rank, 0) for rank in range(2)]
    _, connect = planned(slots, targets)
    transport = TransportPlan(slots)
    await transport.connect(connect)
    sent = await transport.push([t.member for t in targets], PATIENCE)
    assert {t.peer: t.digest for t in sent} == transport.digest()
    assert {t.peer: t.bytes for t in sent} == dict(transport.bytes_per_peer())
    assert all(t.untouched() for t in targets)
    assert transport.bytes_per_peer()[Member("inference", "stranger", 0)] == 0


def replace_name(peer, name):
    return Peer(peer.member, peer.incarnation, name, b"card", peer.regions)


def with_peers(connect, peers):
    return rebuilt(connect, peers=peers)


def rebuilt(connect, **changes):
    fields = {name: getattr(connect, name) for name in connect.__struct_fields__}
    return Connect(**(fields | changes))


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

    def connect(self, name, card):
        self.calls.append(("connect", name))

    def forget(self, name):
        self.calls.append(("forget", name))

    def prepare_edge(self, name, local, remote, runs, *, describe):
        self.calls.append(("edge", name))
        return EdgeDouble(name, int(runs[:, 5].sum()))

    def release_edge(self, edge):
        self.calls.append(("release", edge.peer))

    async def warm_up(self, edges, deadline_seconds):
        self.calls += [("warm", edge.peer) for edge in edges]
        return await self.write(edges, deadline_seconds=deadline_seconds, fail=self.warm_up_fails)

    async def write(self, edges, *, deadline_seconds, fail=True):
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
