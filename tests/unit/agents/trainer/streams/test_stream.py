"""Slots filled by streams: right bytes from any order and any pieces, nothing kept, and refusals by name."""

import gc
import re
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import tiny_fleet
import torch
from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor
from weightsync.agents.tables.spans import Spans
from weightsync.agents.trainer.errors import ChangedTensor
from weightsync.agents.trainer.models import STACKED, model_table
from weightsync.agents.trainer.slots.quantization import FP8_SUFFIX, QuantizationSpec
from weightsync.agents.trainer.streams import stream as streams
from weightsync.agents.trainer.streams.stream import StreamSlots, treatments_of
from weightsync.agents.trainer.streams.streamed import StreamedTensor, StreamError
from weightsync.orchestrator.planner import CostModel, Party, make_plan
from weightsync.orchestrator.protocol.names import Member

FP8 = QuantizationSpec(torch.float8_e4m3fn, FP8_SUFFIX)
SHAPES = {"a.weight": (300, 20), "a.bias": (300,), "scale": (), "conv": (4, 3, 2, 2), "b.weight": (7, 129)}


@pytest.fixture
def masters(weights):
    return weights.state(SHAPES)


def declared(shapes, dtype=torch.float32):
    return [StreamedTensor(name, dtype, shape) for name, shape in shapes.items()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("known_before", [True, False], ids=["declared", "first pass"])
def test_a_stream_fills_the_slots_in_the_dtype_that_it_has(dtype, known_before, masters, assemble):
    state = {name: value.to(dtype) for name, value in masters.items()}
    slots = StreamSlots(declared(SHAPES, dtype) if known_before else None)
    slots.fill(state.items())
    found = assemble([slots])
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    # the next pass comes in another order, into the same memory
    places, layout = [arena.data_ptr() for arena in slots.arenas], slots.layout
    later = {name: state[name] * 3 for name in reversed(state)}
    slots.fill(iter(later.items()))
    assert all(torch.equal(value, later[name]) for name, value in assemble([slots]).items())
    assert ([arena.data_ptr() for arena in slots.arenas], slots.layout) == (places, layout)


def test_masters_are_rounded_to_the_forward_dtype_and_quantised_where_the_treatment_says(
    masters, assemble, fp8_reference
):
    keep = QuantizationSpec(torch.float32, keeps_master=True)
    slots = StreamSlots(treatments={"b.weight": FP8, "a.bias": keep}, forward_dtype=torch.bfloat16)
    slots.fill(masters.items())
    found = assemble([slots])
    values, scales = fp8_reference(masters["b.weight"])
    assert torch.equal(found["b.weight"].view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(found["b.weight" + FP8_SUFFIX], scales)
    assert torch.equal(found["a.bias"], masters["a.bias"])
    for name in ("a.weight", "scale", "conv"):
        assert torch.equal(found[name], masters[name].to(torch.bfloat16))


def test_strided_views_are_taken_as_they_read(assemble):
    base = torch.arange(24.0).view(4, 6)
    slots = StreamSlots()
    slots.fill([("t", base.t()), ("every second", base[:, ::2]), ("grad", torch.nn.Parameter(base))])
    found = assemble([slots])
    assert torch.equal(found["t"], base.t().contiguous())
    assert torch.equal(found["every second"], torch.tensor([[0.0, 2, 4], [6, 8, 10], [12, 14, 16], [18, 20, 22]]))
    assert torch.equal(found["grad"], base)


def test_no_tensor_outlives_its_turn(masters):
    alive: list[weakref.ref[torch.Tensor]] = []

    def one_by_one() -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in masters.items():
            gc.collect()
            assert [ref() for ref in alive if ref() is not None] == []
            passing = value.clone()
            alive.append(weakref.ref(passing))
            yield name, passing
            del passing

    slots = StreamSlots()
    slots.fill(one_by_one())
    slots.fill(one_by_one())
    assert len(alive) == 2 * len(masters)


def test_arenas_grow_by_segments_that_waste_little(monkeypatch, assemble):
    monkeypatch.setattr(streams, "SMALLEST_SEGMENT", 1024)
    monkeypatch.setattr(streams, "LARGEST_SEGMENT", 4096)
    state = {f"w{n}": torch.full((100 + n,), float(n)) for n in range(200)}
    state["large"] = torch.arange(5000.0)
    slots = StreamSlots(staging_bytes=512)
    slots.fill(state.items())
    found = assemble([slots])
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert slots.layout.staging == len(slots.arenas) - 1
    assert slots.arenas[-1].numel() == 512
    held = sum(-(-value.nbytes // 256) * 256 for value in state.values())
    segments = [arena.numel() for arena in slots.arenas[:-1]]
    assert max(segments) == 20224  # a tensor larger than any segment has one of its own size
    assert held <= sum(segments) < 1.5 * held
    assert [region.length for region in slots.layout.regions] == [*segments, 512]


def test_what_is_not_finite_is_found_in_every_segment(monkeypatch):
    """Also in tensors that are FP8 already; and not looked for where the segment is known to be finite."""
    monkeypatch.setattr(streams, "SMALLEST_SEGMENT", 4096)
    state = {"a": torch.zeros(40, 50), "raw": torch.zeros(64, 64).to(torch.float8_e4m3fn), "b": torch.zeros(3000)}
    slots = StreamSlots(staging_bytes=0)
    slots.fill(state.items())
    assert len(slots.arenas) == 3
    assert slots.nonfinite() == ()
    state["a"][1, 2], state["b"][-1] = torch.nan, torch.inf
    state["raw"].view(torch.uint8)[5, 6] = 0xFF
    slots.fill(state.items())
    assert [(found.tensor, found.count) for found in slots.nonfinite()] == [("a", 1), ("raw", 1), ("b", 1)]
    known = Spans.of(np.array([[slots.arenas[1].numel(), 1, 0, 0, 0, *[1, 0, 0] * 3]]))
    assert [found.tensor for found in slots.nonfinite(known)] == ["a", "b"]


def test_a_declared_stream_has_one_arena_of_its_size():
    slots = StreamSlots([StreamedTensor("a", torch.bfloat16, (100,)), StreamedTensor("b", torch.float32, (64,))])
    slots.fill([("b", torch.ones(64)), ("a", torch.ones(100, dtype=torch.bfloat16))])
    assert [arena.numel() for arena in slots.arenas[:-1]] == [256 + 256]


# ------------------------------------------------------------------------------------------------------ pieces
def pieces_of(masters, mesh, placements, in_ranks):
    def rank_main(rank):
        grid = DeviceMesh("cpu", torch.arange(mesh[0] * mesh[1]).view(mesh))
        return {
            name: distribute_tensor(full, grid, placements[name], src_data_rank=None).to_local().clone()
            for name, full in masters.items()
        }

    return in_ranks(mesh[0] * mesh[1], rank_main)


def test_pieces_of_several_ranks_make_up_the_whole(weights, in_ranks, assemble):
    """Owners and placements as a mesh of 2 × 2 cuts: one axis, both axes of one dimension, and uneven ones."""
    shapes = {"rows": (10, 6), "twice": (9, 4), "crossed": (6, 5), "copies": (3,)}
    cuts = {"rows": (0, None), "twice": (0, 0), "crossed": (1, 0), "copies": (None, None)}
    masters = weights.state(shapes)
    placements = {n: [Replicate() if dim is None else Shard(dim) for dim in cut] for n, cut in cuts.items()}
    local = pieces_of(masters, (2, 2), placements, in_ranks)
    metadata = [StreamedTensor(n, torch.float32, s, (0, 1, 2, 3), (2, 2), cuts[n]) for n, s in shapes.items()]
    ranks = []
    for rank, held in enumerate(local):
        slots = StreamSlots(metadata, rank=rank)
        slots.fill(held.items())
        ranks.append(slots)
    found = assemble(ranks)
    assert all(torch.equal(found[name], masters[name]) for name in shapes)
    first = {entry.tensor.name: entry.first_replica for entry in ranks[1].entries()}
    assert first == {"rows": False, "twice": True, "crossed": True, "copies": False}


def test_a_rank_that_owns_nothing_streams_nothing(assemble):
    metadata = [StreamedTensor("w", torch.float32, (4, 2), owners=(1,)), StreamedTensor("v", torch.float32, (2,), (1,))]
    empty, owner = StreamSlots(metadata, rank=0), StreamSlots(metadata, rank=1)
    empty.fill(())
    owner.fill([("w", torch.ones(4, 2)), ("v", torch.zeros(2))])
    assert empty.layout.tensors == ()
    assert empty.layout.matrix().shape[0] == 0
    assert torch.equal(assemble([empty, owner])["w"], torch.ones(4, 2))


def test_pieces_on_the_grid_are_quantised_each_by_itself(weights, assemble, fp8_reference):
    full = weights("experts", 300, 128)
    metadata = [StreamedTensor("w", torch.float32, (300, 128), (0, 1), placements=(0,))]
    # torch.chunk cuts 300 rows at 150, inside a block
    with pytest.raises(StreamError, match=r"'w': this rank's piece is 0…150 of dimension 0.*block of 128"):
        StreamSlots(metadata, treatments={"w": FP8}).fill([("w", full[:150])])
    metadata = [StreamedTensor("w", torch.float32, (256, 128), (0, 1), placements=(0,))]
    ranks = [StreamSlots(metadata, rank=rank, treatments={"w": FP8}) for rank in (0, 1)]
    for slots, piece in zip(ranks, full[:256].chunk(2), strict=True):
        slots.fill([("w", piece)])
    values, scales = fp8_reference(full[:256])
    found = assemble(ranks)
    assert torch.equal(found["w"].view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(found["w" + FP8_SUFFIX], scales)


def test_segments_pieces_and_ranks_without_any_are_planned(monkeypatch, weights):
    """The real planner covers an engine of two ranks from: rank 0's rows, rank 1's rows, and a rank with nothing."""
    monkeypatch.setattr(streams, "SMALLEST_SEGMENT", 4096)
    masters = {name: value.to(torch.bfloat16) for name, value in weights.state(tiny_fleet.SHAPES).items()}
    targets = [tiny_fleet.Target.of("e0", rank, staging=4096) for rank in (0, 1)]
    whole = StreamSlots(staging_bytes=4096)
    whole.fill(masters.items())
    assert len(whole.arenas) > 10
    plan, connect = tiny_fleet.planned(whole, targets)
    needed = sum(memory.numel() for target in targets for memory in target.memory) - 2 * 4096
    assert connect.expected_bytes == needed
    metadata = [StreamedTensor(n, t.dtype, tuple(t.shape), (0, 1), placements=(0,)) for n, t in masters.items()]
    ranks = [StreamSlots(metadata, rank=rank) for rank in (0, 1, 2)]
    for rank, slots in enumerate(ranks):
        slots.fill((name, value.chunk(2)[rank]) for name, value in masters.items() if rank < 2)
    sources = [Party(Member("trainer", "", rank), 1, slots.layout) for rank, slots in enumerate(ranks)]
    plan = make_plan(sources, [Party(target.member, 1, target.layout) for target in targets], CostModel())
    sent = [plan.part(source.member).expected_bytes for source in sources]
    assert (sum(sent), sent[2]) == (needed, 0)


# --------------------------------------------------------------------------------------------------- refusals
def one_dtensor(rank):
    mesh = DeviceMesh("cpu", [0])
    return distribute_tensor(torch.ones(2), mesh, [Shard(0)])


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        (("w", torch.ones(2, dtype=torch.int8)), r"'w' is int8; .*: leave it out, or yield it dequantised"),
        (("w", torch.ones(2, dtype=torch.bool)), r"'w' is bool; "),
        (("w", torch.ones(2, dtype=torch.complex64)), r"'w' is complex64; "),
        (("w", torch.empty(2, device="meta")), r"'w' is on meta, it has no values"),
        (("w", torch.ones(2, 2).to_sparse()), r"'w' has the layout torch\.sparse_coo"),
        (("w", torch.ones(1, 1, 1, 1, 1)), r"'w' has 5 dimensions; at most 4"),
        (("w", torch.ones(0)), r"'w' has no elements: a placeholder \(ZeRO-3\)"),
        (("w", 1.0), r"'w' is a float, not a tensor"),
        ((b"w", torch.ones(2)), r"a tensor's name is a string"),
        (("", torch.ones(2)), r"a tensor's name is a string"),
        (("w" * 513, torch.ones(2)), r"1 to 512 characters"),
        (torch.ones(2), r"pairs, not Tensor"),
    ],
)
def test_what_cannot_travel_is_refused_by_name_after_the_whole_pass(pair, says):
    passed = []

    def tensors():
        for item in (("before", torch.ones(1)), pair, ("after", torch.ones(1))):
            yield item
            passed.append(item)

    with pytest.raises(StreamError, match=says):
        StreamSlots().fill(tensors())
    assert len(passed) == 3  # the other ranks' collectives were all met


def test_a_dtensor_is_refused_with_what_to_yield_instead(in_ranks):
    found = in_ranks(1, one_dtensor)[0]
    with pytest.raises(StreamError, match=r"'w' is a DTensor; yield full_tensor\(\)"):
        StreamSlots().fill([("w", found)])


CAST = QuantizationSpec(torch.bfloat16)


class Dequantised(torch.Tensor):
    """As torchao makes them: claims to be bfloat16, holds codes, and gives them to any operation."""

    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16, device=codes.device)

    def __init__(self, codes):
        self.codes = codes

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*(each.codes.float() if isinstance(each, cls) else each for each in args), **(kwargs or {}))


def emptied():
    given_back = torch.ones(128, 128)
    given_back.untyped_storage().resize_(0)
    return given_back


def partitioned():
    placeholder = torch.ones(8)
    placeholder.ds_shape = torch.Size((128, 128))
    return placeholder


@pytest.mark.parametrize(
    "options", [{"treatments": {"w": CAST}}, {"treatments": {"w": FP8}}, {"forward_dtype": torch.bfloat16}]
)
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: torch.ones(128, 128).to(torch.float8_e4m3fn), "is float8_e4m3fn; .*yield it dequantised"),
        (lambda: torch.ones(128, 128).to(torch.float8_e5m2), "is float8_e5m2; "),
        (lambda: Dequantised(torch.ones(128, 128).to(torch.float8_e4m3fn)), "is a Dequantised, .*yield a plain tensor"),
        (emptied, "has no memory now: .*yield it gathered"),
        (partitioned, r"is a placeholder of DeepSpeed ZeRO-3 of shape \(8,\), the weight's is \(128, 128\)"),
    ],
)
def test_codes_and_placeholders_are_never_taken_for_values(options, make, says):
    with pytest.raises(StreamError, match=f"'w' {says}"):
        StreamSlots(**options).fill([("w", make())])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.bool])
