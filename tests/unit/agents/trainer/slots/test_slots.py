"""Slots over real meshes: what they hold equals independent slicing, casting and quantising of the full weights."""

import gc
import re
import tracemalloc
import weakref

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from weightsync.agents.memory.arena import ALIGNMENT, host_arena
from weightsync.agents.memory.errors import MemoryPlacementError
from weightsync.agents.tables.runs import RUN_LENGTH
from weightsync.agents.trainer.errors import (
    ChangedTensor,
    ExpertPartitionError,
    MissingTensor,
    NoRoomForSlots,
    OffGridError,
)
from weightsync.agents.trainer.models import STACKED, ModelConfig, model_table
from weightsync.agents.trainer.models.dense import LlamaTable
from weightsync.agents.trainer.slots import ExpertParallel, SlotOptions, TrainerSlots, quantization
from weightsync.agents.trainer.slots import slot as slot_module
from weightsync.orchestrator.protocol.layout import COPY_COLUMNS, COPY_ROW, Tensor

DENSE = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": False,
}
MOE = DENSE | {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "moe_intermediate_size": 256}
LARGE = SlotOptions(min_sharded_bytes=0, staging_bytes=0)
LAYER = "model.layers.0."
ATTENTION = {
    "model.embed_tokens.weight": (512, 256),
    "model.norm.weight": (256,),
    "lm_head.weight": (512, 256),
    LAYER + "input_layernorm.weight": (256,),
    LAYER + "post_attention_layernorm.weight": (256,),
    LAYER + "self_attn.q_proj.weight": (512, 256),
    LAYER + "self_attn.k_proj.weight": (256, 256),
    LAYER + "self_attn.v_proj.weight": (256, 256),
    LAYER + "self_attn.o_proj.weight": (256, 512),
    LAYER + "self_attn.q_norm.weight": (64,),
    LAYER + "self_attn.k_norm.weight": (64,),
}
DENSE_SHAPES = ATTENTION | {
    LAYER + "mlp.gate_proj.weight": (512, 256),
    LAYER + "mlp.up_proj.weight": (512, 256),
    LAYER + "mlp.down_proj.weight": (256, 512),
}
STACKED_SHAPES = ATTENTION | {
    LAYER + "mlp.router.gate.weight": (8, 256),
    LAYER + "mlp.experts.w1": (8, 256, 256),
    LAYER + "mlp.experts.w2": (8, 256, 256),
    LAYER + "mlp.experts.w3": (8, 256, 256),
}


def table(config, *, fp8=False, **changes):
    return model_table(config, fp8=fp8, **changes)


def sharded(masters, mesh, placements):
    """The masters as DTensors; ``placements`` by how a name ends, else the last entry."""

    def chosen(name):
        return next(p for end, p in placements.items() if name.endswith(end))

    return {name: distribute_tensor(full, mesh, chosen(name), src_data_rank=None) for name, full in masters.items()}


def check_dense(logical, masters, fp8_reference, *, fp8):
    for name, master in masters.items():
        if fp8 and ("proj" in name):
            values, scales = fp8_reference(master)
            assert torch.equal(logical[name].view(torch.uint8), values.view(torch.uint8)), name
            assert torch.equal(logical[name + "_scale_inv"], scales), name
        else:
            assert torch.equal(logical[name], master.to(torch.bfloat16)), name


def kinds(slots):
    return {e.tensor.removeprefix(LAYER): (e.kind, e.reason) for e in slots.explain()}


