"""Whole tensors from shards over every kind of mesh, in as few collectives as there are dimensions that cut them."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from weightsync.agents.trainer.errors import UnsupportedPlacement
from weightsync.agents.trainer.slots import whole
from weightsync.agents.trainer.slots.whole import whole_tensors

MESHES = {
    "fsdp 3": ((3,), [Shard(0)]),
    "columns": ((4,), [Shard(1)]),
    "hsdp": ((2, 3), [Replicate(), Shard(0)]),
    "tp under fsdp": ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
    "fsdp and row-parallel": ((2, 3), [Shard(0), Shard(1)]),
    "replicas": ((3,), [Replicate()]),
    "one rank": ((1,), [Shard(0)]),
}
SHAPES = {"tall": (131, 4), "wide": (8, 70), "few": (1, 9), "vector": (13, 1)}


@pytest.mark.parametrize("most", [whole.WHOLE_BYTES, 1], ids=["together", "one by one"])
@pytest.mark.parametrize("name", MESHES)
def test_every_rank_has_all_of_every_tensor(in_ranks, weights, monkeypatch, name, most):
    monkeypatch.setattr(whole, "WHOLE_BYTES", most)
    shape, placements = MESHES[name]
    full = {key: weights(key, *extent) for key, extent in SHAPES.items()}

    def body(rank):
        mesh = init_device_mesh("cpu", shape)
        state = {key: distribute_tensor(t, mesh, placements, src_data_rank=None) for key, t in full.items()}
        state["plain"] = full["tall"].half()
        return whole_tensors(state, torch.float32)

    for found in in_ranks(torch.Size(shape).numel(), body):
        assert list(found) == [*full, "plain"]
        assert all(torch.equal(found[key], full[key]) for key in full)
        assert torch.equal(found["plain"], full["tall"].half().float())


def test_all_of_a_mesh_travel_in_one_collective_per_cutting_dimension(in_ranks, weights, monkeypatch):
    calls = []
    plain = dist.all_gather
    monkeypatch.setattr(dist, "all_gather", lambda *args, **kwargs: (calls.append(1), plain(*args, **kwargs)))
    full = {f"x{n}": weights(f"x{n}", 5 + n, 4) for n in range(30)}

    def body(rank):
        mesh = init_device_mesh("cpu", (2, 2))
        cut = [[Replicate(), Shard(0)], [Shard(1), Replicate()]]
        state = {k: distribute_tensor(t, mesh, cut[n % 2], src_data_rank=None) for n, (k, t) in enumerate(full.items())}
        found = whole_tensors(state, torch.float32)
        assert all(torch.equal(found[key], full[key]) for key in full)

    in_ranks(4, body)
    assert len(calls) == 2 * 4, "one for each way of cutting, on each rank"


def test_a_mesh_that_lists_its_ranks_in_another_order(in_ranks, weights):
    full = weights("x", 7, 6)

    def body(rank):
        mesh = DeviceMesh("cpu", [[3, 0], [2, 1]])
        row, column = mesh.get_coordinate()
        local = full.chunk(2)[row].chunk(2, 1)[column].contiguous()
        x = DTensor.from_local(local, mesh, [Shard(0), Shard(1)], run_check=False, shape=full.shape, stride=(6, 1))
        return whole_tensors({"x": x}, torch.float32)["x"]

    assert all(torch.equal(found, full) for found in in_ranks(4, body))


def test_a_pending_reduction_is_refused_by_name(in_ranks):
    def body(rank):
        x = DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (2,)), [Partial()], run_check=False)
        with pytest.raises(UnsupportedPlacement, match=r"q\.lora_A"):
            whole_tensors({"q.lora_A": x}, torch.float32)

    in_ranks(2, body)
