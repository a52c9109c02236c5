"""One slot at a time: its places, rows, conversion, and what it says of a state that changed."""

import pytest
import torch
from weightsync.agents.memory.arena import ALIGNMENT
from weightsync.agents.tables.box import Box
from weightsync.agents.trainer.errors import ChangedTensor, MissingTensor
from weightsync.agents.trainer.slots.arena import ArenaPlan
from weightsync.agents.trainer.slots.boxes import local_share
from weightsync.agents.trainer.slots.conversion import ConversionSpec, Source
from weightsync.agents.trainer.slots.quantization import FP8_SUFFIX, QuantizationSpec
from weightsync.agents.trainer.slots.routing import Router, SlotOptions
from weightsync.agents.trainer.slots.slot import GatheredSlot, LocalBatch, SlotNote, made_slots
from weightsync.orchestrator.protocol.layout import Tensor

FP8 = QuantizationSpec(torch.float8_e4m3fn, FP8_SUFFIX)


def made(state, *specs):
    """Bound slots of plain tensors, and the arena."""
    shares = {key: local_share(key, tensor) for key, tensor in state.items()}
    router, plan = Router(SlotOptions(), 0, True), ArenaPlan()
    slots = made_slots([(spec, router.route(spec, shares)) for spec in specs], shares, plan)
    arena = torch.zeros(plan.size, dtype=torch.uint8)
    for slot in slots:
        slot.bind(arena)
    return slots, arena


def test_a_cast_slot_has_one_row_and_holds_the_forward_dtype():
    state = {"x": torch.randn(3, 5)}
    (slot,), arena = made(state, ConversionSpec("x", (Source("x"),)))
    [entry] = slot.entries
    assert (entry.tensor, entry.box) == (Tensor("x", "bfloat16", (3, 5)), Box((0, 0), (3, 5)))
    assert (entry.offset, entry.stride, entry.first_replica) == (0, (10, 2), True)
    slot.convert(state)
    assert torch.equal(arena[:30].view(torch.bfloat16).view(3, 5), state["x"].to(torch.bfloat16))
    assert slot.explain() == SlotNote("x", "sharded", "a plain tensor, held whole", ("x",), 30)


def test_a_quantised_slot_has_a_row_of_scales_behind_its_values(fp8_reference):
    state = {"x": torch.randn(130, 256)}
    (slot,), arena = made(state, ConversionSpec("x", (Source("x"),), quantization=FP8))
    values, scales = slot.entries
    assert values.tensor == Tensor("x", "float8_e4m3fn", (130, 256))
    assert scales.tensor == Tensor("x" + FP8_SUFFIX, "float32", (2, 2))
    assert scales.offset == -(-130 * 256 // ALIGNMENT) * ALIGNMENT
    slot.convert(state)
    codes, expected = fp8_reference(state["x"])
    assert torch.equal(arena[: 130 * 256].view(130, 256), codes.view(torch.uint8))
    assert torch.equal(arena[scales.offset : scales.offset + 16].view(torch.float32).view(2, 2), expected)
    assert slot.explain().sources == ("x", "x" + FP8_SUFFIX)
    assert slot.explain().bytes == 130 * 256 + 16


def test_stacked_experts_are_one_row_each():
    state = {"w": torch.randn(3, 2, 4)}
    (slot,), _ = made(state, ConversionSpec("e.{expert}.w", (Source("w"),), experts=3))
    assert slot.kind == "expert"
    assert [(e.tensor.name, e.tensor.shape, e.box, e.offset, e.stride) for e in slot.entries] == [
        (f"e.{expert}.w", (2, 4), Box((0, 0), (2, 4)), 16 * expert, (8, 2)) for expert in range(3)
    ]


def test_slots_of_one_treatment_are_converted_together():
    state = {"a": torch.randn(4), "b": torch.randn(2, 3)}
    slots, arena = made(state, ConversionSpec("a", (Source("a"),)), ConversionSpec("b", (Source("b"),)))
    batch = LocalBatch(slots, state)
    newer = {name: tensor + 1 for name, tensor in state.items()}
    batch.convert(newer)
    for slot, name in zip(slots, newer, strict=True):
        [entry] = slot.entries
        held = arena[entry.offset : entry.offset + 2 * newer[name].numel()].view(torch.bfloat16)
        assert torch.equal(held, newer[name].to(torch.bfloat16).reshape(-1))


def test_a_state_that_changed_is_refused_by_name():
    state = {"x": torch.randn(3, 5)}
    (slot,), arena = made(state, ConversionSpec("x", (Source("x"),)))
    with pytest.raises(MissingTensor, match="no tensor 'x'"):
        slot.check({})
    with pytest.raises(ChangedTensor, match=r"'x' is Tensor \(3, 6\) now; its slot was made for \(3, 5\)"):
        slot.convert({"x": torch.randn(3, 6)})
    with pytest.raises(ChangedTensor, match=r"source of 'x' has dtype, shape, strides and device \(torch.float64"):
        LocalBatch([slot], state).convert({"x": torch.randn(3, 5).double()})
    assert not arena.any()


def test_dtypes_to_compile_for_are_those_that_this_rank_converts():
    state = {"a": torch.randn(128, 128), "b": torch.randn(128, 128, dtype=torch.float16)}
    spec = ConversionSpec("x", (Source("a"), Source("b")), quantization=FP8)
    (slot,), _ = made(state, spec)
    assert slot.source_dtypes == {torch.float32, torch.float16}
    gathered = GatheredSlot(spec, slot.route, slot.shares, slot.places)
    assert gathered.source_dtypes == {torch.float32}
    assert GatheredSlot(spec, slot.route, slot.shares, ()).source_dtypes == set()
