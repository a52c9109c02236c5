"""A small Llama in a trainer's slots, the tensor-parallel ranks of an engine as plain memory, and the real plan."""

from dataclasses import dataclass

import numpy as np
import torch
from weightsync.agents.memory.arena import host_arena, region_of
from weightsync.agents.tables.runs import digest_table, scatter_table
from weightsync.agents.trainer.models import model_table
from weightsync.agents.trainer.slots.slots import SlotOptions, TrainerSlots
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.kernels.copy import strided_copy
from weightsync.kernels.digest import digest
from weightsync.orchestrator.planner import CostModel, Party, make_plan
from weightsync.orchestrator.protocol.edges import Peer
from weightsync.orchestrator.protocol.landing import landed
from weightsync.orchestrator.protocol.layout import COPY_COLUMNS, Lands, Layout, Tensor, as_matrix, row
from weightsync.orchestrator.protocol.messages import Connect
from weightsync.orchestrator.protocol.names import Member, RoundName

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
ROUND = RoundName(1, 1)


@dataclass
class Target:
    """A tensor-parallel rank of an engine: each parameter of ``parts`` stacks slices of logical tensors by rows."""

    member: Member
    memory: list[torch.Tensor]
    layout: Layout
    parameters: dict[str, tuple[int, list[tuple[str, tuple[slice, ...]]]]]
    endpoint: NixlEndpoint | None = None

    @staticmethod
    def of(engine: str, rank: int, staging: int, lands: Lands = "live") -> "Target":
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
        layout = Layout(tuple(tensors), regions, np.array(rows, dtype="<i8").tobytes(), at, lands=lands)
        return Target(Member("inference", engine, rank), memory, layout, parameters)

    def check(self, masters, only=None):
        for name, (index, parts) in self.parameters.items():
            if only is not None and name not in only:
                continue
            expected = torch.cat([masters[name][index].to(torch.bfloat16).reshape(-1) for name, index in parts])
            assert torch.equal(self.memory[index].view(torch.bfloat16), expected)

    def untouched(self):
        return not any(m.any() for m in self.memory)

    def scatter(self, part):
        copies = landed(as_matrix(part.copies, COPY_COLUMNS), part.berths)
        strided_copy(self.memory, self.memory, scatter_table(copies, self.layout))

    def digest(self):
        return digest(self.memory, digest_table(self.layout.matrix(), self.layout))


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
            berth,
        )
        for member, berth in zip(part.peers, part.berths, strict=True)
    )
    connect = Connect(
        fingerprint=part.fingerprint,
        root=plan.root,
        peers=peers,
        copies=part.copies,
        expected_bytes=part.expected_bytes,
    )
    return plan, connect


async def handed_over(sender, members, seconds, round_name=ROUND):
    """The ends of a write, by member."""
    ends = []
    await sender.write(round_name, members, seconds, ends.append)
    assert len({end.member for end in ends}) == len(ends), "each peer's end is told once"
    return {end.member: end for end in ends}


def replace_name(peer, name):
    return Peer(peer.member, peer.incarnation, name, b"card", peer.regions, peer.berth)


def with_peers(connect, peers):
    return rebuilt(connect, peers=peers)


def rebuilt(connect, **changes):
    fields = {name: getattr(connect, name) for name in connect.__struct_fields__}
    return Connect(**(fields | changes))
