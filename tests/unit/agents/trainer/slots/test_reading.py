"""What is read at a publish, and what a state that changed is told."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from weightsync.agents.trainer.errors import ChangedTensor, MissingTensor, UnfitTensor
from weightsync.agents.trainer.slots.boxes import local_share
from weightsync.agents.trainer.slots.merged import Adapter, Merge, MergedState
from weightsync.agents.trainer.slots.reading import Picks, Read, Readings

FACTORS = {"a": torch.ones(1, 2), "b": torch.ones(4, 1)}


def readings(state, *keys):
    return Readings(state, [Read(key, f"logical {key}", local_share(key, state[key])) for key in keys or state])


def test_each_tensor_is_taken_once_as_it_is_now():
    state = {"a": torch.randn(4), "b": torch.randn(2, 3)}
    reads = readings(state, "b", "a", "b")
    assert reads.numbers == {"b": 0, "a": 1}
    newer = {name: tensor + 1 for name, tensor in state.items()}
    assert [id(local) for local in reads.take(newer).locals] == [id(newer["b"]), id(newer["a"])]


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (torch.randn(3, 6), r"'x' is Tensor \(3, 6\) now; its slot was made for \(3, 5\) over no mesh"),
        (torch.randn(3, 5).double(), r"a source of 'logical x' has dtype, shape, strides and device \(torch.float64"),
        (torch.randn(5, 3).T, r"strides and device \(torch.float32, \(3, 5\), \(1, 3\)"),
    ],
)
def test_a_plain_tensor_that_changed_is_refused_by_name(now, told):
    reads = readings({"x": torch.randn(3, 5)})
    with pytest.raises(ChangedTensor, match=told):
        reads.take({"x": now})


class Codes(torch.Tensor):
    """Claims to be what it is made of; its values are elsewhere."""

    @staticmethod
    def __new__(cls, like):
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return NotImplemented


class Named(torch.nn.Parameter):
    """A class of a framework's own whose values are in its memory."""


def given_back(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (Codes(torch.randn(3, 5)), "'x' is a Codes, whose values are not in its own memory"),
        (given_back(torch.randn(3, 5)), "'x' has no memory now"),
        (torch.empty(3, 5, device="meta"), "'x' is on meta"),
        (torch.randn(3, 5).to_sparse(), "'x' has the layout torch.sparse_coo"),
        (torch.nn.UninitializedParameter(), "'x' has no shape yet"),
        ([[1.0] * 5] * 3, "'x' is a list and no tensor"),
    ],
)
def test_what_has_become_unfit_is_refused_although_it_looks_the_same(now, told):
    reads = readings({"x": torch.randn(3, 5)})
    with pytest.raises(UnfitTensor, match=told):
        reads.take({"x": now})


def test_a_class_of_a_framework_is_taken_if_its_values_are_its_own():
    reads = readings({"x": torch.randn(3, 5)})
    now = Named(torch.randn(3, 5))
    assert reads.take({"x": now}).locals[0] is now


def test_each_tensor_is_fetched_once_for_all_its_parts():
    state = MergedState({"x": torch.zeros(4, 2)}, {"x": Merge("x", (Adapter("a", "b", 2.0),))}, FACTORS)
    taken = readings(state).take(state)
    assert taken.merged_bytes(0) == 32
    taken.gather()
    picks = Picks([(0, (slice(0, 1), slice(0, 2))), (0, None), (0, (slice(1, 4), slice(0, 2)))])
    first, whole, rest = picks.of(taken)
    assert first.data_ptr() == whole.data_ptr(), "one merged weight"
    assert torch.equal(torch.cat([first, rest]), whole)
    assert torch.equal(whole, torch.full((4, 2), 2.0))
    assert [part.shape for part in picks.like(taken)] == [(1, 2), (4, 2), (3, 2)]


def test_a_missing_tensor_is_named_with_what_it_becomes():
    with pytest.raises(MissingTensor, match="no tensor 'x', which the table reads for 'logical x'"):
        readings({"x": torch.randn(3)}).take({"y": torch.randn(3)})


def test_another_sharding_is_refused_even_if_the_local_shapes_are_the_same(in_ranks):
    full = torch.randn(8, 8)

    def body(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        made = {"x": distribute_tensor(full, mesh, [_StridedShard(0, split_factor=2), Shard(0)], src_data_rank=None)}
        reads = readings(made)
        [local] = reads.take(made).locals
        other = distribute_tensor(full, mesh, [Shard(0), Shard(0)], src_data_rank=None)
        assert tuple(other.to_local().shape) == tuple(local.shape)
        with pytest.raises(ChangedTensor, match=r"'x' is placed as .*Make the agent anew"):
            reads.take({"x": other})
        with pytest.raises(ChangedTensor, match=r"'x' is Tensor \(8, 8\) now"):
            reads.take({"x": full})
        with pytest.raises(ChangedTensor, match=r"'x' is DTensor \(8, 8\) now"):
            readings({"x": full}).take(made)
        wider = distribute_tensor(full.double(), mesh, made["x"].placements, src_data_rank=None)
        with pytest.raises(ChangedTensor, match=r"torch.float64, \(2, 8\)"):
            reads.take({"x": wider})

    in_ranks(4, body)


def test_a_rank_without_a_share_may_have_any_empty_tensor(in_ranks):
    def body(rank):
        mesh = init_device_mesh("cpu", (3,))
        made = {"x": distribute_tensor(torch.randn(2, 4), mesh, [Shard(0)], src_data_rank=None)}
        whole = {"x": distribute_tensor(torch.randn(2, 4), mesh, [Replicate()], src_data_rank=None)}
        return [tuple(readings(state).take(state).locals[0].shape) for state in (made, whole)]

    assert in_ranks(3, body) == [[(1, 4), (2, 4)], [(1, 4), (2, 4)], [(0, 4), (2, 4)]]