# ------------------------------------------------------------------------------------------------ dense models
MESHES = {
    "fsdp 2": ((2,), ("dp_shard",), {"": [Shard(0)]}),
    "fsdp 3, uneven": ((3,), ("dp_shard",), {"": [Shard(0)]}),
    "fsdp 8": ((8,), ("dp_shard",), {"": [Shard(0)]}),
    "hsdp": ((2, 2), ("dp_replicate", "dp_shard"), {"": [Replicate(), Shard(0)]}),
    "replicas": ((2,), ("dp_replicate",), {"": [Replicate()]}),
    "fsdp and tp": (
        (2, 2),
        ("dp_shard", "tp"),
        {
            "norm.weight": [Shard(0), Replicate()],
            "o_proj.weight": [Shard(0), Shard(1)],
            "down_proj.weight": [Shard(0), Shard(1)],
            "": [_StridedShard(0, split_factor=2), Shard(0)],
        },
    ),
}


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("smallest", [0, 2**40], ids=["sharded", "gathered"])
def test_dense_models_over_every_mesh(in_ranks, weights, assemble, fp8_reference, name, fp8, smallest):
    shape, names, placements = MESHES[name]
    masters = weights.state(DENSE_SHAPES)

    def body(rank):
        state = sharded(masters, init_device_mesh("cpu", shape, mesh_dim_names=names), placements)
        slots = TrainerSlots(state, table(DENSE, fp8=fp8), options=SlotOptions(smallest, staging_bytes=0))
        slots.convert(state)
        return slots

    ranks = in_ranks(torch.Size(shape).numel(), body)
    check_dense(assemble(ranks), masters, fp8_reference, fp8=fp8)
    assert all([s.route.kind for s in r.slots] == [s.route.kind for s in ranks[0].slots] for r in ranks)


def test_what_is_sharded_and_what_is_gathered_and_why(in_ranks, weights):
    masters = weights.state(DENSE_SHAPES)

    def body(rank):
        mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp_shard",))
        state = sharded(masters, mesh, {"": [Shard(0)]})
        return TrainerSlots(state, table(DENSE, fp8=True), options=SlotOptions(100_000, staging_bytes=0))

    ranks = in_ranks(4, body)
    found = kinds(ranks[1])
    assert found["self_attn.q_proj.weight"] == ("sharded", "each rank's share stands alone")
    assert found["self_attn.o_proj.weight"][0] == "gathered"
    assert "ends at 64 of dimension 0, inside a block of 128" in found["self_attn.o_proj.weight"][1]
    assert found["input_layernorm.weight"][0] == "gathered"
    assert "512 bytes are fewer than 100000" in found["input_layernorm.weight"][1]
    for slots in ranks:
        noted = {row: (n.slot, n.reason) for n in slots.layout.notes for row in range(n.first_row, n.end_row)}
        assert noted == {row: (s.kind, s.route.reason) for s in slots.slots for row in s.rows}
    owners = [len([s for s in r.slots if s.route.kind == "gathered" and s.places]) for r in ranks]
    assert max(owners) - min(owners) <= 1, "round robin"
    assert sum(owners) == len([s for s in ranks[0].slots if s.route.kind == "gathered"])
    assert {e.tensor for r in ranks for e in r.explain() if e.bytes and e.kind == "gathered"} == {
        e.tensor for e in ranks[0].explain() if e.kind == "gathered"
    }