def test_what_engines_hold_as_it_is_travels_as_it_is(dtype, assemble):
    given = torch.arange(12).to(dtype)
    same = QuantizationSpec(dtype, forward_dtype=dtype, keeps_master=True)
    slots = StreamSlots(treatments={"w": same})
    slots.fill([("w", given)])
    assert torch.equal(assemble([slots])["w"].view(torch.uint8), given.view(torch.uint8))


@pytest.mark.parametrize(
    "name",
    ["q.lora_A.weight", "q.lora_b.weight", "q.lora_A.default.weight", "base_model.model.q.lora_A.0", "q_adapter.up"],
)
def test_an_adapter_that_no_engine_needs_is_no_part_of_a_version(name, assemble):
    pairs = {"q.weight": torch.ones(4, 4), name: torch.ones(2, 4), "value_head.weight": torch.ones(4)}
    with pytest.raises(
        StreamError, match=f"{re.escape(name)}' is an adapter's and read by nobody.*yield merged weights"
    ):
        StreamSlots(treatments={"q.weight": CAST}).fill(pairs.items())
    for treatments in ({"q.weight": CAST, name: CAST}, {}):
        slots = StreamSlots(treatments=treatments)
        slots.fill(pairs.items())
        assert assemble([slots]).keys() == pairs.keys()


