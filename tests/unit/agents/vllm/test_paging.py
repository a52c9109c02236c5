"""Which engines get their weights into pages. Moving them is ``memory/pages/test_paged.py``."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from weightsync.agents.inference.landing import LANDING_VARIABLE
from weightsync.agents.memory.errors import PagesUnavailable, StandbyMissing
from weightsync.agents.vllm import paging

TENSORS: list[Any] = [torch.zeros(1 << 20, dtype=torch.uint8)]
PAGES = SimpleNamespace(bytes=2 << 20)
NEEDED = 1 << 20
"""Of landing, for a whole version."""


def weights_of(mib: int) -> list[Any]:
    """On a GPU."""
    return [SimpleNamespace(device=torch.device("cuda", 0), numel=lambda: mib << 20)]


WEIGHTS = weights_of(1)


class Ranks:
    """Two ranks, of which the other one says ``said``, one answer after the other."""

    count = 2

    def __init__(self, *said: int) -> None:
        self.said = list(said)

    def least(self, value: int) -> int:
        return min(value, self.said.pop(0))


@pytest.fixture(autouse=True)
def _plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LANDING_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 40))


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was moved."""
    asked: list[object] = []

    def into_pages(tensors: object, most: int | None) -> SimpleNamespace:
        asked.append((tensors, most))
        return PAGES

    monkeypatch.setattr(paging, "into_pages", into_pages)
    return asked


@pytest.mark.parametrize("mode", ["auto", "flip"])
def test_weights_are_moved_where_a_mode_wants_it(mode: paging.Mode, moved: list[object]) -> None:
    assert paging.place(WEIGHTS, NEEDED, mode) == paging.Placed(PAGES)  # type: ignore[arg-type]
    assert moved == [(WEIGHTS, None)]


@pytest.mark.parametrize("mode", ["live", "copy"])
def test_other_modes_leave_them_where_they_are(mode: paging.Mode, moved: list[object]) -> None:
    assert paging.place(TENSORS, NEEDED, mode) == paging.Placed(None, f"WEIGHTSYNC_MODE={mode}")
    assert moved == []


def test_flip_in_host_memory_moves_nothing_but_pages() -> None:
    served = torch.zeros(1 << 20, dtype=torch.uint8)
    pages = paging.place([served], NEEDED, "flip").pages
    assert pages is not None
    (standby,) = pages.standby_of([served])
    standby.fill_(7)
    pages.flip()
    assert (served.unique().tolist(), standby.unique().tolist()) == ([7], [0])


def test_flip_in_host_memory_needs_as_much_as_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging, "free_bytes", lambda: (1 << 20) - 1)
    with pytest.raises(PagesUnavailable, match=r"a second set of 1 MiB .*; set WEIGHTSYNC_MODE=live"):
        paging.place(TENSORS, NEEDED, "flip")


def test_flip_is_refused_where_weights_cannot_lie_in_pages() -> None:
    with pytest.raises(PagesUnavailable, match="overlap others; set WEIGHTSYNC_MODE=copy"):
        paging.place([TENSORS[0], TENSORS[0][8:]], NEEDED, "flip")


def test_auto_does_without_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert paging.place(TENSORS, NEEDED, "auto") == paging.Placed(
        None, "pages of host memory are exchanged with WEIGHTSYNC_MODE=flip alone"
    )

    def into_pages(tensors: object, most: int | None) -> None:
        raise PagesUnavailable("no bindings")

    monkeypatch.setattr(paging, "into_pages", into_pages)
    assert paging.place(WEIGHTS, NEEDED, "auto") == paging.Placed(None, "no bindings")
    with pytest.raises(PagesUnavailable):
        paging.place(WEIGHTS, NEEDED, "flip")


def test_a_move_that_went_half_way_ends_the_start_in_auto_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def into_pages(tensors: object, most: int | None) -> None:
        raise StandbyMissing("no room")

    monkeypatch.setattr(paging, "into_pages", into_pages)
    with pytest.raises(StandbyMissing):
        paging.place(WEIGHTS, NEEDED, "auto")


@pytest.mark.parametrize(("free_mib", "fits"), [(2, True), (1.99, False)])
def test_auto_leaves_half_of_the_memory_that_is_free(
    free_mib: float, fits: bool, moved: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_mib * (1 << 20)), 1 << 40))
    assert (paging.place(WEIGHTS, NEEDED, "auto").pages is PAGES) == fits
    assert paging.place(WEIGHTS, NEEDED, "flip").pages is PAGES


@pytest.mark.parametrize(
    ("weights_mib", "needed_mib", "budget", "fits"),
    [(4000, 4100, 6048, True), (4000, 4100, 6047, False), (4000, 4100, 10, False), (3, 5, 8, True), (3, 5, 7, False)],
)
def test_with_auto_a_budget_holds_the_second_set_and_the_ring(
    weights_mib: int,
    needed_mib: int,
    budget: int,
    fits: bool,
    moved: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = weights_of(weights_mib)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 1 << 40))
    monkeypatch.setenv(LANDING_VARIABLE, str(budget))
    placed = paging.place(weights, needed_mib << 20, "auto")
    assert (placed.pages is PAGES) == fits
    if fits:
        assert moved == [(weights, weights_mib << 20)], "it is held to, whatever the driver rounds up"
    else:
        assert placed.why_not == (
            f"a second set of {weights_mib} MiB and a ring of {min(2048, needed_mib)} MiB are more than"
            f" WEIGHTSYNC_LANDING_MIB allows, which is {budget}"
        )
    assert paging.place(weights, needed_mib << 20, "flip").pages is PAGES, "who names it declares the ring alone"


def test_what_one_rank_cannot_have_none_takes(moved: list[object]) -> None:
    placed = paging.place(WEIGHTS, NEEDED, "auto", Ranks(0))
    assert placed == paging.Placed(None, "another rank of this engine cannot, and its log says why")
    assert moved == []


def test_one_rank_in_pages_beside_one_that_is_not_ends_the_start(moved: list[object]) -> None:
    with pytest.raises(StandbyMissing, match=r"those of another rank of this engine do not.*WEIGHTSYNC_MODE=copy"):
        paging.place(WEIGHTS, NEEDED, "auto", Ranks(1, 0))
    assert paging.place(WEIGHTS, NEEDED, "auto", Ranks(1, 1)).pages is PAGES
