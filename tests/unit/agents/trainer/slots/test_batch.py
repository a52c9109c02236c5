"""Slots that need no other rank: converted together, from whole local tensors and from parts of them."""

import torch
from weightsync.agents.trainer.slots.arena import ArenaPlan
from weightsync.agents.trainer.slots.batch import LocalBatch
from weightsync.agents.trainer.slots.boxes import local_share
from weightsync.agents.trainer.slots.conversion import ConversionSpec, Source
from weightsync.agents.trainer.slots.reading import Read, Readings
from weightsync.agents.trainer.slots.routing import Router, SlotOptions
from weightsync.agents.trainer.slots.slot import made_slots


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