@pytest.mark.parametrize("first", ["w", "w" + FP8_SUFFIX])
def test_scales_beside_what_is_quantised_here_are_refused(first, masters):
    pairs = {"w": masters["a.weight"], "w" + FP8_SUFFIX: torch.ones(3, 1)}
    with pytest.raises(StreamError, match=r"'w_scale_inv' holds scales, and 'w' is quantised here, .*leave it out"):
        StreamSlots(treatments={"w": FP8}).fill(sorted(pairs.items(), key=lambda pair: pair[0] != first))


@pytest.mark.parametrize("known_before", [True, False], ids=["declared", "first pass"])
def test_missing_unknown_and_doubled_names_are_refused(known_before):
    full = {f"w{n}": torch.ones(2) for n in range(9)}
    slots = StreamSlots(declared(dict.fromkeys(full, (2,))) if known_before else None)
    slots.fill(full.items())
    origin = "metadata" if known_before else "first pass"
    with pytest.raises(StreamError, match=rf"lacks 7 of its 9 tensors \(w2, w3, w4, w5, w6 and 2 more\); its {origin}"):
        slots.fill([("w0", torch.ones(2)), ("w1", torch.ones(2))])
    with pytest.raises(StreamError, match=r"has 1 that it did not have before \(extra\)"):
        slots.fill([*full.items(), ("extra", torch.ones(2))])
    with pytest.raises(StreamError, match=r"'w3' came twice in one pass"):
        slots.fill([*full.items(), ("w3", torch.ones(2))])
    with pytest.raises(StreamError, match=r"ended without a tensor"):
        slots.fill(iter(()))
    slots.fill(full.items())  # and the next whole pass is taken


