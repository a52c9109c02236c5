"""One slot at a time: its places, rows, conversion, and what it says of a state that changed."""

import torch
from weightsync.agents.memory.arena import ALIGNMENT
from weightsync.agents.tables.box import Box
from weightsync.agents.trainer.slots.arena import ArenaPlan
from weightsync.agents.trainer.slots.boxes import local_share
from weightsync.agents.trainer.slots.conversion import ConversionSpec, Source
from weightsync.agents.trainer.slots.quantization import FP8_SUFFIX, QuantizationSpec
from weightsync.agents.trainer.slots.reading import Read, Readings
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


def converted(slots, state):
    """Fill slots of one treatment."""
    readings = Readings(
        state,
        [Read(s.key, slot.spec.dst, h) for slot in slots for s, h in zip(slot.spec.sources, slot.shares, strict=True)],
    )
    LocalBatch(slots, readings, readings.take(state)).convert(readings.take(state))


def test_a_cast_slot_has_one_row_and_holds_the_forward_dtype():
    state = {"x": torch.randn(3, 5)}
    (slot,), arena = made(state, ConversionSpec("x", (Source("x"),)))
    [entry] = slot.entries
    assert (entry.tensor, entry.box) == (Tensor("x", "bfloat16", (3, 5)), Box((0, 0), (3, 5)))
    assert (entry.offset, entry.stride, entry.first_replica) == (0, (10, 2), True)
    converted([slot], state)
    assert torch.equal(arena[:30].view(torch.bfloat16).view(3, 5), state["x"].to(torch.bfloat16))
    assert slot.explain() == SlotNote("x", "sharded", "a plain tensor, held whole", ("x",), 30)


def test_a_quantised_slot_has_a_row_of_scales_behind_its_values(fp8_reference):
    state = {"x": torch.randn(130, 256)}
    (slot,), arena = made(state, ConversionSpec("x", (Source("x"),), quantization=FP8))
    values, scales = slot.entries
    assert values.tensor == Tensor("x", "float8_e4m3fn", (130, 256))
    assert scales.tensor == Tensor("x" + FP8_SUFFIX, "float32", (2, 2))
    assert scales.offset == -(-130 * 256 // ALIGNMENT) * ALIGNMENT
    converted([slot], state)
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


def test_dtypes_to_compile_for_are_those_that_this_rank_converts():
    state = {"a": torch.randn(128, 128), "b": torch.randn(128, 128, dtype=torch.float16)}
    spec = ConversionSpec("x", (Source("a"), Source("b")), quantization=FP8)
    (slot,), _ = made(state, spec)
    assert slot.source_dtypes == {torch.float32, torch.float16}
    gathered = GatheredSlot(spec, slot.route, slot.shares, slot.places)
    assert gathered.source_dtypes == {torch.bfloat16}, "what is gathered is cast before it travels"
    assert GatheredSlot(spec, slot.route, slot.shares, ()).source_dtypes == set()


def test_slots_of_one_treatment_are_converted_together():
    state = {"a": torch.randn(4), "fused": torch.randn(6, 3), "c": torch.randn(2, 3)}
    specs = [
        ConversionSpec("a", (Source("a"),)),
        ConversionSpec("up", (Source("fused", 0, 4, 2),)),
        ConversionSpec("joined", (Source("c"), Source("fused", 0, 0, 4))),
    ]
    shares = {key: local_share(key, tensor) for key, tensor in state.items()}
    router, plan = Router(SlotOptions(), 0, True), ArenaPlan()
    slots = made_slots([(spec, router.route(spec, shares)) for spec in specs], shares, plan)
    arena = torch.zeros(plan.size, dtype=torch.uint8)
    for slot in slots:
        slot.bind(arena)
    readings = Readings(state, [Read(s.key, spec.dst, shares[s.key]) for spec in specs for s in spec.sources])
    batch = LocalBatch(slots, readings, readings.take(state))
    now = {name: tensor + 1 for name, tensor in state.items()}
    batch.convert(readings.take(now))
    found = [torch.cat([move.out.flatten() for move in slot.moves]) for slot in slots]
    expected = [now["a"], now["fused"][4:].flatten(), torch.cat([now["c"], now["fused"][:4]]).flatten()]
    assert all(torch.equal(out, full.to(torch.bfloat16)) for out, full in zip(found, expected, strict=True))
