"""Copies of tensors on several ranks: the same everywhere, or named; nothing is said of what one rank has alone."""

import pytest
import tiny_fleet
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from weightsync.agents.trainer.routes.routes import NeededTable
from weightsync.agents.trainer.slots import SlotOptions, TrainerSlots
from weightsync.agents.trainer.slots.conversion import ConversionSpec, Source
from weightsync.agents.trainer.slots.quantization import QuantizationSpec
from weightsync.agents.trainer.sources.copies import Copies, differing, unlike
from weightsync.orchestrator.planner import CostModel, Party, make_plan
from weightsync.orchestrator.protocol.names import Member

FP8 = QuantizationSpec(torch.float8_e4m3fn, "_scale_inv")
SHAPES = {"norm": (64,), "bias": (8,), "matrix": (256, 128), "blocks": (256, 128)}
BOTH = [Replicate(), Shard(0)]
ALONE = [Shard(0), Replicate()]
MESHES = {
    "ddp": ((4,), {}),
    "hsdp": ((2, 2), dict.fromkeys(SHAPES, BOTH)),
    "hsdp and buffers": ((2, 2), {"matrix": BOTH, "blocks": BOTH}),
    "fsdp and tensor parallelism": ((2, 2), {"norm": ALONE, "matrix": [Shard(0), Shard(1)], "blocks": ALONE}),
}


def copies_of(rank, weights, name, drift):
    """This rank's copies and slots; ``drift``: rank and tensor, of which it holds something else."""
    shape, placements = MESHES[name]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])
    state = {}
    for tensor, full in weights.state(SHAPES).items():
        value = full + 1 if drift == (rank, tensor) else full.clone()
        placed = placements.get(tensor)
        state[tensor] = value if placed is None else distribute_tensor(value, mesh, placed, src_data_rank=None)
    specs = [ConversionSpec(n, (Source(n),), quantization=FP8 if n == "blocks" else QuantizationSpec()) for n in SHAPES]
    slots = TrainerSlots(state, NeededTable(specs), options=SlotOptions(0, staging_bytes=0))
    slots.convert(state)
    return Copies(slots.slots, slots.layout, slots.arenas), slots


@pytest.mark.parametrize("name", MESHES)
def test_equal_copies_say_the_same(in_ranks, weights, name):
    def body(rank):
        return copies_of(rank, weights, name, None)[0].said()

    said = in_ranks(4, body)
    assert all(said)
    assert differing(said) is None


@pytest.mark.parametrize(
    ("name", "drift", "pair"),
    [
        ("ddp", (3, "matrix"), (0, 3)),
        ("hsdp", (2, "blocks"), (0, 2)),
        ("hsdp", (3, "norm"), (1, 3)),
        ("hsdp and buffers", (1, "bias"), (0, 1)),
        ("fsdp and tensor parallelism", (3, "norm"), (2, 3)),
    ],
)
def test_a_copy_that_has_drifted_is_named(in_ranks, weights, name, drift, pair):
    def body(rank):
        copies, _ = copies_of(rank, weights, name, drift)
        return copies.said(), copies

    found = in_ranks(4, body)
    told = differing([said for said, _ in found])
    assert told is not None
    assert told[:2] == pair
    mine, theirs = (found[rank][1].each(told[2]) for rank in pair)
    assert {each.removesuffix("_scale_inv") for each in unlike(theirs, mine)} == {drift[1]}


def test_what_one_rank_has_alone_is_not_read(in_ranks, weights):
    def body(rank):
        mesh = init_device_mesh("cpu", (2,))
        full = weights("w", 64, 16)
        state = {"w": distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None)}
        assert isinstance(state["w"], DTensor)
        slots = TrainerSlots(state, NeededTable([ConversionSpec("w", (Source("w"),))]), options=SlotOptions(0))
        return Copies(slots.slots, slots.layout, slots.arenas).said()

    assert in_ranks(2, body) == ["", ""]


def test_experts_of_a_rank_are_compared_with_those_of_its_replica_only(weights):
    def said(experts, values):
        state = {f"e.{number}.w": weights(f"e.{number}", 8, 8) + values for number in experts} | {
            "norm": weights("n", 8)
        }
        own = [ConversionSpec(key, (Source(key),), expert_id=int(key[2])) for key in state if key != "norm"]
        table = NeededTable([*own, ConversionSpec("norm", (Source("norm"),))])
        slots = TrainerSlots(state, table, rank=0, world=4, options=SlotOptions(staging_bytes=0))
        slots.convert(state)
        return Copies(slots.slots, slots.layout, slots.arenas).said()

    assert differing([said((0, 1), 0), said((2, 3), 0), said((0, 1), 0), said((2, 3), 0)]) is None
    assert differing([said((0, 1), 0), said((2, 3), 0), said((0, 1), 0), said((2, 3), 5)])[:2] == (1, 3)


def test_why_they_are_compared_a_plan_takes_parts_of_both(weights):
    """The daemon's own plan over two ranks that hold all: an engine gets some tensors of one and some of the other."""
    target = tiny_fleet.Target.of("e0", 0, staging=1 << 20)
    layout = tiny_fleet.made_slots(weights.state(tiny_fleet.SHAPES), 1 << 20).layout
    sources = [Party(Member("trainer", "", rank), 1, layout) for rank in range(2)]
    plan = make_plan(sources, [Party(target.member, 1, target.layout)], CostModel())
    assert all(plan.part(source.member).expected_bytes > 0 for source in sources)