def test_a_changed_shape_or_dtype_is_refused(masters):
    slots = StreamSlots()
    slots.fill(masters.items())
    with pytest.raises(ChangedTensor, match=r"'a\.bias' has the shape \(299,\); its slot was made for \(300,\)"):
        slots.fill((masters | {"a.bias": torch.ones(299)}).items())
    with pytest.raises(ChangedTensor, match=r"'a\.bias' has the dtype torch\.float64; its slot was made for torch\.fl"):
        slots.fill((masters | {"a.bias": torch.ones(300, dtype=torch.float64)}).items())


def test_what_the_stream_raises_comes_out_as_it_is():
    def broken():
        yield "w", torch.ones(2)
        raise OSError("the shard is gone")

    slots = StreamSlots()
    with pytest.raises(OSError, match="the shard is gone"):
        slots.fill(broken())


def test_metadata_names_each_tensor_once():
    with pytest.raises(StreamError, match=r"declares 'w' twice"):
        StreamSlots(declared({"w": (1,)}) * 2)


def test_a_table_says_what_is_quantised():
    config = {"architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 1, "num_experts": 2, "vocab_size": 8}
    config |= {"hidden_size": 128, "moe_intermediate_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1}
    found = treatments_of(model_table(config | {"head_dim": 128}, fp8=True))
    assert found["model.layers.0.mlp.experts.1.down_proj.weight"] == FP8
    assert found["model.layers.0.mlp.gate.weight"] == QuantizationSpec()
    assert found["model.norm.weight"] == QuantizationSpec()
    with pytest.raises(StreamError, match=r"the table reads 'model\.layers\.0\.mlp\.router\.gate\.weight' for"):
        treatments_of(model_table(config | {"head_dim": 128}, fp8=True, form=STACKED))


def test_blocks_need_a_matrix():
    with pytest.raises(StreamError, match=r"'v' of shape \(128,\) is to be quantised in blocks of a matrix"):
        StreamSlots(treatments={"v": FP8}).fill([("v", torch.ones(128))])
