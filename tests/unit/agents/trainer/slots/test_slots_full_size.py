"""GLM-5 and Kimi-K2 at full size on ranks of their real meshes (a fake process group, tensors without storage)."""

import math
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from weightsync.agents.trainer.models import STACKED, model_table
from weightsync.agents.trainer.slots import SlotOptions, TrainerSlots

GLM5 = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "hidden_size": 6144,
    "num_hidden_layers": 5,
    "first_k_dense_replace": 3,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 64,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "vocab_size": 154880,
}
DENSE, SPARSE = "model.layers.0.", "model.layers.4."
SHAPES = {
    "input_layernorm.weight": (6144,),
    "post_attention_layernorm.weight": (6144,),
    "self_attn.fused_qkv_a_proj.weight": (2048 + 576, 6144),
    "self_attn.q_a_layernorm.weight": (2048,),
    "self_attn.q_b_proj.weight": (64 * 256, 2048),
    "self_attn.kv_a_layernorm.weight": (512,),
    "self_attn.kv_b_proj.weight": (64 * (192 + 256), 512),
    "self_attn.o_proj.weight": (6144, 64 * 256),
    "self_attn.indexer.wq_b.weight": (32 * 128, 2048),
    "self_attn.indexer.wk.weight": (128, 6144),
    "self_attn.indexer.weights_proj.weight": (32, 6144),
    "self_attn.indexer.k_norm.weight": (128,),
    "self_attn.indexer.k_norm.bias": (128,),
}
MLP = {
    "mlp.gate_proj.weight": (12288, 6144),
    "mlp.up_proj.weight": (12288, 6144),
    "mlp.down_proj.weight": (6144, 12288),
}
MOE = {
    "mlp.router.gate.weight": (256, 6144),
    "mlp.expert_bias": (256,),
    "mlp.shared_expert.w1.weight": (2048, 6144),
    "mlp.shared_expert.w2.weight": (6144, 2048),
    "mlp.shared_expert.w3.weight": (2048, 6144),
    "mlp.experts.w1": (256, 2048, 6144),
    "mlp.experts.w2": (256, 6144, 2048),
    "mlp.experts.w3": (256, 2048, 6144),
}


def without_storage(size):
    return torch.empty(size, dtype=torch.uint8, device="meta")


