"""What is gathered equals the whole tensor bit for bit, over every kind of mesh, however many rounds it takes."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from weightsync.agents.trainer.slots.arena import ArenaPlan
from weightsync.agents.trainer.slots.boxes import local_share
from weightsync.agents.trainer.slots.conversion import ConversionSpec, Source
from weightsync.agents.trainer.slots.gathering import GATHER_BYTES, Gathering
from weightsync.agents.trainer.slots.quantization import FP8_SUFFIX, QuantizationSpec
from weightsync.agents.trainer.slots.reading import Read, Readings
from weightsync.agents.trainer.slots.routing import Router, SlotOptions
from weightsync.agents.trainer.slots.slot import made_slots

FP8 = QuantizationSpec(torch.float8_e4m3fn, FP8_SUFFIX)
WIDENED = QuantizationSpec(torch.float32)
MASTER = QuantizationSpec(torch.float32, keeps_master=True)
MESHES = {
    "fsdp 2": ((2,), [Shard(0)]),
    "fsdp 3": ((3,), [Shard(0)]),
    "fsdp 4 on columns": ((4,), [Shard(1)]),
    "hsdp": ((2, 3), [Replicate(), Shard(0)]),
    "hsdp, replicas last": ((3, 2), [Shard(0), Replicate()]),
    "tp under fsdp": ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
    "fsdp and row-parallel": ((2, 3), [Shard(0), Shard(1)]),
    "three dimensions": ((2, 2, 2), [Replicate(), Shard(1), Shard(0)]),
    "replicas": ((3,), [Replicate()]),
    "one rank": ((1,), [Shard(0)]),
}
SHAPES = {"embed": (503, 16), "square": (130, 140), "few": (1, 9)}


class Counted:
    """The collectives of this process's ranks."""

    def __init__(self, monkeypatch):
        self.calls = 0
        plain = dist.all_to_all_single

        def counting(*args, **kwargs):
            self.calls += 1
            return plain(*args, **kwargs)

        monkeypatch.setattr(dist, "all_to_all_single", counting)


def gathered(state, specs, *, rank, most=GATHER_BYTES, hsdp="shared", primary=True):
    """Slots of gathered tensors of this rank, their gathering and their readings."""
    shares = {key: local_share(key, tensor) for key, tensor in state.items()}
    options = SlotOptions(min_sharded_bytes=2**40, min_share_bytes=2**40, hsdp=hsdp, replicate_dim="dim0")
    router, plan = Router(options, rank, primary), ArenaPlan()
    slots = made_slots([(spec, router.route(spec, shares)) for spec in specs], shares, plan)
    arena = torch.zeros(plan.size, dtype=torch.uint8)
    for slot in slots:
        slot.bind(arena)
    readings = Readings(state, [Read(s.key, spec.dst, shares[s.key]) for spec in specs for s in spec.sources])
    slots = [slot for slot in slots if slot.kind == "gathered"]
    return slots, readings, Gathering(slots, readings, readings.first(state), most)


def values(slots):
    """Name → values (and scales) of the slots that this rank keeps."""
    return {slot.spec.dst: (slot.moves[0].out.clone(), slot.moves[0].scale_out) for slot in slots if slot.moves}


@pytest.mark.parametrize("most", [GATHER_BYTES, 1, 20_000], ids=["one round", "a round each", "some rounds"])
@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_gives_the_whole_tensors(in_ranks, weights, name, most):
    shape, placements = MESHES[name]
    treatments = {"": QuantizationSpec(), "wide ": WIDENED, "master ": MASTER, "fp8 ": FP8}
    masters = {f"{t}{n}": weights(t + n, *extent) for t in treatments for n, extent in SHAPES.items()}
    specs = [
        ConversionSpec(key, (Source(key),), quantization=next(q for t, q in reversed(treatments.items()) if t in key))
        for key in masters
    ]

    def body(rank):
        mesh = init_device_mesh("cpu", shape)

        def state(offset):
            return {
                key: distribute_tensor(full + offset, mesh, placements, src_data_rank=None)
                for key, full in masters.items()
            }

        slots, readings, gathering = gathered(state(0), specs, rank=rank, most=most)
        assert len(slots) == len(specs)
        for offset in (0, 1):  # the second time through buffers that hold the first
            now = state(offset)
            gathering.convert(readings.take(now))
        return values(slots)

    ranks = in_ranks(torch.Size(shape).numel(), body)
    kept = [key for own in ranks for key in own]
    assert sorted(kept) == sorted(masters), "each at one owner"
    whole = {key: full + 1 for key, full in masters.items()}
    for own in ranks:
        for key, (out, scales) in own.items():
            treatment = next(spec.quantization for spec in specs if spec.dst == key)
            expected = torch.empty_like(out)
            grid = None if scales is None else torch.empty_like(scales)
            treatment.apply(whole[key], expected, grid)
            assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8)), key
            assert grid is None or torch.equal(scales, grid), key


