"""NaN and infinity are found in what engines would be sent, by tensor and number; nothing finite is taken for them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from weightsync.agents.tables.spans import Spans
from weightsync.agents.trainer.slots import SlotOptions, TrainerSlots
from weightsync.agents.trainer.slots.arena import Reservation
from weightsync.agents.trainer.slots.conversion import ConversionSpec, Source
from weightsync.agents.trainer.slots.finite import FiniteCheck, NonFinite
from weightsync.agents.trainer.slots.quantization import FP8_SUFFIX, QuantizationSpec

FP8 = QuantizationSpec(torch.float8_e4m3fn, FP8_SUFFIX)
WIDE = QuantizationSpec(torch.float32, keeps_master=True)
HALF = QuantizationSpec(forward_dtype=torch.float16)


TREATMENTS = {"cast": QuantizationSpec(), "wide": WIDE, "half": HALF, "fp8": FP8}


class Table:
    """Every tensor by its own name, with the treatment that its first word names."""

    layers = 0

    def __init__(self, state):
        self.names = tuple(state)

    def for_keys(self, keys):
        return self

    def non_layer_specs(self):
        for name in self.names:
            yield ConversionSpec(name, (Source(name),), quantization=TREATMENTS[name.split(".")[0]])


def garbage(size):
    """Memory with NaN in every place, as an allocator may return it."""
    return torch.full((size,), 0xFF, dtype=torch.uint8)


def slots_of(state):
    slots = TrainerSlots(state, Table(state), options=SlotOptions(staging_bytes=0), allocate=garbage)
    slots.convert(state)
    return slots


@pytest.fixture
def state():
    names = ("cast.a", "cast.b", "fp8.a", "wide.a", "half.a", "cast.c", "fp8.b", "half.b")
    state = {name: torch.randn(130, 200) for name in names}
    return state | {"cast.norm": torch.randn(3), "cast.large": torch.randn(1025, 1024), "wide.bias": torch.randn(1)}


def test_finite_values_of_every_kind_are_fine(state):
    limit = torch.finfo(torch.bfloat16).max
    state["cast.norm"] = torch.tensor([limit, -limit, 0.0])
    state["cast.large"][0, 0], state["cast.large"][1, 1] = limit, -limit
    state["wide.a"][0, :2] = torch.tensor([torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max])
    state["fp8.a"][0, :2] = torch.tensor([limit, 1e-45])
    state["half.a"][0, 0] = 65504
    assert slots_of(state).nonfinite() == (), "padding between slots is no value either"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["cast.b", "cast.norm", "cast.large", "wide.a", "wide.bias", "half.b"])
def test_values_are_counted_by_tensor(state, name, bad):
    state[name].view(-1)[0] = bad
    state[name].view(-1)[-1] = bad
    expected = NonFinite(name, min(2, state[name].numel()), state[name].numel(), blocks=False)
    assert slots_of(state).nonfinite() == (expected,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_blocks_are_counted_where_values_are_quantised(state, bad):
    state["fp8.b"][0, 0] = state["fp8.b"][1, 1] = state["fp8.b"][129, 199] = bad
    assert slots_of(state).nonfinite() == (NonFinite("fp8.b", 2, 4, blocks=True),)
    assert str(NonFinite("fp8.b", 2, 4, blocks=True)) == "fp8.b (2 of 4 blocks)"


@pytest.mark.parametrize(("name", "value"), [("cast.a", 3.4e38), ("half.a", 1e5), ("half.b", -65520)])
def test_what_overflows_in_the_cast_is_counted(state, name, value):
    state[name][5, 5] = value
    assert slots_of(state).nonfinite() == (NonFinite(name, 1, 26000, blocks=False),)


def test_all_that_is_wrong_is_found_in_one_pass_and_forgotten_at_the_next(state):
    slots = slots_of(state | {"cast.a": torch.full((130, 200), torch.nan), "half.b": state["half.b"] * 1e9})
    found = {each.tensor: each.count for each in slots.nonfinite()}
    assert found == {"cast.a": 26000, "half.b": int((state["half.b"] * 1e9).half().isinf().sum())}
    slots.convert(state)
    assert slots.nonfinite() == ()


class ExponentSlot:
    """What the check asks of a slot, with scales of one byte."""

    spec = ConversionSpec("x", (Source("x"),))

    class Place:
        values = Reservation(0, (10, 32), torch.uint8)
        scales = Reservation(512, (10, 1), torch.uint8)

    places = (Place(),)


def test_scales_that_are_exponents_show_nan_as_their_highest_byte():
    arena = torch.full((1024,), 0xFE, dtype=torch.uint8)
    check = FiniteCheck([ExponentSlot()], arena)
    assert check.find() == ()
    arena[515] = 0xFF
    assert check.find() == (NonFinite("x", 1, 10, blocks=True),)


class Raw:
    """What the check asks of a slot, of one raw tensor."""

    def __init__(self, dtype):
        self.spec = ConversionSpec("x", (Source("x"),))
        self.places = (SimpleNamespace(values=Reservation(256, (9, 16), dtype), scales=None),)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float64])
def test_numbers_of_any_width_are_counted(dtype):
    """A stream may bring such tensors as they are; torch has no maximum of the narrow ones."""
    arena = torch.zeros(2048, dtype=torch.uint8)
    values = Raw(dtype).places[0].values.view(arena)
    every = torch.arange(256, dtype=torch.uint8).view(dtype) if dtype.itemsize == 1 else torch.tensor([1.0, -1e308])
    good = every.double().isfinite()
    values.view(-1)[:] = every[good].to(dtype).repeat(144)[:144]
    check = FiniteCheck([Raw(dtype)], arena)
    assert check.find() == ()
    bad = every[~good] if dtype.itemsize == 1 else torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
    assert len(bad) == {torch.float8_e4m3fn: 2, torch.float8_e5m2: 8, torch.float8_e8m0fnu: 1}.get(dtype, 3)
    for number in range(len(bad)):
        before = values[4, 5].clone()
        values[4, 5] = bad[number]
        assert check.find() == (NonFinite("x", 1, 144, blocks=False),), bad[number]
        values[4, 5] = before


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool])
def test_formats_without_such_numbers_are_not_looked_at(dtype):
    assert FiniteCheck([Raw(dtype)], torch.full((2048,), 0xFF, dtype=torch.uint8)).find() == ()


def test_memory_that_is_known_to_be_finite_is_not_read(state):
    """Known of all but one tensor, and of the front of another: both of these are looked at."""
    slots = slots_of(state)
    places = [place.scales or place.values for slot in slots.slots for place in slot.places]
    runs = [(place.offset, place.nbytes) for place in places]
    del runs[[slot.spec.dst for slot in slots.slots].index("half.a")]
    front = [slot.spec.dst for slot in slots.slots].index("cast.c")
    runs[front - 1] = (runs[front - 1][0], 100)
    finite = Spans.of(np.array([[size, 0, offset, 0, 0, *[1, 0, 0] * 3] for offset, size in runs]))
    bad = {name: torch.full_like(tensor, torch.nan) for name, tensor in state.items()}
    slots.convert(bad)
    assert [found.tensor for found in slots.nonfinite(finite)] == ["half.a", "cast.c"]
    assert {found.tensor for found in slots.nonfinite()} == state.keys()
    assert [found.tensor for found in slots.nonfinite(finite)] == ["half.a", "cast.c"]


def test_a_rank_without_slots_has_nothing_to_find():
    assert FiniteCheck([], torch.zeros(256, dtype=torch.uint8)).find() == ()
