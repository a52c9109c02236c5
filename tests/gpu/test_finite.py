"""NaN and infinity in slots on a GPU: found by the digest that is taken anyway, then named and counted."""

import pytest
import torch
from tiny_fleet import SHAPES, Target, made_slots, planned
from weightsync.agents.tables.spans import NOWHERE
from weightsync.agents.trainer.slots.arena import Reservation
from weightsync.agents.trainer.slots.finite import FiniteCheck, NonFinite
from weightsync.agents.transport.shares import Shares

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def test_the_digest_of_slots_on_the_device_says_whether_they_are_finite() -> None:
    state = {name: torch.randn(extent, device=CUDA) for name, extent in SHAPES.items()}
    slots = made_slots(state, 0)
    assert slots.arenas[0].device.type == "cuda"
    shares = Shares(slots.layout, slots.arenas)
    shares.replan(planned(slots, [Target.of("a", rank, 0) for rank in range(2)])[1])
    finite = shares.read().finite
    assert finite is not NOWHERE
    assert slots.nonfinite(finite) == slots.nonfinite() == ()
    for name, extent in SHAPES.items():
        for bad in (torch.nan, torch.inf, -torch.inf, 3.4e38):
            value = state[name].view(-1)[-1].clone()
            state[name].view(-1)[-1] = bad
            slots.convert(state)
            assert shares.read().finite is NOWHERE, f"{bad} in {name}"
            count = torch.Size(extent).numel()
            assert slots.nonfinite(shares.read().finite) == (NonFinite(name, 1, count, blocks=False),)
            state[name].view(-1)[-1] = value
    slots.convert(state)
    assert shares.read().finite is finite


class Raw:
    """What the check asks of a slot, of one raw tensor."""

    def __init__(self, dtype: torch.dtype, offset: int) -> None:
        self.spec = type("Spec", (), {"dst": str(dtype)})
        self.places = (type("Place", (), {"values": Reservation(offset, (1000, 3), dtype), "scales": None}),)


def test_numbers_of_every_format_are_counted_on_the_device() -> None:
    formats = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.bfloat16, torch.float16]
    slots = [Raw(dtype, 32768 * number) for number, dtype in enumerate([*formats, torch.float32, torch.float64])]
    arena = torch.zeros(32768 * len(slots), dtype=torch.uint8, device=CUDA)
    check = FiniteCheck(slots, arena)
    assert check.find() == ()
    for slot in slots:
        place = slot.places[0].values
        arena[place.offset + place.nbytes - 2 * place.dtype.itemsize :][: place.dtype.itemsize] = 0xFF
    assert check.find() == tuple(NonFinite(slot.spec.dst, 1, 3000, blocks=False) for slot in slots)
