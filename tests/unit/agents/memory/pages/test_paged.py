"""A model's memory in pages, on real memory of this machine. What torch's CUDA allocator does is done here by hand."""

from collections.abc import Callable, Sequence

import pytest
import torch
from dram_pages import PAGE, DramPages
from weightsync.agents.memory.errors import PagesUnavailable, StandbyLost, StandbyMissing
from weightsync.agents.memory.pages import paged
from weightsync.agents.memory.pages.paged import PagedMemory, into_pages
from weightsync.agents.memory.pages.pool import PageAddresses

SIZES = (3 * PAGE + 8, 16, PAGE)
USED = 6 * PAGE
"""Of the three, each from a page of its own on."""


class MovedByHand:
    """``Relocation`` of the tensors of ``model``: they are set to the addresses that torch would have given them."""

    model: Sequence[torch.Tensor]
    memory: DramPages

    def __init__(
        self, storages: Sequence[torch.UntypedStorage], addresses: PageAddresses, device: torch.device
    ) -> None:
        assert sorted(s.nbytes() for s in storages) == sorted(SIZES)
        self._base, self.used = addresses._base, USED
        assert addresses._span >= USED

    def cancel(self) -> None:
        pass

    def finish(self) -> None:
        at = self._base
        for tensor in self.model:
            place = self.memory.tensor(at, tensor.numel()).copy_(tensor)
            tensor.set_(place.untyped_storage(), 0, (tensor.numel(),), (1,))  # type: ignore[call-overload]
            at += -(-tensor.numel() // PAGE) * PAGE


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    monkeypatch.setattr(paged, "Relocation", MovedByHand)
    MovedByHand.model = [torch.full((size,), index + 1, dtype=torch.uint8) for index, size in enumerate(SIZES)]
    return list(MovedByHand.model)


def moved(model: Sequence[torch.Tensor], memory: DramPages, most: int | None = None) -> PagedMemory:
    MovedByHand.memory = memory
    return into_pages(model, memory, chunk_bytes=4 * PAGE, most=most)


def test_standby_begins_as_a_copy_and_a_flip_shows_what_was_written_there(model: list[torch.Tensor]) -> None:
    memory = DramPages()
    pages = moved(model, memory)
    standby = pages.standby_of(model)
    assert [t.unique().tolist() for t in standby] == [[1], [2], [3]]
    addresses = [t.data_ptr() for t in (*model, *standby)]
    for tensor in standby:
        tensor.add_(10)
    assert [t.unique().tolist() for t in model] == [[1], [2], [3]], "nothing is served of it yet"
    pages.flip()
    assert [t.unique().tolist() for t in model] == [[11], [12], [13]]
    pages.settle()
    assert [t.unique().tolist() for t in standby] == [[1], [2], [3]]
    calls = len(memory.calls)
    pages.settle()
    assert len(memory.calls) == calls, "again does nothing"
    pages.flip()
    assert [t.unique().tolist() for t in model] == [[1], [2], [3]]
    assert [t.data_ptr() for t in (*model, *standby)] == addresses


def test_a_flip_back_settles_the_one_before(model: list[torch.Tensor]) -> None:
    pages = moved(model, DramPages())
    (standby,) = pages.standby_of(model[:1])
    standby.fill_(9)
    for value in (9, 1, 9):
        pages.flip()
        assert model[0].unique().tolist() == [value]


def test_standby_that_gets_no_memory_after_a_flip_is_lost_until_the_driver_gives_it(model: list[torch.Tensor]) -> None:
    memory = DramPages()
    pages = moved(model, memory)
    (standby,) = pages.standby_of(model[:1])
    standby.fill_(9)
    pages.flip()
    memory.refuse = lambda number, name: name == "map"
    for change in (pages.settle, pages.flip):
        with pytest.raises(StandbyLost, match="what is served is whole; restart the engine"):
            change()
        assert model[0].unique().tolist() == [9]
    memory.refuse = lambda number, name: False
    pages.settle()
    assert standby.unique().tolist() == [1]


def test_memory_is_accounted_for_to_the_byte(model: list[torch.Tensor]) -> None:
    memory = DramPages()
    pages = moved(model, memory)
    assert pages.bytes == memory.room - memory.free() == 2 * USED
    assert sorted(size for size, _ in memory.mapped.values()) == [2 * PAGE, 2 * PAGE, 4 * PAGE, 4 * PAGE]


def test_too_little_memory_for_standby_is_known_before_anything_moves(model: list[torch.Tensor]) -> None:
    addresses = [tensor.data_ptr() for tensor in model]
    memory = DramPages(room=sum(SIZES) - 1)
    with pytest.raises(PagesUnavailable, match="needs as much memory again"):
        moved(model, memory)
    assert [tensor.data_ptr() for tensor in model] == addresses
    assert memory.calls == []


def test_standby_takes_no_more_than_it_may(model: list[torch.Tensor]) -> None:
    addresses = [tensor.data_ptr() for tensor in model]
    memory = DramPages()
    with pytest.raises(PagesUnavailable, match=r"a standby set of .* MiB is more than the .* MiB that it may take"):
        moved(model, memory, USED - 1)
    assert [tensor.data_ptr() for tensor in model] == addresses
    assert (memory.free(), memory.mapped, memory.reserved) == (memory.room, {}, {})
    assert moved(model, memory, USED).bytes == 2 * USED


def refusing(name: str, number: int) -> Callable[[int, str], bool]:
    """At the ``number``-th call (from 1) of ``name``."""
    seen: list[str] = []

    def refuse(_: int, called: str) -> bool:
        seen.append(called)
        return called == name and seen.count(name) == number

    return refuse


@pytest.mark.parametrize(("name", "number"), [("reserve", 1), ("create", 1), ("create", 2), ("map", 1), ("allow", 1)])
def test_a_driver_that_gives_no_pages_leaves_the_weights_where_they_are(
    name: str, number: int, model: list[torch.Tensor]
) -> None:
    addresses = [tensor.data_ptr() for tensor in model]
    memory = DramPages(refuse=refusing(name, number))
    with pytest.raises(PagesUnavailable, match="CUDA_ERROR_UNKNOWN"):
        moved(model, memory)
    assert [tensor.data_ptr() for tensor in model] == addresses
    assert (memory.free(), memory.mapped, memory.reserved) == (memory.room, {}, {})


@pytest.mark.parametrize(("name", "number"), [("reserve", 2), ("create", 3), ("map", 3), ("allow", 2)])
def test_a_driver_that_gives_one_set_only_says_that_the_engine_cannot_start(
    name: str, number: int, model: list[torch.Tensor]
) -> None:
    with pytest.raises(StandbyMissing, match="WEIGHTSYNC_MODE=live"):
        moved(model, DramPages(refuse=refusing(name, number)))
    assert [t.unique().tolist() for t in model] == [[1], [2], [3]]


def test_what_does_not_lie_in_pages_has_no_standby(model: list[torch.Tensor]) -> None:
    pages = moved(model, DramPages())
    outside = torch.zeros(8, dtype=torch.uint8)
    assert not pages.covers(outside)
    with pytest.raises(PagesUnavailable, match=r"8 bytes at 0x.* do not lie in pages"):
        pages.standby_of([model[0], outside])


def test_weights_on_several_devices_are_refused_with_their_names() -> None:
    with pytest.raises(PagesUnavailable, match="lie on cpu, meta, and pages are of one device"):
        into_pages([torch.zeros(1), torch.zeros(1, device="meta")])


def test_a_model_without_weights_has_no_pages() -> None:
    with pytest.raises(PagesUnavailable, match="no memory at all"):
        into_pages([])


def test_weights_of_the_host_are_refused() -> None:
    with pytest.raises(PagesUnavailable, match="they need a CUDA device"):
        into_pages([torch.zeros(1, dtype=torch.uint8)])
