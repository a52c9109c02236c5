"""Tensors that are trained and that no engine would get are refused; what is meant so is declared."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from weightsync.agents.trainer.errors import UnreadTensors
from weightsync.agents.trainer.sources.unread import refuse_trained, unread

READ = ("embed.weight", "q.weight")


def frozen(*shape):
    return torch.nn.Parameter(torch.randn(shape), requires_grad=False)


def trained(*shape):
    return torch.nn.Parameter(torch.randn(shape))


@pytest.fixture
def state():
    return {"embed.weight": trained(6, 4), "q.weight": frozen(4, 4)}


def judged(state, ignore=()):
    left = unread(state, READ, ignore)
    refuse_trained(state, left, READ)
    return left


TRAINED = {
    "an adapter beside a base that keeps its name": "q.lora_a.weight",
    "a prompt": "prompt_encoder.default.embedding.weight",
    "a value head": "v_head.summary.weight",
    "an added bias": "q.bias",
    "an untied head": "lm_head.weight",
    "a prediction layer": "model.mtp.0.weight",
}


@pytest.mark.parametrize("kind", TRAINED)
def test_what_requires_a_gradient_must_be_read_or_declared(state, kind):
    name = TRAINED[kind]
    state |= {name: trained(6, 4), "rope.inv_freq": torch.randn(2)}
    with pytest.raises(UnreadTensors, match=f"^1 trained tensors are read by nobody.*: {name}\\. .*lora=.*ignore="):
        judged(state)
    assert judged(state, ("nothing", name.rsplit(".", 1)[0] + ".*")) == ("rope.inv_freq",)


ADAPTERS = [
    "q.lora_A.default.weight",
    "q.lora_A.weight",
    "q.lora_b.weight",
    "q.lora_A",
    "q.lora_B.0",
    "q.lora_magnitude_vector.default.weight",
    "layers.0.adapter.down.weight",
    "layers.0.adapters.1.weight",
    "layers.0.audio_adapter.weight",
    "q.lora.weight",
    "prefix_lora_A",
]


@pytest.mark.parametrize("name", ADAPTERS)
def test_detached_copies_are_known_as_adapters_by_their_names(state, name):
    state = {n: t.detach().clone() for n, t in state.items()} | {name: torch.randn(2, 4)}
    with pytest.raises(UnreadTensors, match=name):
        judged(state)
    assert judged(state, (name,)) == ()


@pytest.mark.parametrize("name", ["flora.weight", "explorer.weight", "adaptive.weight", "position_ids"])
def test_other_names_of_detached_tensors_are_listed_only(state, name):
    assert judged({n: t.detach() for n, t in state.items()} | {name: torch.randn(3)}) == (name,)


def test_a_tied_head_is_read_under_its_other_name(state):
    assert judged(state | {"lm_head.weight": state["embed.weight"]}) == ()
    assert judged({n: t.detach() for n, t in state.items()} | {"lm_head.weight": state["embed.weight"].detach()}) == ()
    copies = {n: t.detach() for n, t in state.items()} | {"lm_head.weight": state["embed.weight"].detach().clone()}
    assert judged(copies) == ("lm_head.weight",), "a callable may copy what is tied"
    copies["lm_head.weight"][0, 0] += 1
    with pytest.raises(UnreadTensors, match=r"lm_head\.weight"):
        judged(copies)


def test_part_of_a_tensor_is_not_the_tensor(state):
    whole = trained(8, 4)
    state = {"embed.weight": whole[:6], "q.weight": state["q.weight"], "other.weight": whole[2:]}
    with pytest.raises(UnreadTensors, match=r"other\.weight"):
        judged(state)


def test_sharded_tensors_are_tied_by_their_local_memory(in_ranks):
    def body(rank):
        mesh = init_device_mesh("cpu", (2,))
        whole = distribute_tensor(torch.arange(12.0).view(3, 4), mesh, [Shard(0)], src_data_rank=None)
        other = distribute_tensor(torch.ones(3, 4), mesh, [Shard(0)], src_data_rank=None)
        state = {"embed.weight": whole, "q.weight": other, "lm_head.weight": whole.detach()}
        tied = judged(state)
        state["lm_head.weight"] = distribute_tensor(torch.zeros(3, 4), mesh, [Shard(0)], src_data_rank=None)
        with pytest.raises(UnreadTensors):
            judged(state)
        return tied

    assert in_ranks(2, body) == [(), ()]


def test_many_are_counted_and_a_few_shown(state):
    state |= {f"x{number:02}.lora_a": torch.ones(1) for number in range(20)}
    with pytest.raises(
        UnreadTensors, match=r"^20 trained tensors .*: x00\.lora_a, .*, x05\.lora_a and 14 more\. "
    ) as error:
        judged(state)
    assert len(error.value.names) == 20


def test_extra_state_is_no_tensor_and_no_trouble(state):
    assert judged(state | {"q._extra_state": b"", "n": torch.ones((), dtype=torch.int64)}) == ("n", "q._extra_state")
