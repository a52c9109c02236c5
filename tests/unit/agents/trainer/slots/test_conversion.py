"""Routing: what a specification may say, and joins and cuts of trainer tensors on and off the grid."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from weightsync.agents.trainer.errors import ConversionTableError
from weightsync.agents.trainer.models import ModelConfig, ModelTable
from weightsync.agents.trainer.slots import SlotOptions, TrainerSlots
from weightsync.agents.trainer.slots.conversion import ConversionSpec, Source
from weightsync.agents.trainer.slots.quantization import QuantizationSpec

FP8 = QuantizationSpec(torch.float8_e4m3fn, "_scale_inv")


def table_of(*specs):
    class Table(ModelTable):
        def non_layer_specs(self):
            yield from specs

    return Table(ModelConfig({"num_hidden_layers": 0}))


def converted(in_ranks, masters, *specs, world=2):
    def body(rank):
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp_shard",))
        state = {n: distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None) for n, t in masters.items()}
        slots = TrainerSlots(state, table_of(*specs), options=SlotOptions(0, staging_bytes=0))
        slots.convert(state)
        return slots

    return in_ranks(world, body)


@pytest.mark.parametrize(
    ("first", "second", "kind", "why"),
    [
        (256, 512, "sharded", "stands alone"),
        (128, 256, "gathered", "a shard of a ends at 64 of dimension 0"),
        (320, 256, "gathered", "a shard of a ends at 160 of dimension 0"),
        (257, 256, "gathered", "not divisible"),
    ],
)
def test_what_the_checkpoint_stores_as_one_is_joined_on_one_grid(
    in_ranks, weights, assemble, fp8_reference, first, second, kind, why
):
    masters = weights.state({"a": (first, 200), "b": (second, 200)})
    spec = ConversionSpec("ab", (Source("a"), Source("b")), quantization=FP8)
    ranks = converted(in_ranks, masters, spec)
    explained = ranks[0].explain()[0]
    assert explained.kind == kind
    assert why in explained.reason
    assert explained.sources == ("a", "a_scale_inv", "b", "b_scale_inv")
    logical = assemble(ranks)
    values, scales = fp8_reference(torch.cat([masters["a"], masters["b"]]))
    assert torch.equal(logical["ab"].view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(logical["ab_scale_inv"], scales)


def test_a_part_that_begins_inside_a_block_is_quantised_together_with_its_neighbour(weights, assemble, fp8_reference):
    masters = weights.state({"a": (320, 200), "b": (256, 200)})
    slots = TrainerSlots(masters, table_of(ConversionSpec("ab", (Source("a"), Source("b")), quantization=FP8)))
    slots.convert(masters)
    assert "b begins at 320 of dimension 0, inside a block of 128" in slots.explain()[0].reason
    values, scales = fp8_reference(torch.cat([masters["a"], masters["b"]]))
    assert torch.equal(assemble([slots])["ab"].view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(assemble([slots])["ab_scale_inv"], scales)


def test_joins_along_columns_and_cuts_of_rows_and_columns(in_ranks, weights, assemble):
    masters = weights.state({"a": (8, 6), "b": (8, 4)})
    ranks = converted(
        in_ranks,
        masters,
        ConversionSpec("wide", (Source("a"), Source("b")), cat_dim=1),
        ConversionSpec("rows", (Source("a", 0, 3, 4),)),
        ConversionSpec("columns", (Source("b", 1, 1, 2),)),
        ConversionSpec("both", (Source("a", 0, 6, 2), Source("a", 0, 0, 1)), cat_dim=0),
    )
    a, b = (masters[n].to(torch.bfloat16) for n in "ab")
    logical = assemble(ranks)
    assert torch.equal(logical["wide"], torch.cat([a, b], 1))
    assert torch.equal(logical["rows"], a[3:7])
    assert torch.equal(logical["columns"], b[:, 1:3])
    assert torch.equal(logical["both"], torch.cat([a[6:8], a[0:1]]))


def test_stacked_experts_may_be_cut_too(in_ranks, weights, assemble, fp8_reference):
    masters = weights.state({"w13": (4, 512, 128)})
    specs = [
        ConversionSpec(f"{{expert}}.{name}", (Source("w13", 0, start, 256),), quantization=FP8, experts=4)
        for name, start in (("gate", 0), ("up", 256))
    ]
    logical = assemble(converted(in_ranks, masters, *specs))
    for expert in range(4):
        for name, start in (("gate", 0), ("up", 256)):
            values, scales = fp8_reference(masters["w13"][expert, start : start + 256])
            assert torch.equal(logical[f"{expert}.{name}"].view(torch.uint8), values.view(torch.uint8))
            assert torch.equal(logical[f"{expert}.{name}_scale_inv"], scales)


def test_names_of_scales():
    spec = ConversionSpec("x.{expert}.weight", (Source("w", 0),), quantization=FP8, experts=2)
    assert spec.scale_name == "x.{expert}.weight_scale_inv"
    assert spec.per_source_scale_key(spec.sources[0]) == "w_scale_inv"
    assert spec.logical(1) == ("x.1.weight", "x.1.weight_scale_inv")
    plain = ConversionSpec("y", (Source("y"),))
    assert (plain.scale_name, plain.per_source_scale_key(plain.sources[0]), plain.logical(0)) == ("", "", ("y", ""))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dst": "x", "sources": ()}, "no sources"),
        ({"dst": "x", "sources": (Source("w"),), "experts": 4}, "if and only if"),
        ({"dst": "x.{expert}", "sources": (Source("w"),)}, "if and only if"),
        ({"dst": "x.{expert}", "sources": (Source("w"), Source("v")), "experts": 4}, "one source"),
        ({"dst": "x", "sources": (Source("w"), Source("v")), "cat_dim": -1}, "'x': cat_dim=-1: it is counted from"),
    ],
)
def test_specifications_that_contradict_themselves(fields, message):
    with pytest.raises(ConversionTableError, match=message):
        ConversionSpec(**fields)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ConversionSpec("x", (Source("a"), Source("b"))), "cannot be joined along dimension 0"),
        (ConversionSpec("x", (Source("a", 0, 6, 4),)), r"has no 6…\+4 along 0"),
        (ConversionSpec("x", (Source("v"),), quantization=FP8), "blocks are of matrices"),
    ],
)
def test_specifications_that_do_not_fit_the_tensors(weights, spec, message):
    state = weights.state({"a": (8, 6), "b": (8, 4), "v": (8,)})
    with pytest.raises(ConversionTableError, match=message):
        TrainerSlots(state, table_of(spec))


@pytest.mark.parametrize("numbers", [(-1, 0, 4), (0, -2, 4), (0, 2, 0)])
def test_parts_are_counted_from_the_beginning(numbers):
    with pytest.raises(ConversionTableError, match=f"'w': dim={numbers[0]}, start={numbers[1]}, length={numbers[2]}: "):
        Source("w", *numbers)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (
            (ConversionSpec("x", (Source("a"),)), ConversionSpec("x", (Source("b"),))),
            r"'x' .* 'a' \(for 'x'\) and of 'b'",
        ),
        (
            (ConversionSpec("x_scale_inv", (Source("c"),)), ConversionSpec("x", (Source("a"),), quantization=FP8)),
            r"'x_scale_inv' is made twice, of 'c' \(for 'x_scale_inv'\) and of 'a' \(for 'x'\)",
        ),
        (
            (
                ConversionSpec("e.{expert}.w", (Source("stack"),), experts=2),
                ConversionSpec("e.1.w", (Source("a"),), expert_id=1),
            ),
            r"'e.1.w' is made twice, of 'stack'",
        ),
    ],
)
def test_a_tensor_that_two_specifications_make_is_refused_wherever_they_are_owned(weights, specs, message):
    state = weights.state({"a": (8, 6), "b": (8, 6), "c": (1, 1), "stack": (2, 8, 6)})
    with pytest.raises(ConversionTableError, match=message):
        TrainerSlots(state, table_of(*specs))
