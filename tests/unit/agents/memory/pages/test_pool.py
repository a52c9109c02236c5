"""Storages on their way into pages: what torch's allocator is asked for and told, and that every view follows."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator

import pytest
import torch
from weightsync.agents.memory.errors import PagesUnavailable
from weightsync.agents.memory.pages import pool
from weightsync.agents.memory.pages.pool import SEGMENT_BYTES, PageAddresses, Relocation, span_of

BASE = 0x7F00_0000_0000
CPU = torch.device("cpu")


def as_torch_calls(addresses: PageAddresses, size: int) -> int | None:
    function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
    result: int | None = function(addresses.allocate_pointer)(size, 0, None)
    return result


def test_addresses_come_one_after_another_until_the_range_ends() -> None:
    addresses = PageAddresses(BASE, 3 * SEGMENT_BYTES)
    assert as_torch_calls(addresses, SEGMENT_BYTES + 1) == BASE
    assert as_torch_calls(addresses, SEGMENT_BYTES) == BASE + 2 * SEGMENT_BYTES
    assert addresses.used == 3 * SEGMENT_BYTES
    assert as_torch_calls(addresses, 1) is None
    assert addresses.used == 3 * SEGMENT_BYTES


def test_no_address_is_handed_out_after_the_end() -> None:
    addresses = PageAddresses(BASE, 3 * SEGMENT_BYTES)
    as_torch_calls(addresses, SEGMENT_BYTES)
    addresses.end()
    assert as_torch_calls(addresses, 1) is None
    assert addresses.used == SEGMENT_BYTES


def test_freed_addresses_are_not_given_out_again() -> None:
    addresses = PageAddresses(BASE, 2 * SEGMENT_BYTES)
    first = as_torch_calls(addresses, 1)
    free = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
    free(addresses.free_pointer)(first, 1, 0, None)
    assert as_torch_calls(addresses, 1) == BASE + SEGMENT_BYTES


def test_the_span_has_room_for_every_storage_in_a_segment_of_its_own() -> None:
    assert span_of([1, SEGMENT_BYTES, SEGMENT_BYTES + 1]) == 4 * SEGMENT_BYTES


@pytest.fixture
def on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storages move within malloc's memory, as ``resize_`` does it where no pool is in use."""

    @contextlib.contextmanager
    def in_use(used: object, device: torch.device) -> Iterator[None]:
        assert (used, device) == ("pool", CPU)
        assert not gc.isenabled(), "a tensor that is garbage would be freed with torch's lock in somebody's hands"
        yield

    monkeypatch.setattr(torch.cuda, "use_mem_pool", in_use)
    monkeypatch.setattr(pool, "_pool", lambda addresses: "pool")


@pytest.mark.usefixtures("on_this_machine")
def test_views_parameters_and_closures_follow_a_storage_with_their_values() -> None:
    big, small = torch.arange(600_000, dtype=torch.float32), torch.arange(7, dtype=torch.int8)
    parameter = torch.nn.Parameter(big, requires_grad=False)
    turned = big.view(600, 1000).t()[3:, 5:]
    read = lambda: float(turned[2, 1])  # noqa: E731
    before = big.data_ptr()
    addresses = PageAddresses(BASE, SEGMENT_BYTES)
    move = Relocation([small.untyped_storage(), big.untyped_storage()], addresses, CPU)
    assert as_torch_calls(addresses, 1) is None, "what comes later would not be mapped"
    assert big.data_ptr() == before, "nothing has moved before memory is mapped"
    move.finish()
    assert gc.isenabled()
    after = big.data_ptr()
    assert after != before
    assert parameter.data_ptr() == after
    assert turned.data_ptr() == after + 4 * (5 * 1000 + 3)
    assert torch.equal(parameter, torch.arange(600_000, dtype=torch.float32))
    assert small.tolist() == list(range(7))
    assert read() == 6005.0
    big[6005] = -1.0
    assert read() == -1.0, "it is the same memory still"


@pytest.mark.usefixtures("on_this_machine")
def test_a_move_that_is_cancelled_has_moved_nothing() -> None:
    weights = torch.arange(9)
    before = weights.data_ptr()
    Relocation([weights.untyped_storage()], PageAddresses(BASE, 1), CPU).cancel()
    assert (weights.data_ptr(), weights.tolist()) == (before, list(range(9)))


@pytest.mark.usefixtures("on_this_machine")
def test_memory_that_torch_has_from_elsewhere_is_refused_before_anything_moves() -> None:
    own, foreign = torch.ones(4), torch.frombuffer(bytearray(64), dtype=torch.uint8)
    before = own.data_ptr()
    with pytest.raises(PagesUnavailable, match=r"64 bytes of weights at 0x.*from elsewhere"):
        Relocation([own.untyped_storage(), foreign.untyped_storage()], PageAddresses(BASE, 1), CPU)
    assert own.data_ptr() == before


@pytest.mark.usefixtures("on_this_machine")
def test_an_allocator_that_rounds_too_far_up_is_refused_by_its_option(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*size: int, **kind: object) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("no more addresses")

    storage = torch.ones(4).untyped_storage()
    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(PagesUnavailable, match="max_split_size_mb"):
        Relocation([storage], PageAddresses(BASE, 1), CPU)


def test_a_torch_without_pools_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_cuda_customAllocator", raising=False)
    with pytest.raises(PagesUnavailable, match="no memory pools over a custom allocator"):
        Relocation([torch.ones(4).untyped_storage()], PageAddresses(BASE, 1), CPU)
