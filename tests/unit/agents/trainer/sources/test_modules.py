"""Modules read as their state_dict gives them: real FSDP2, DDP and FSDP1 on two gloo ranks, wrappers on one."""

import os

import pytest
import torch
import torch.distributed as dist
from ports import free_port
from torch import multiprocessing, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from weightsync.agents.trainer.errors import ChangedTensor, MissingTensor, UnfitTensor
from weightsync.agents.trainer.models import model_table
from weightsync.agents.trainer.slots import SlotOptions, TrainerSlots
from weightsync.agents.trainer.slots.conversion import ConversionSpec, Source
from weightsync.agents.trainer.sources.modules import module_tensors
from weightsync.agents.trainer.state import current_state

from tests.unit.agents.trainer.test_gloo import CONFIG, Causal

OPTIONS = SlotOptions(8192, staging_bytes=0)
TOKENS = torch.arange(64).view(2, 32) % 67


def in_two_processes(body, *arguments):
    multiprocessing.spawn(started, (free_port(), body, arguments), nprocs=2)


def started(rank, port, body, arguments):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    body(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def sharded_model(**options):
    model = Causal()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in (model.model.layers[0], model):
        fully_shard(part, mesh=mesh, mp_policy=policy, **options)
    return model


def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss = nn.functional.cross_entropy(model(TOKENS).float().flatten(0, 1), TOKENS.flatten())
    loss.backward()
    optimizer.step()


def evaluate(model):
    with torch.no_grad():
        model(TOKENS)


def assert_slots_hold(slots, model):
    """All ranks' slots together hold what the trained shards are now, in the forward dtype."""
    masters = {n: t.full_tensor() for n, t in model.state_dict().items() if isinstance(t, DTensor)}
    everyone = [None, None]
    dist.all_gather_object(everyone, {entry.tensor.name for entry in slots.entries()})
    assert set.union(*everyone) == set(masters)
    for entry in slots.entries():
        view = torch.as_strided(
            slots.arenas[0].view(torch.bfloat16), entry.box.extent, [s // 2 for s in entry.stride], entry.offset // 2
        )
        assert torch.equal(view, masters[entry.tensor.name][entry.box.slices].to(torch.bfloat16)), entry.tensor.name


def publish_around_evaluations(rank):
    for options in ({}, {"reshard_after_forward": False}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}):
        model = sharded_model(**options)
        evaluate(model)
        whole = dict(model.named_parameters())
        assert not isinstance(whole["model.embed_tokens.weight"], DTensor), "the forward left the root whole"
        slots = TrainerSlots(current_state(model), model_table(CONFIG, fp8=False), options=OPTIONS)
        state = current_state(model)
        assert all(isinstance(tensor, DTensor) for tensor in state.values())
        assert all(tensor.requires_grad for tensor in state.values())
        slots.convert(state)
        assert_slots_hold(slots, model)
        train(model)
        evaluate(model)
        slots.convert(current_state(model))
        assert_slots_hold(slots, model)
        evaluate(model)
        with pytest.raises(ChangedTensor, match=r"over dp_shard=2; FSDP2 leaves parameters whole .*give the model"):
            slots.check(dict(model.named_parameters()))
        before = {name: tensor.full_tensor().clone() for name, tensor in model.state_dict().items()}
        train(model)
        slots.convert(current_state(model))
        assert_slots_hold(slots, model)
        after = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
        assert not any(torch.equal(before[name], after[name]) for name in after), "it did train"


@pytest.mark.e2e
def test_fsdp2_is_read_from_its_shards_whatever_forward_came_before():
    in_two_processes(publish_around_evaluations)


def read_wrapped(rank):
    network = Causal()
    expected = dict(network.named_parameters())
    for wrapped in (
        nn.parallel.DistributedDataParallel(network),
        torch.compile(nn.parallel.DistributedDataParallel(network), backend="eager"),
        nn.parallel.DistributedDataParallel(torch.compile(network, backend="eager")),
    ):
        state = current_state(wrapped)
        assert state.keys() == expected.keys()
        assert all(state[name] is expected[name] for name in expected)


def refuse_flat(rank):
    for use_orig_params in (True, False):
        cpu = torch.device("cpu")
        model = FullyShardedDataParallel(Causal(), device_id=cpu, use_orig_params=use_orig_params)
        with pytest.raises(UnfitTensor, match=r"^'FullyShardedDataParallel' is sharded by FullyShardedDataParallel"):
            current_state(model)
        with pytest.raises(
            UnfitTensor, match=r"^'actor' is sharded by FullyShardedDataParallel.*fully_shard \(FSDP2\)"
        ):
            current_state(nn.ModuleDict({"actor": model}))
        state = current_state(dict(model.named_parameters()))
        with pytest.raises(UnfitTensor, match=r"^'.*(weight|_flat_param)' is sharded by FullyShardedDataParallel"):
            TrainerSlots(state, Everything(state))


class Everything:
    """A table that reads each name as it is."""

    layers = 0

    def __init__(self, names):
        self.names = names

    def for_keys(self, keys):
        return self

    def non_layer_specs(self):
        return [ConversionSpec(name, (Source(name),)) for name in sorted(self.names)]


def read_or_refuse(rank):
    read_wrapped(rank)
    refuse_flat(rank)


@pytest.mark.e2e
def test_ddp_is_read_through_and_fsdp1_refused_by_name():
    in_two_processes(read_or_refuse)


def test_activation_checkpointing_and_compiled_layers_leave_the_models_names():
    network = Causal()
    expected = dict(network.named_parameters())
    network.model.layers[0] = torch.compile(checkpoint_wrapper(network.model.layers[0]), backend="eager")
    state = current_state(network)
    assert state.keys() == expected.keys()
    assert all(state[name] is expected[name] for name in expected)


def test_buffers_that_are_not_saved_and_extra_state_are_left_out():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"version": 1}

        def set_extra_state(self, state):
            pass

    network = Extra(2, 2)
    network.register_buffer("table", torch.ones(1), persistent=False)
    network.register_buffer("count", torch.ones(1))
    assert module_tensors(network).keys() == {"weight", "bias", "count"}


