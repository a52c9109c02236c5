"""Boxes against real DTensors and against torch's own chunking."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from weightsync.agents.trainer.errors import UnsupportedPlacement
from weightsync.agents.trainer.slots.boxes import Cut, Grid, LocalShare, local_share


def local_from_boxes(full, tensor):
    """The local tensor, rebuilt from the full one by the boxes alone."""
    held = local_share("w", tensor)
    local = torch.full(held.local_shape, float("nan"))
    for part in held.boxes:
        local[part.local] = full[part.box.slices]
    return local


@pytest.mark.parametrize(
    ("mesh_shape", "names", "placements", "shape"),
    [
        ((8,), ("dp",), [Shard(0)], (24, 5)),
        ((8,), ("dp",), [Shard(0)], (13, 5)),
        ((8,), ("dp",), [Shard(0)], (3, 5)),
        ((8,), ("dp",), [Shard(1)], (3, 21)),
        ((2, 4), ("dp_replicate", "dp_shard"), [Replicate(), Shard(0)], (10, 4)),
        ((4, 2), ("dp", "tp"), [Shard(0), Shard(0)], (16, 3)),
        ((4, 2), ("dp", "tp"), [Shard(0), Shard(1)], (9, 7)),
        ((4, 2), ("dp", "tp"), [_StridedShard(0, split_factor=2), Shard(0)], (16, 3)),
        ((2, 2, 2), ("dp", "ep", "tp"), [Shard(1), Shard(0), Shard(2)], (4, 6, 8)),
        ((8,), ("dp",), [Replicate()], (4,)),
    ],
)
def test_boxes_are_what_each_rank_of_a_real_mesh_holds(in_ranks, weights, mesh_shape, names, placements, shape):
    full = weights("w", *shape)

    def body(rank):
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
        tensor = distribute_tensor(full, mesh, placements, src_data_rank=None)
        assert torch.equal(local_from_boxes(full, tensor), tensor.to_local())
        assert torch.equal(tensor.full_tensor(), full)
        return local_share("w", tensor)

    shares = in_ranks(8, body)
    count = torch.zeros(shape)
    for held in shares:
        if held.first_replica:
            for part in held.boxes:
                count[part.box.slices] += 1
    assert torch.equal(count, torch.ones(shape)), "the first replicas cover every element once"


@pytest.mark.parametrize(("rows", "even"), [(16, True), (18, False)])
def test_fsdp2_over_tensor_parallel_layers(in_ranks, weights, rows, even):
    up, down = weights("up", 16, rows), weights("down", rows, 16)

    def body(rank):
        mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
        model = torch.nn.Sequential(torch.nn.Linear(rows, 16, bias=False), torch.nn.Linear(16, rows, bias=False))
        model[0].weight.data.copy_(up)
        model[1].weight.data.copy_(down)
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        for full, layer in ((up, model[0]), (down, model[1])):
            assert torch.equal(local_from_boxes(full, layer.weight), layer.weight.to_local())
        return local_share("w", model[1].weight)

    assert all(held.even == even for held in in_ranks(8, body))


def test_context_parallelism_is_the_flattened_axis(in_ranks, weights):
    full = weights("w", 10, 3)

    def body(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "cp"))
        model = torch.nn.Linear(3, 10, bias=False)
        model.weight.data.copy_(full)
        fully_shard(model, mesh=mesh["dp_shard", "cp"]._flatten("dp_shard_cp"))
        assert torch.equal(local_from_boxes(full, model.weight), model.weight.to_local())
        return local_share("w", model.weight)

    shares = in_ranks(4, body)
    assert {str(held.grid) for held in shares} == {"dp_shard_cp=4"}
    assert [held.local_shape[0] for held in shares] == [3, 3, 3, 1]


def test_a_pending_reduction_has_no_boxes(in_ranks):
    def body(rank):
        mesh = init_device_mesh("cpu", (2,))
        tensor = DTensor.from_local(torch.ones(2), mesh, [Partial()])
        with pytest.raises(UnsupportedPlacement, match=r"'grad'.*neither a shard nor a replica"):
            local_share("grad", tensor)

    in_ranks(2, body)


@given(
    size=st.integers(0, 60),
    cuts=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), max_size=3),
)
def test_shares_follow_torch_chunk_and_cover_every_index_once(size, cuts):
    made = tuple(Cut(number, 0, parts, factor) for number, (parts, factor) in enumerate(cuts))
    mesh = tuple(cut.parts for cut in made)
    counted = torch.zeros(size, dtype=torch.int64)
    for coordinate in itertools.product(*(range(parts) for parts in mesh)):
        index = torch.arange(size)
        for cut, position in zip(made, coordinate, strict=True):
            pieces = chunks(index, cut.factor) if cut.factor > 1 else [index]
            index = torch.cat([chunks(piece, cut.parts)[position] for piece in pieces])
        grid = Grid(mesh, tuple(map(str, range(len(mesh)))), coordinate, tuple(range(math.prod(mesh))))
        held = LocalShare((size,), torch.float32, made, grid)
        ours = [i for part in held.boxes for i in range(part.box.offset[0], part.box.end[0])]
        assert ours == index.tolist()
        counted[index] += 1
    assert (counted == 1).all()


def chunks(index, parts):
    """torch.chunk, with the empty pieces that it leaves out."""
    found = list(torch.chunk(index, parts))
    return found + [index[:0]] * (parts - len(found))
