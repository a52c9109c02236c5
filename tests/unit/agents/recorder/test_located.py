"""The digest that proves a parameter unchanged sees order, and does not see strides."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weightsync.agents.recorder import located
from weightsync.agents.recorder.located import order_sensitive_digest


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
    monkeypatch.setattr(located, "CHUNK_ELEMENTS", 16)
    assert order_sensitive_digest(tensor) == whole


def test_scalars_have_a_digest_and_complex_numbers_have_none() -> None:
    assert order_sensitive_digest(torch.tensor(1.0)) != order_sensitive_digest(torch.tensor(2.0))
    with pytest.raises(TypeError, match="complex64"):
        order_sensitive_digest(torch.zeros(2, dtype=torch.complex64))