def test_only_the_primary_replica_holds_slots_if_so_chosen(in_ranks, weights, assemble, fp8_reference):
    masters = weights.state(DENSE_SHAPES)

    def body(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
        state = sharded(masters, mesh, {"": [Replicate(), Shard(0)]})
        slots = TrainerSlots(state, table(DENSE), options=SlotOptions(300_000, hsdp="primary"))
        slots.convert(state)
        return slots

    ranks = in_ranks(4, body)
    assert [r.primary for r in ranks] == [True, True, False, False]
    check_dense(assemble(ranks[:2]), masters, fp8_reference, fp8=False)
    assert all(len(r.layout.rows) == 0 and r.layout.staging == -1 for r in ranks[2:])


def test_every_replica_holds_slots_if_shared(in_ranks, weights, assemble, fp8_reference):
    masters = weights.state(DENSE_SHAPES)

    def body(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
        state = sharded(masters, mesh, {"": [Replicate(), Shard(0)]})
        slots = TrainerSlots(state, table(DENSE), options=LARGE)
        slots.convert(state)
        return slots

    ranks = in_ranks(4, body)
    check_dense(assemble(ranks[:2]), masters, fp8_reference, fp8=False)
    check_dense(assemble(ranks[2:]), masters, fp8_reference, fp8=False)


def test_context_parallel_ranks_take_turns_as_owners(in_ranks, weights, assemble, fp8_reference):
    masters = weights.state(DENSE_SHAPES)

    def body(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "cp"))
        state = sharded(masters, mesh["dp_shard", "cp"]._flatten("dp_shard_cp"), {"": [Shard(0)]})
        slots = TrainerSlots(state, table(DENSE), options=SlotOptions(2**40))
        slots.convert(state)
        return slots

    ranks = in_ranks(4, body)
    check_dense(assemble(ranks), masters, fp8_reference, fp8=False)
    assert all(any(s.places for s in r.slots) for r in ranks)


def test_a_pipeline_stage_holds_its_layers_only(in_ranks, weights, assemble):
    config = DENSE | {"num_hidden_layers": 2}
    second = {n.replace("layers.0", "layers.1"): s for n, s in DENSE_SHAPES.items() if n.startswith(LAYER)}
    masters = weights.state(DENSE_SHAPES | second)

    def body(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp_shard"))
        ends = ("embed_tokens.weight", "layers.0.") if rank < 2 else ("norm.weight", "lm_head.weight", "layers.1.")
        own = f"layers.{rank // 2}."
        mine = {n: t for n, t in masters.items() if own in n or ("layers" not in n and n.endswith(ends))}
        state = sharded(mine, mesh["dp_shard"], {"": [Shard(0)]})
        with pytest.raises(MissingTensor):
            TrainerSlots(state, table(config), options=SlotOptions(100_000))
        slots = TrainerSlots(state, table(config), options=SlotOptions(100_000, pipeline=True))
        slots.convert(state)
        return slots

    ranks = in_ranks(4, body)
    logical = assemble(ranks)
    assert logical.keys() == masters.keys()
    assert all(torch.equal(logical[n], masters[n].to(torch.bfloat16)) for n in masters)
    assert not {t.name for r in ranks[:2] for t in r.layout.tensors} & {
        t.name for r in ranks[2:] for t in r.layout.tensors
    }


# ---------------------------------------------------------------------------------------------------- experts
EXPERT_MESHES = {
    "ep 4": ((4,), ("ep",), [Shard(0)], None),
    "ep 2, fsdp on rows": ((2, 2), ("dp_shard", "ep"), [Shard(1), Shard(0)], None),
    "ep 2, fsdp on experts": ((2, 2), ("dp_shard", "ep"), [_StridedShard(0, split_factor=2), Shard(0)], None),
    "fsdp only": ((4,), ("dp_shard",), [Shard(0)], None),
    "fsdp 3, uneven": ((3,), ("dp_shard",), [Shard(0)], None),
    "ep 2 outside the mesh": ((2, 2), ("ep", "dp_shard"), [Shard(0)], "ep"),
}


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("name", EXPERT_MESHES)
def test_stacked_experts_over_every_mesh(in_ranks, weights, assemble, fp8_reference, name, fp8):
    shape, names, placements, hidden = EXPERT_MESHES[name]
    masters = weights.state(STACKED_SHAPES)

    def body(rank):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        world = torch.Size(shape).numel()
        flat = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
        parallel = ExpertParallel(2, mesh.get_local_rank("ep")) if hidden else None
        state = {}
        for key, full in masters.items():
            if "experts" not in key:
                state[key] = distribute_tensor(full, flat, [Shard(0)], src_data_rank=None)
                continue
            part = full.chunk(2)[mesh.get_local_rank("ep")] if hidden else full
            over = mesh["dp_shard"] if hidden else mesh
            state[key] = distribute_tensor(part, over, placements, src_data_rank=None)
        options = SlotOptions(100_000, staging_bytes=0, expert_parallel=parallel)
        slots = TrainerSlots(state, table(MOE, fp8=fp8), options=options)
        slots.convert(state)
        return slots

    ranks = in_ranks(torch.Size(shape).numel(), body)
    logical = assemble(ranks)
    names_of = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for w, projection in names_of.items():
        for expert in range(8):
            master = masters[f"{LAYER}mlp.experts.{w}"][expert]
            got = logical[f"{LAYER}mlp.experts.{expert}.{projection}.weight"]
            if fp8:
                values, scales = fp8_reference(master)
                assert torch.equal(got.view(torch.uint8), values.view(torch.uint8))
                assert torch.equal(logical[f"{LAYER}mlp.experts.{expert}.{projection}.weight_scale_inv"], scales)
            else:
                assert torch.equal(got, master.to(torch.bfloat16))
    assert torch.equal(logical[LAYER + "mlp.gate.weight"], masters[LAYER + "mlp.router.gate.weight"].to(torch.bfloat16))
    expected = "gathered" if "uneven" in name else "expert"
    assert {s.route.kind for s in ranks[0].slots if s.spec.experts} == {expected}


def test_experts_with_tensors_of_their_own_on_some_ranks(weights, assemble):
    experts = {
        f"{LAYER}mlp.experts.{e}.{p}.weight": (256, 256)
        for e in range(8)
        for p in ("gate_proj", "up_proj", "down_proj")
    }
    masters = weights.state(ATTENTION | {LAYER + "mlp.gate.weight": (8, 256)} | experts)

    def rank_of(ep, owned):
        state = {n: t for n, t in masters.items() if "experts" not in n or int(n.split(".")[5]) in owned}
        options = SlotOptions(staging_bytes=0, expert_parallel=ep)
        slots = TrainerSlots(state, table(MOE), options=options, rank=ep.rank if ep else 0, world=2)
        slots.convert(state)
        return slots

    ranks = [rank_of(ExpertParallel(2, 0), range(4)), rank_of(ExpertParallel(2, 1), range(4, 8))]
    logical = assemble(ranks)
    assert all(torch.equal(logical[n], masters[n].to(torch.bfloat16)) for n in masters)
    with pytest.raises(MissingTensor, match=r"experts\.4\.gate_proj"):
        rank_of(None, range(4))
    with pytest.raises(ExpertPartitionError, match=r"3 local experts × 2 \(ep\) = 6, but the model has 8"):
        rank_of(ExpertParallel(2, 0), range(3))


def test_an_expert_partition_that_does_not_add_up_names_mesh_and_sizes(in_ranks, weights):
    masters = weights.state(STACKED_SHAPES | {LAYER + "mlp.experts.w1": (6, 256, 256)})

    def body(rank):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
        state = sharded(masters, mesh, {"": [Shard(0)]})
        with pytest.raises(ExpertPartitionError) as caught:
            TrainerSlots(state, table(MOE, form=STACKED), options=SlotOptions(expert_parallel=ExpertParallel(4, 0)))
        return str(caught.value)

    message = in_ranks(2, body)[0]
    assert "mlp.experts.w1" in message
    assert "3 local experts × 2 (fsdp) × 4 (ep) = 24, but the model has 8" in message
    assert "dp_shard=2" in message


def test_a_tensor_parallel_slice_off_the_grid_is_an_error_by_name(in_ranks, weights):
    masters = weights.state(DENSE_SHAPES)

    def body(rank):
        mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp_shard", "tp"))
        state = sharded(masters, mesh, {"k_proj.weight": [Shard(1), Shard(0)], "": [Shard(0), Replicate()]})
        with pytest.raises(OffGridError) as caught:
            TrainerSlots(state, table(DENSE, fp8=True), options=LARGE)
        TrainerSlots(state, table(DENSE), options=LARGE)  # without blocks nothing is cut
        return str(caught.value)

    message = in_ranks(8, body)[0]
    assert "k_proj.weight" in message
    assert "ends at 64 of dimension 0" in message
    assert "tp=4" in message


# -------------------------------------------------------------------------------------------- the slots' promises
class LargestAllocation(TorchDispatchMode):
    """The largest storage that any operator returns and was not given, in bytes."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if type(t) is torch.Tensor}
        for found in tree_leaves(result):
            tensor = getattr(found, "_local_tensor", getattr(found, "elem", found))  # of a DTensor, of a pending gather
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def test_converting_allocates_nothing(weights):
    state = weights.state(DENSE_SHAPES)
    slots = TrainerSlots(state, table(DENSE))
    places = [arena.data_ptr() for arena in slots.arenas]
    with LargestAllocation() as watched:
        slots.convert(state)
    assert watched.largest == 0
    assert [arena.data_ptr() for arena in slots.arenas] == places
    assert [region.base for region in slots.layout.regions] == places
    with LargestAllocation() as watched:
        state["lm_head.weight"].to(torch.bfloat16)
    assert watched.largest == 512 * 256 * 2, "an allocation would be seen"


@pytest.mark.parametrize("fp8", [False, True])
def test_what_is_said_to_be_filled_is_and_stays(weights, monkeypatch, fp8):
    """In parts of the least size, from the beginning of the arena to its end."""
    monkeypatch.setattr(slot_module, "PART_BYTES", 4096)
    state = weights.state(DENSE_SHAPES)
    slots, whole = (TrainerSlots(state, table(DENSE, fp8=fp8)) for _ in range(2))
    whole.convert(state)
    arena, done = slots.arenas[0], whole.arenas[0]
    reached = []

    def look(offset):
        reached.append(offset)
        assert torch.equal(arena[:offset], done[:offset])
        assert not torch.equal(arena[offset:], done[offset:]) or offset == arena.numel()

    slots.fill(slots.check(state), look)
    assert reached == sorted(reached)
    assert 4 < len(reached) <= 17
    assert reached[-1] == arena.numel()
    once = []
    monkeypatch.setattr(slot_module, "PART_BYTES", 64 << 20)
    small = TrainerSlots(state, table(DENSE, fp8=fp8))
    small.fill(small.check(state), once.append)
    assert once == [arena.numel()], "a small model is converted in one go"


def test_gathered_slots_are_filled_before_any_other(in_ranks, weights, monkeypatch):
    monkeypatch.setattr(slot_module, "PART_BYTES", 4096)

    def body(rank):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
        state = {
            name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in weights.state(DENSE_SHAPES).items()
        }
        slots, whole = (TrainerSlots(state, table(DENSE)) for _ in range(2))
        whole.convert(state)
        assert {slot.kind for slot in slots.slots} == {"sharded", "gathered"}
        seen = []

        def look(offset):
            seen.append(torch.equal(slots.arenas[0][:offset], whole.arenas[0][:offset]))

        slots.fill(slots.check(state), look)
        assert len(seen) > 1
        assert all(seen)

    in_ranks(2, body)


def test_publishing_again_and_again_keeps_no_memory():
    layers = {n.replace("layers.0", f"layers.{k}"): s for k in range(30) for n, s in DENSE_SHAPES.items()}
    state = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in layers.items()}
    slots = TrainerSlots(state, table(DENSE | {"num_hidden_layers": 30}))
    slots.convert(state)
    tracemalloc.start()
    try:
        slots.convert(state)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(5):
            slots.convert(state)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 2048, "a list of its tensors would take more"


def test_gathering_allocates_nothing(in_ranks, weights):
    """Beyond the few dozen bytes in which the threads' process group counts sizes."""
    masters = weights.state(DENSE_SHAPES)

    def body(rank):
        state = sharded(masters, init_device_mesh("cpu", (2,)), {"": [Shard(0)]})
        slots = TrainerSlots(state, table(DENSE), options=SlotOptions(2**40))
        slots.convert(state)
        with LargestAllocation() as watched:
            slots.convert(state)
        return watched.largest

    assert all(found <= 64 for found in in_ranks(2, body))


def test_a_missing_tensor_is_named_before_anything_is_written(weights):
    state = weights.state(DENSE_SHAPES)
    slots = TrainerSlots(state, table(DENSE))
    slots.arenas[0].fill_(7)
    del state[LAYER + "mlp.up_proj.weight"]
    with pytest.raises(MissingTensor, match=r"layers\.0\.mlp\.up_proj\.weight"):
        slots.convert(state)
    assert (slots.arenas[0] == 7).all()
    with pytest.raises(MissingTensor, match=r"layers\.0\.mlp\.up_proj\.weight"):
        TrainerSlots(state, table(DENSE))


def test_a_tensor_that_changed_its_shape_or_sharding_is_named(in_ranks, weights):
    masters = weights.state(DENSE_SHAPES)

    def body(rank):
        state = sharded(masters, init_device_mesh("cpu", (2,)), {"": [Shard(0)]})
        slots = TrainerSlots(state, table(DENSE), options=LARGE)
        with pytest.raises(ChangedTensor, match="lm_head"):
            slots.convert(state | {"lm_head.weight": masters["lm_head.weight"]})
        other = distribute_tensor(masters["lm_head.weight"], init_device_mesh("cpu", (2,)), [Shard(1)])
        with pytest.raises(ChangedTensor, match="lm_head"):
            slots.convert(state | {"lm_head.weight": other})

    in_ranks(2, body)


def test_tied_weights_and_buffers(weights, assemble):
    state = weights.state(DENSE_SHAPES)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    state["model.rotary_emb.inv_freq"] = torch.ones(4)
    untied = TrainerSlots(state, table(DENSE))
    untied.convert(state)
    logical = assemble([untied])
    assert torch.equal(logical["lm_head.weight"], logical["model.embed_tokens.weight"])
    tied = TrainerSlots(state, table(DENSE | {"tie_word_embeddings": True}))
    assert "lm_head.weight" not in {t.name for t in tied.layout.tensors}
    assert tied.unrouted == ("lm_head.weight", "model.rotary_emb.inv_freq")
    assert tied.layout.unread == tied.unrouted


class WithScalar(LlamaTable):
    """Activations with a scalar of their own, as Apertus has them."""

    def conversion_specs(self, layer_idx):
        yield from super().conversion_specs(layer_idx)
        yield self.plain(layer_idx, "mlp.act_fn.beta")


def test_a_scalar_is_a_tensor_like_any_other(weights):
    beta = LAYER + "mlp.act_fn.beta"
    state = weights.state(DENSE_SHAPES) | {beta: torch.tensor(0.3)}
    slots = TrainerSlots(state, WithScalar(ModelConfig(DENSE)))
    slots.convert(state)
    assert Tensor(beta, "bfloat16", ()) in slots.layout.tensors
    (place,) = [entry.offset for entry in slots.entries() if entry.tensor.name == beta]
    assert slots.arenas[0][place : place + 2].view(torch.bfloat16).item() == torch.tensor(0.3).bfloat16().item()


def test_memory_comes_from_the_given_allocator_in_aligned_places(weights):
    asked = []

    def allocate(size):
        asked.append(size)
        return host_arena(size)

    slots = TrainerSlots(
        weights.state(DENSE_SHAPES), table(DENSE), options=SlotOptions(staging_bytes=4096), allocate=allocate
    )
    assert asked == [slots.layout.regions[0].length, 4096]
    assert slots.layout.staging == 1
    assert all(entry.offset % ALIGNMENT == 0 for entry in slots.entries())
    assert all(region.base % ALIGNMENT == 0 for region in slots.layout.regions)
    assert TrainerSlots(weights.state(DENSE_SHAPES), table(DENSE), options=LARGE).layout.staging == -1


def test_a_slot_knows_its_rows_and_its_writes(weights):
    slots = TrainerSlots(weights.state(DENSE_SHAPES), table(DENSE))
    matrix = slots.layout.matrix()
    assert [row for slot in slots.slots for row in slot.rows] == list(range(len(matrix)))
    copies = torch.zeros(len(matrix), COPY_COLUMNS, dtype=torch.int64).numpy()
    copies[:, COPY_ROW] = range(len(matrix))
    copies[:, 3] = -1
    for dim in range(4):
        copies[:, 4 + 2 * dim] = matrix[:, 3 + 3 * dim]
        copies[:, 5 + 2 * dim] = matrix[:, 4 + 3 * dim]
        copies[:, 14 + dim] = matrix[:, 5 + 3 * dim]
    assert [(n.first_row, n.end_row, n.slot, n.reason) for n in slots.layout.notes] == [
        (0, len(matrix), "sharded", "a plain tensor, held whole")
    ]
    for slot in slots.slots:
        writes = slot.writes(copies, slots.layout)
        assert writes[:, RUN_LENGTH].sum() == slot.explain().bytes


def test_every_way_of_quantising_is_compiled_when_the_slots_are_made(in_ranks, weights, monkeypatch):
    """Masters of local shares are converted as they are, those of gathered tensors in the dtype that they travel in."""
    asked = []
    monkeypatch.setattr(quantization, "warm_up_quantize", lambda *given, **options: asked.append((given, options)))

    def body(rank):
        mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp_shard",))
        state = sharded(weights.state(DENSE_SHAPES), mesh, {"": [Shard(0)]})
        return TrainerSlots(state, table(DENSE, fp8=True), options=LARGE)

    dtypes = {"sharded": "torch.float32", "gathered": "torch.bfloat16"}
    expected = [
        sorted({dtypes[e.kind] for e in slots.explain() if e.bytes and "_proj" in e.tensor})
        for slots in in_ranks(4, body)
    ]
    assert sorted(sorted(map(str, found)) for (_, found), _ in asked) == sorted(expected)
    assert ["torch.bfloat16", "torch.float32"] in expected
    for (device, _), options in asked:
        assert device == torch.device("cpu")
        assert options == {
            "block": (128, 128),
            "forward_dtype": torch.bfloat16,
            "scale_dtype": torch.float32,
            "scale_format": "fp32",
            "beside": "wire",
        }


def test_what_is_only_cast_compiles_nothing(weights, monkeypatch):
    monkeypatch.setattr(quantization, "warm_up_quantize", lambda *given, **options: pytest.fail("nothing to compile"))
    TrainerSlots(weights.state(DENSE_SHAPES), table(DENSE))


@pytest.mark.parametrize("fp8", [False, True])
def test_tensors_of_a_callable_live_no_longer_than_their_conversion(weights, fp8):
    def fresh():
        return {name: tensor.clone() for name, tensor in weights.state(DENSE_SHAPES).items()}

    state = fresh()
    kept = [weakref.ref(tensor) for tensor in state.values()]
    slots = TrainerSlots(state, table(DENSE, fp8=fp8), options=LARGE)
    del state
    assert not [ref for ref in kept if ref() is not None], "the first state is let go when slots are made"
    later = fresh()
    kept = [weakref.ref(tensor) for tensor in later.values()]
    slots.convert(later)
    del later
    assert not [ref for ref in kept if ref() is not None]


def test_what_slots_cost_is_said_before_they_are_allocated(weights, caplog):
    state = weights.state(DENSE_SHAPES)
    caplog.set_level("INFO", "weightsync.agents.trainer.slots.slots")
    elements = sum(tensor.numel() for tensor in state.values())
    share = r"on cpu \(a wire copy of this rank's share, and staging\)"
    said = rf"slots need {2 * elements / 2**30:.2f} GiB and 0\.00 GiB {share}"

    def no_room(size):
        assert re.fullmatch(said, caplog.messages[-1])
        raise MemoryPlacementError(f"no room for a host arena of {size} bytes")

    with pytest.raises(NoRoomForSlots, match=said + r", and there is no room: no room for a host arena of \d+ bytes"):
        TrainerSlots(state, table(DENSE), allocate=no_room)


def test_slots_may_lie_on_the_host(weights, assemble):
    masters = weights.state(DENSE_SHAPES)
    slots = TrainerSlots(masters, table(DENSE), options=SlotOptions(slots_on="cpu"))
    slots.convert(masters)
    assert [arena.device.type for arena in slots.arenas] == ["cpu", "cpu"]
    assert all(torch.equal(tensor, masters[name].to(torch.bfloat16)) for name, tensor in assemble([slots]).items())
    with pytest.raises(ValueError, match="slots_on='host'; it is 'device' or 'cpu'"):
        SlotOptions(slots_on="host")