def test_tied_tensors_are_there_under_each_name():
    network = Causal()
    network.lm_head.weight = network.model.embed_tokens.weight
    state = module_tensors(network)
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]


def test_a_module_that_renames_in_its_state_dict_is_read_by_those_names():
    network = Causal()
    network.register_state_dict_post_hook(
        lambda module, state, prefix, metadata: state.update(renamed=state.pop("lm_head.weight"))
    )
    state = module_tensors(network)
    assert state["renamed"] is network.lm_head.weight
    assert "lm_head.weight" not in state


def test_a_parametrised_module_is_refused_with_what_to_do():
    network = Causal()
    nn.utils.parametrizations.spectral_norm(network.model.layers[0].self_attn.q_proj)
    with pytest.raises(
        MissingTensor, match=r"q_proj\.weight'.* it has .*original.*a parametrised module; give a callable"
    ):
        TrainerSlots(current_state(network), model_table(CONFIG, fp8=False), options=OPTIONS)


class Own(nn.Linear):
    """Saves by a way of its own."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "doubled"] = self.weight * 2


class Asked(nn.Module):
    """Makes its weight when its state is asked for."""

    def __init__(self):
        super().__init__()
        self.register_parameter("weight", None)
        self.inner = nn.Linear(2, 2)
        self.register_state_dict_pre_hook(lambda module, prefix, keep: setattr(module, "weight", module.inner.weight))


def test_every_kind_of_module_gives_what_its_state_dict_gives():
    shared = nn.BatchNorm1d(3)
    instance = nn.Linear(2, 2)
    instance.state_dict = lambda destination, prefix, keep_vars: destination.update({prefix + "alone": instance.weight})
    network = nn.ModuleDict(
        {
            "own": nn.Sequential(Own(2, 3), shared),
            "again": shared,
            "asked": Asked(),
            "instance": nn.ModuleList([nn.Linear(2, 2, bias=False), instance]),
            "quantised": nn.Sequential(nn.Identity(), nn.Embedding(3, 4)),
        }
    )
    network["quantised"].register_module("nothing", None)
    network["quantised"][1].register_state_dict_post_hook(
        lambda module, state, prefix, metadata: state.update({prefix + "more": module.weight})
    )
    expected = {n: t for n, t in network.state_dict(keep_vars=True).items() if n != "own.0.doubled"}
    found = module_tensors(network)
    assert torch.equal(found.pop("own.0.doubled"), network["own"][0].weight * 2)
    assert list(found) == list(expected)
    assert all(found[name] is expected[name] for name in expected)
