"""Tensors that can be no weights are refused by name, when slots are made and at every later publish."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from weightsync.agents.trainer.errors import ChangedTensor, MissingTensor, UnfitTensor
from weightsync.agents.trainer.models import model_table
from weightsync.agents.trainer.routes.routes import NeededTable
from weightsync.agents.trainer.slots import SlotOptions, TrainerSlots
from weightsync.agents.trainer.slots.conversion import ConversionSpec, Source
from weightsync.agents.trainer.slots.fitness import ACCEPTED, hint, near_names, refuse_unfit
from weightsync.agents.trainer.slots.quantization import QuantizationSpec
from weightsync.agents.trainer.slots.slots import holds_slots

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
LAYER = "model.layers.0."
Q = LAYER + "self_attn.q_proj.weight"
MATRICES = [f"self_attn.{x}_proj.weight" for x in "qkvo"] + [f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
OPTIONS = SlotOptions(staging_bytes=0)


class Codes(torch.Tensor):
    """A quantised tensor as torchao and torchtune make them: claims to be bfloat16, holds codes and a scale."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.view.default:  # what DTensor.from_local does to its argument
            return Codes(args[0].codes, args[0].scale)
        return NotImplemented


@pytest.fixture
def state(weights):
    shapes = {"model.embed_tokens.weight": (64, 128), "model.norm.weight": (128,), "lm_head.weight": (64, 128)}
    shapes |= {LAYER + name: (128, 128) for name in MATRICES}
    shapes |= {LAYER + norm: (128,) for norm in ("input_layernorm.weight", "post_attention_layernorm.weight")}
    return {name: tensor.clone() for name, tensor in weights.state(shapes).items()}


def partitioned():
    placeholder = torch.nn.Parameter(torch.empty(0))
    placeholder.ds_shape = torch.Size((128, 128))
    return placeholder


def flat():
    shard = torch.nn.Parameter(torch.randn(10432))
    shard._fsdp_flattened = True
    return shard


def given_back():
    tensor = torch.randn(128, 128)
    tensor.untyped_storage().resize_(0)
    return tensor


UNFIT = {
    "int8": (
        lambda: torch.ones(128, 128, dtype=torch.int8),
        "is int8; weights are float32, bfloat16, float16, float64",
    ),
    "uint8": (
        lambda: torch.ones(128, 128, dtype=torch.uint8),
        "is uint8; .*give a callable that returns it dequantised",
    ),
    "fp8": (lambda: torch.ones(128, 128).to(torch.float8_e4m3fn), "is float8_e4m3fn; "),
    "e5m2": (lambda: torch.ones(128, 128).to(torch.float8_e5m2), "is float8_e5m2; "),
    "bool": (lambda: torch.ones(128, 128, dtype=torch.bool), "is bool; "),
    "complex": (lambda: torch.ones(128, 128, dtype=torch.complex64), "is complex64; "),
    "meta": (lambda: torch.ones(128, 128, device="meta"), "is on meta, it has no values .*load it onto a device"),
    "sparse": (lambda: torch.eye(128).to_sparse(), "has the layout torch.sparse_coo; give a callable"),
    "quantised class": (
        lambda: Codes(torch.ones(128, 128), torch.ones(1)),
        "is a Codes, whose values are not in its own",
    ),
    "ZeRO-3": (
        partitioned,
        r"is a placeholder of DeepSpeed ZeRO-3 of shape \(0,\), the weight's is \(128, 128\); give",
    ),
    "FSDP1": (
        flat,
        r"is sharded by FullyShardedDataParallel, which keeps flat shards; use fully_shard \(FSDP2\), or",
    ),
    "lazy": (torch.nn.UninitializedParameter, "has no shape yet .*run one forward first"),
    "given back": (given_back, "has no memory now: "),
    "no tensor": (lambda: b"extra state", "is a bytes and no tensor"),
}


@pytest.mark.parametrize("kind", UNFIT)
@pytest.mark.parametrize("fp8", [False, True])
def test_what_can_be_no_weight_is_refused_by_name(state, kind, fp8):
    make, words = UNFIT[kind]
    with pytest.raises(UnfitTensor, match=f"^'{Q}' {words}") as refused:
        TrainerSlots(state | {Q: make()}, model_table(CONFIG, fp8=fp8), options=OPTIONS)
    assert refused.value.name == Q
    slots = TrainerSlots(state, model_table(CONFIG, fp8=fp8), options=OPTIONS)
    slots.convert(state)
    before = slots.arenas[0].clone()
    with pytest.raises(UnfitTensor, match=f"^'{Q}' {words}"):
        slots.convert({name: -tensor for name, tensor in state.items()} | {Q: make()})
    assert torch.equal(slots.arenas[0], before), "nothing was written"