def test_all_tensors_of_a_mesh_travel_in_one_collective_per_cutting_dimension(in_ranks, weights, monkeypatch):
    masters = {f"x{n}": weights(f"x{n}", 5 + n, 8) for n in range(40)}
    specs = [ConversionSpec(key, (Source(key),)) for key in masters]
    counted = Counted(monkeypatch)

    def body(rank):
        mesh = init_device_mesh("cpu", (2, 2))
        state = {k: distribute_tensor(t, mesh, [Replicate(), Shard(0)], src_data_rank=None) for k, t in masters.items()}
        _, readings, gathering = gathered(state, specs, rank=rank)
        gathering.convert(readings.take(state))

    in_ranks(4, body)
    assert counted.calls == 4, "one on each rank"


def test_sources_of_several_meshes_and_plain_ones_are_joined(in_ranks, weights):
    parts = {"a": weights("a", 5, 6), "b": weights("b", 7, 6), "c": weights("c", 9, 6)}
    spec = ConversionSpec("joined", (Source("a"), Source("b", 0, 2, 4), Source("c", 0, 1, 3)))
    stack = weights("stack", 3, 8, 4)
    cut = ConversionSpec("e.{expert}", (Source("stack", 0, 3, 4),), experts=3)

    def body(rank):
        flat, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
        state = {
            "a": distribute_tensor(parts["a"], flat, [Shard(0)], src_data_rank=None),
            "b": distribute_tensor(parts["b"], square, [Shard(0), Shard(1)], src_data_rank=None),
            "c": parts["c"],
            "stack": distribute_tensor(stack, flat, [Shard(0)], src_data_rank=None),
        }
        slots, readings, gathering = gathered(state, [cut, spec], rank=rank)
        gathering.convert(readings.take(state))
        return values(slots)

    found = {key: out for own in in_ranks(4, body) for key, (out, _) in own.items()}
    joined = torch.cat([parts["a"], parts["b"][2:6], parts["c"][1:4]])
    assert torch.equal(found["joined"], joined.to(torch.bfloat16))
    assert torch.equal(found["e.{expert}"], stack[:, 3:7].to(torch.bfloat16))


def test_a_mesh_that_lists_its_ranks_in_another_order(in_ranks, weights):
    full = weights("x", 7, 3)

    def body(rank):
        mesh = DeviceMesh("cpu", [2, 0, 1])
        position = [2, 0, 1].index(rank)
        local = full.chunk(3)[position]
        state = {"x": DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=full.shape, stride=(3, 1))}
        slots, readings, gathering = gathered(state, [ConversionSpec("x", (Source("x"),))], rank=rank)
        gathering.convert(readings.take(state))
        return values(slots)

    [out] = [out for own in in_ranks(3, body) for out, _ in own.values()]
    assert torch.equal(out, full.to(torch.bfloat16))


def test_replicas_that_keep_nothing_take_part(in_ranks, weights):
    full = weights("x", 7, 3)

    def body(rank):
        mesh = init_device_mesh("cpu", (2, 2))
        state = {"x": distribute_tensor(full, mesh, [Replicate(), Shard(0)], src_data_rank=None)}
        spec = ConversionSpec("x", (Source("x"),))
        slots, readings, gathering = gathered(state, [spec], rank=rank, hsdp="primary", primary=rank < 2)
        gathering.convert(readings.take(state))
        return values(slots)

    owned = in_ranks(4, body)
    assert [len(own) for own in owned] == [1, 0, 0, 0]
    assert torch.equal(owned[0]["x"][0], full.to(torch.bfloat16))
