"""Pages of host memory are exchanged beneath their addresses, with the real ``mremap``, and with one that fails."""

import ctypes
import errno
from collections.abc import Callable
from typing import Any

import pytest
import torch
from weightsync.agents.memory.errors import FlipFailed, PagesTorn, PagesUnavailable
from weightsync.agents.memory.pages import host
from weightsync.agents.memory.pages.host import LEAST_BYTES, PAGE, HostPages

SIZES = (5, 3 * PAGE, LEAST_BYTES + 3 * PAGE + 7, 4 * LEAST_BYTES)
"""Copied, copied, exchanged with ends that are copied, exchanged."""


@pytest.fixture
def model() -> list[torch.Tensor]:
    """Each full of its number, from 1; at odd addresses."""
    whole = torch.zeros(sum(SIZES) + 64 * PAGE, dtype=torch.uint8)
    tensors, at = [], 13
    for number, size in enumerate(SIZES, 1):
        tensors.append(whole[at : at + size].fill_(number))
        at += size + 5 * PAGE + 1
    return tensors


def values(tensors: Any) -> list[list[int]]:
    return [tensor.unique().tolist() for tensor in tensors]


def test_standby_begins_as_a_copy_and_a_flip_shows_what_was_written_there(model: list[torch.Tensor]) -> None:
    pages = HostPages(model)
    standby = pages.standby_of(model)
    addresses = [tensor.data_ptr() for tensor in (*model, *standby)]
    assert values(standby) == values(model) == [[1], [2], [3], [4]]
    for tensor in standby:
        tensor.add_(10)
    assert values(model) == [[1], [2], [3], [4]], "nothing is served of it yet"
    pages.flip()
    assert values(model) == [[11], [12], [13], [14]]
    assert values(standby) == [[1], [2], [3], [4]]
    pages.flip()
    assert values(model) == [[1], [2], [3], [4]]
    assert [tensor.data_ptr() for tensor in (*model, *standby)] == addresses
    assert pages.bytes == 2 * sum(SIZES)


def test_what_lies_beside_weights_is_left_alone(model: list[torch.Tensor]) -> None:
    """Also in the pages that weights begin and end in."""
    base = model[0]._base
    assert base is not None
    pages = HostPages(model)
    covered = torch.zeros(len(base), dtype=torch.bool)
    for tensor in model:
        first = tensor.data_ptr() - base.data_ptr()
        covered[first : first + tensor.numel()] = True
    base[~covered] = 99
    for tensor in pages.standby_of(model):
        tensor.fill_(50)
    pages.flip()
    assert base[~covered].unique().tolist() == [99]
    assert base[covered].unique().tolist() == [50]


def test_a_part_has_the_same_part_beside_it(model: list[torch.Tensor]) -> None:
    pages = HostPages(model)
    (part,) = pages.standby_of([model[3][PAGE : 2 * PAGE]])
    part.fill_(8)
    pages.flip()
    assert model[3][PAGE : 2 * PAGE].unique().tolist() == [8]
    assert model[3][2 * PAGE :].unique().tolist() == [4]
    with pytest.raises(PagesUnavailable, match=r"8 bytes at .* do not lie in pages"):
        pages.standby_of([torch.zeros(8, dtype=torch.uint8)])


def failing(numbers: set[int]) -> Callable[[], Any]:
    """``mremap`` that refuses the calls of these numbers, from 0 when it is told to begin."""
    real = host._mremap()
    calls: list[int] = []

    def call(*arguments: int) -> Any:
        calls.append(len(calls))
        if calls[-1] in numbers:
            ctypes.set_errno(errno.ENOMEM)
            return host._FAILED
        return real(*arguments)

    return lambda: call


@pytest.mark.parametrize("number", range(6))
def test_a_flip_that_fails_anywhere_leaves_what_is_served(number: int, model: list[torch.Tensor]) -> None:
    pages = HostPages(model)
    standby = pages.standby_of(model)
    for tensor in standby:
        tensor.add_(10)
    pages._move = failing({number})()
    with pytest.raises(FlipFailed, match=r"mremap of .* Cannot allocate memory.*; what is served is as it was"):
        pages.flip()
    assert values(model) == [[1], [2], [3], [4]]
    assert values(standby) == [[11], [12], [13], [14]]
    pages.flip()
    assert values(model) == [[11], [12], [13], [14]]


@pytest.mark.parametrize("numbers", [{1, 2}, {5, 6}, {3, 4}])
def test_a_flip_whose_way_back_fails_too_is_the_end_of_what_is_served(
    numbers: set[int], model: list[torch.Tensor]
) -> None:
    pages = HostPages(model)
    pages._move = failing(numbers)()
    with pytest.raises(PagesTorn, match="restart the engine"):
        pages.flip()


def test_pages_that_cannot_be_exchanged_are_known_at_the_start(
    model: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_mremap", failing({0}))
    with pytest.raises(PagesUnavailable, match="pages of weights in host memory cannot be exchanged: flip failed"):
        HostPages(model)


def test_weights_that_overlap_are_refused() -> None:
    memory = torch.zeros(16, dtype=torch.uint8)
    with pytest.raises(PagesUnavailable, match="overlap others; set WEIGHTSYNC_MODE=copy"):
        HostPages([memory, memory[8:]])