def test_what_nothing_reads_may_be_anything(state):
    more = {"counts": torch.ones(3, dtype=torch.int64), "x._extra_state": b"", "y": torch.ones(1, device="meta")}
    slots = TrainerSlots(state | more, model_table(CONFIG), options=OPTIONS)
    assert slots.unrouted == ("counts", "x._extra_state", "y")
    assert holds_slots(state | more, SlotOptions(hsdp="primary"))


def test_a_sharded_tensor_is_judged_by_what_it_wraps(in_ranks):
    def body(rank):
        mesh = init_device_mesh("cpu", (2,))
        codes = Codes(torch.ones(2, 4), torch.ones(1))
        refused = DTensor.from_local(codes, mesh, [Shard(0)], run_check=False, shape=torch.Size((4, 4)), stride=(4, 1))
        with pytest.raises(UnfitTensor, match=r"^'w' is a Codes"):
            refuse_unfit("w", refused)
        whole = DTensor.from_local(torch.ones(2, 4), mesh, [Shard(0)], run_check=False)
        refuse_unfit("w", whole)
        refuse_unfit("w", DTensor.from_local(torch.ones(0, 4), mesh, [Shard(0)], run_check=False))

    in_ranks(2, body)


@pytest.mark.parametrize("dtype", ACCEPTED)
@pytest.mark.parametrize("fp8", [False, True])
def test_every_accepted_dtype_becomes_what_the_forward_uses(state, assemble, fp8_reference, dtype, fp8):
    given = {name: tensor.to(dtype) for name, tensor in state.items()}
    slots = TrainerSlots(given, model_table(CONFIG, fp8=fp8), options=OPTIONS)
    slots.convert(given)
    held = assemble([slots])
    assert torch.equal(held["model.norm.weight"], given["model.norm.weight"].to(torch.bfloat16))
    if fp8:
        codes, scales = fp8_reference(given[Q].to(torch.bfloat16).float())
        assert torch.equal(held[Q].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(held[Q + "_scale_inv"], scales)
    else:
        assert torch.equal(held[Q], given[Q].to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_integers_that_engines_hold_travel_as_they_are_and_become_nothing_else(weights, assemble, dtype):
    def slots(*wire):
        treatments = [QuantizationSpec(each, forward_dtype=each, keeps_master=True) for each in wire]
        specs = [ConversionSpec(f"t{n}", (Source("t"),), quantization=each) for n, each in enumerate(treatments)]
        return TrainerSlots({"t": given}, NeededTable(specs), options=OPTIONS)

    given = torch.arange(24).view(4, 6).to(dtype)
    made = slots(dtype)
    made.convert({"t": given})
    made.convert({"t": given.flip(0)})
    assert torch.equal(assemble([made])["t0"], given.flip(0))
    for wire in ([torch.bfloat16], [torch.float32], [dtype, torch.bfloat16]):
        with pytest.raises(UnfitTensor, match=f"^'t' is {str(dtype).removeprefix('torch.')}; weights are"):
            slots(*wire)
    for other in (given.to(torch.int32), given.to(torch.float32)):
        with pytest.raises((UnfitTensor, ChangedTensor)):
            made.check({"t": other})


def test_a_matrix_elsewhere_than_its_slot_is_refused_before_the_kernel_would(state):
    def elsewhere(size):
        return torch.empty(size, dtype=torch.uint8, device="meta")

    with pytest.raises(UnfitTensor, match=r"weight' is on cpu, its slot on meta: it is quantised where it is"):
        TrainerSlots(state, model_table(CONFIG, fp8=True), options=OPTIONS, allocate=elsewhere)


def test_a_missing_name_says_what_there_is_in_its_place(state):
    prefixed = {"policy." + name: tensor for name, tensor in state.items()}
    with pytest.raises(MissingTensor, match=r"it has 'policy.model.embed_tokens.weight'$"):
        TrainerSlots(prefixed, model_table(CONFIG), options=OPTIONS)
    names = ["a.q_proj.parametrizations.weight.original", "a.q_proj.bias", "b.weight", "weight"]
    assert near_names("a.q_proj.weight", names) == (names[0], names[1])
    assert near_names("c.weight", ["d.bias"]) == ()
    assert hint("c.weight", ["d.bias"]) == ""
    assert hint("a.q_proj.weight", names[:1]).endswith("give a callable that returns the weight that it computes")
    assert "give the peft model itself" in hint("a.q_proj.weight", ["a.q_proj.base_layer.weight"])
    assert "FSDP2" in hint("a.weight", ["a._flat_param"])
