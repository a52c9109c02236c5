"""Where a parameter is after processing, by a digest that sees order and does not see strides."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from weightsync.agents.recorder import located
from weightsync.agents.recorder.blueprint import Blueprint
from weightsync.agents.recorder.boxes import StridedView
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.recorder.located import locate, order_sensitive_digest
from weightsync.agents.recorder.trace import Landing


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int64, torch.bool]
)
def test_strides_do_not_matter_and_order_does(dtype: torch.dtype) -> None:
    tensor = torch.arange(48).reshape(6, 8).to(dtype)
    if dtype is torch.bool:
        tensor[0, 3] = False
    assert order_sensitive_digest(tensor.t().contiguous().t()) == order_sensitive_digest(tensor)
    assert order_sensitive_digest(tensor.flip(0)) != order_sensitive_digest(tensor)


@given(st.integers(0, 47), st.integers(0, 47))
def test_every_swap_is_seen(first: int, second: int) -> None:
    tensor = torch.arange(48, dtype=torch.float32)
    swapped = tensor.clone()
    swapped[first], swapped[second] = tensor[second], tensor[first]
    assert (order_sensitive_digest(swapped) == order_sensitive_digest(tensor)) is (first == second)


def test_moving_a_value_between_zeros_is_seen() -> None:
    here, there = torch.zeros(16), torch.zeros(16)
    here[3], there[4] = 1, 1
    assert order_sensitive_digest(here) != order_sensitive_digest(there)
    assert order_sensitive_digest(torch.zeros(16)) != order_sensitive_digest(torch.zeros(17))


@pytest.mark.parametrize("contiguous", [True, False])
def test_pieces_give_the_same_sum_as_the_whole(monkeypatch: pytest.MonkeyPatch, contiguous: bool) -> None:
    tensor = torch.randn(10, 7) if contiguous else torch.randn(7, 10).t()
    whole = order_sensitive_digest(tensor)
    monkeypatch.setattr(located, "CACHED_ELEMENTS", 16)
    assert order_sensitive_digest(tensor) == whole


def test_scalars_have_a_digest_and_complex_numbers_have_none() -> None:
    assert order_sensitive_digest(torch.tensor(1.0)) != order_sensitive_digest(torch.tensor(2.0))
    with pytest.raises(TypeError, match="complex64"):
        order_sensitive_digest(torch.zeros(2, dtype=torch.complex64))


class Holder(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape), requires_grad=False)

    def as_loaded(self) -> located.LoadedParameter:
        (parameter,) = Blueprint(self).parameters
        return located.LoadedParameter.of(parameter, self.weight)


def test_a_parameter_is_found_as_it_was_as_a_copy_and_transposed() -> None:
    holder = Holder(4, 6)
    loaded, live = holder.as_loaded(), holder.weight.data
    for candidate in (live, live.clone(), live.t()):
        found = locate(loaded, candidate, may_exchange_halves=False, touched=True)
        assert found is not None
        assert found.tensor.data_ptr() == candidate.data_ptr()
        assert (tuple(found.tensor.shape), found.tensor.stride(), found.halves_exchanged) == ((4, 6), (6, 1), False)
    for candidate in (live.flip(0), live.t().contiguous(), live.double(), live[:2]):
        assert locate(loaded, candidate, may_exchange_halves=True, touched=True) is None


def test_memory_that_nothing_was_written_to_is_believed_whatever_its_values_are() -> None:
    holder = Holder(4, 4)
    holder.weight.data.fill_(1)
    loaded, live = holder.as_loaded(), holder.weight.data
    for candidate, touched, believed in ((live, False, True), (live.t(), False, True), (live, True, False)):
        found = locate(loaded, candidate, may_exchange_halves=False, touched=touched)
        assert found is not None
        assert found.untouched is believed
    copy = locate(loaded, live.clone(), may_exchange_halves=False, touched=False)
    assert copy is not None
    assert not copy.untouched


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.randn(6), ""),
        (torch.randn(6, 4), ""),
        (torch.randn(3, 4, 5).to(torch.bfloat16), ""),
        (torch.ones(1, 1), ""),
        (torch.tensor(1.0), ""),
        (torch.zeros(6), "6 of 6 slices along dimension 0 are equal"),
        (torch.tensor([1.0, 1.0, 1.0, 2.0]), "3 of 4 slices along dimension 0 are equal"),
        (torch.arange(4.0).repeat(3, 1), "3 of 3 slices along dimension 0 are equal"),
        (torch.arange(4.0).repeat(3, 1).t(), "3 of 3 slices along dimension 1 are equal"),
    ],
)
def test_equal_slices_do_not_tell_their_places(tensor: torch.Tensor, reason: str) -> None:
    assert located.repeated(tensor) == reason


def test_exchanged_halves_are_found_where_they_may_be_and_their_landings_follow() -> None:
    holder = Holder(2, 4, 3)
    loaded, live = holder.as_loaded(), holder.weight.data.roll(2, dims=1)
    assert locate(loaded, live, may_exchange_halves=False, touched=True) is None
    found = locate(loaded, live, may_exchange_halves=True, touched=True)
    assert found is not None
    assert found.halves_exchanged
    # Bytes: a row is 12, a half 24, an expert 48.
    gate = landing(StridedView((2, 3), (12, 4), 48))
    up = landing(StridedView((1, 3), (12, 4), 36))
    moved = located.with_halves_exchanged([gate, up], loaded)
    assert moved is not None
    assert [mark.place.offset for mark in moved] == [72, 12]
    assert located.with_halves_exchanged([landing(StridedView((2, 3), (12, 4), 12))], loaded) is None


def landing(place: StridedView) -> Landing:
    return Landing(0, Checkpoint("x", place.sizes, torch.float32), (0, 0), place, torch.float32)