def glm5_slots(rank):
    """Rank ``rank`` of 64: FSDP 64 for what is dense, FSDP 8 × EP 8 for the experts."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=64)
    try:
        dense = init_device_mesh("cpu", (64,), mesh_dim_names=("dp_shard",))
        expert = init_device_mesh("cpu", (8, 8), mesh_dim_names=("dp_shard_mod_ep", "ep"))

        def tensor(name, shape):
            mesh, cut = (expert, [Shard(0), Shard(0)]) if ".experts." in name else (dense, [Shard(0)])
            pieces = [len(c) for c in torch.arange(shape[0]).chunk(64)]
            rows = pieces[rank] if rank < len(pieces) else 0
            local = torch.empty((rows, *shape[1:]), device="meta")
            stride = tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
            return DTensor.from_local(local, mesh, cut, run_check=False, shape=torch.Size(shape), stride=stride)

        shapes = {
            "model.embed_tokens.weight": (154880, 6144),
            "model.norm.weight": (6144,),
            "lm_head.weight": (154880, 6144),
        }
        for layer in range(5):
            kept = SHAPES | (MLP if layer < 3 else MOE)
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in kept.items()}
        state = {name: tensor(name, shape) for name, shape in shapes.items()}
        table = model_table(GLM5, fp8=True)
        return TrainerSlots(state, table, options=SlotOptions(staging_bytes=0), allocate=without_storage)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks():
    return {rank: glm5_slots(rank) for rank in range(64)}


def held(slots, name):
    """(rows from, rows to) of each box of a logical tensor on a rank."""
    return [(e.box.offset[0], e.box.end[0]) for e in slots.entries() if e.tensor.name == name]


def tensors(ranks):
    return {t.name: t for slots in ranks.values() for t in slots.layout.tensors}


def test_the_stacked_form_is_recognised(ranks):
    assert not ranks[0].unrouted
    keys = [f"model.layers.4.{name}" for name in SHAPES | MOE]
    form = model_table(GLM5, fp8=True).for_keys(keys).form
    assert (form.renames, form.stacks, form.fused) == (STACKED.renames, STACKED.stacks, STACKED.fused)


def test_every_row_and_every_scale_tile_is_held_once(ranks):
    logical, spans = tensors(ranks), {}
    for slots in ranks.values():
        for entry in slots.entries():
            assert entry.box.offset[1:] == (0,) * (len(entry.box.offset) - 1)
            spans.setdefault(entry.tensor.name, []).append((entry.box.offset[0], entry.box.end[0]))
    for name, tensor in logical.items():
        found = sorted(spans[name])
        assert (found[0][0], found[-1][1]) == (0, tensor.shape[0]), name
        assert all(a[1] == b[0] for a, b in pairwise(found)), name
        scales = logical.get(name + "_scale_inv")
        if scales is not None:
            assert scales.shape == tuple(-(-extent // 128) for extent in tensor.shape)
    quantised = ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "o_proj", "indexer.wq_b")
    assert {n.removeprefix(SPARSE + "self_attn.") for n in logical if n.startswith(SPARSE + "self_attn.")} == {
        *(f"{name}.weight" for name in quantised),
        *(f"{name}.weight_scale_inv" for name in quantised),
        *("q_a_layernorm.weight", "kv_a_layernorm.weight", "indexer.wk.weight", "indexer.weights_proj.weight"),
        *("indexer.k_norm.weight", "indexer.k_norm.bias"),
    }
    assert len([n for n in logical if n.startswith(SPARSE + "mlp.experts.")]) == 256 * 3 * 2


def test_what_fits_the_grid_is_sharded_and_what_does_not_is_gathered(ranks):
    found = {e.tensor: (e.kind, e.reason) for e in ranks[5].explain()}
    assert found[DENSE + "self_attn.q_b_proj.weight"][0] == "sharded"  # 256 rows a rank
    assert held(ranks[5], DENSE + "self_attn.q_b_proj.weight") == [(1280, 1536)]
    assert held(ranks[5], DENSE + "self_attn.q_b_proj.weight_scale_inv") == [(10, 12)]
    for name, why in {
        "self_attn.kv_b_proj.weight": "ends at 448 of dimension 0",  # 28672 × 512 over 64 ranks
        "self_attn.kv_a_proj_with_mqa.weight": "inside a block",  # 576 rows
        "self_attn.o_proj.weight": "ends at 96 of dimension 0",
        "self_attn.indexer.wk.weight": "are fewer than 2097152",
        "input_layernorm.weight": "12288 bytes are fewer",
    }.items():
        kind, reason = found[DENSE + name]
        assert kind == "gathered", name
        assert why in reason, (name, reason)
    assert tensors(ranks)[DENSE + "self_attn.kv_b_proj.weight_scale_inv"].shape == (224, 4)
    assert tensors(ranks)[DENSE + "self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 48)
    assert found["model.embed_tokens.weight"][0] == "sharded"


def test_experts_are_routed_by_global_id(ranks):
    for rank in (0, 9, 63):
        first = 4 * rank  # FSDP 8 outside, EP 8 inside: Shard(0) twice cuts 256 experts in rank order
        names = {
            e.tensor.name for e in ranks[rank].entries() if "experts" in e.tensor.name and "layers.4" in e.tensor.name
        }
        assert {int(n.split(".")[5]) for n in names if ".experts." in n and "shared" not in n} == set(
            range(first, first + 4)
        )
    assert {e.kind for e in ranks[0].explain() if "{expert}" in e.tensor} == {"expert"}


def test_float32_stays_float32(ranks):
    wide = {name.split(".", 3)[3] for name, t in tensors(ranks).items() if t.dtype == "float32" and "scale" not in name}
    assert wide == {
        "self_attn.indexer.k_norm.weight",
        "self_attn.indexer.k_norm.bias",
        "mlp.gate.e_score_correction_bias",
    }


def test_gathered_tensors_take_turns_over_the_ranks(ranks):
    owned = [sum(1 for s in slots.slots if s.route.kind == "gathered" and s.places) for slots in ranks.values()]
    assert max(owned) - min(owned) <= 1
