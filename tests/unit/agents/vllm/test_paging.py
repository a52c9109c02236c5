"""Which engines get their weights into pages. Moving them is ``memory/pages/test_paged.py``."""

import logging
from types import SimpleNamespace

import pytest
import torch
from weightsync.agents.memory.errors import PagesUnavailable, StandbyMissing
from weightsync.agents.vllm import paging

TENSORS = [torch.zeros(1 << 20, dtype=torch.uint8)]
PAGES = SimpleNamespace(bytes=2 << 20)


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was moved."""
    asked: list[object] = []

    def into_pages(tensors: object) -> SimpleNamespace:
        asked.append(tensors)
        return PAGES

    monkeypatch.setattr(paging, "into_pages", into_pages)
    return asked


@pytest.mark.parametrize("mode", ["auto", "flip"])
def test_weights_are_moved_where_a_mode_wants_it(mode: paging.Mode, moved: list[object]) -> None:
    assert paging.place(TENSORS, mode) is PAGES
    assert moved == [TENSORS]


@pytest.mark.parametrize("mode", ["live", "copy"])
def test_other_modes_leave_them_where_they_are(mode: paging.Mode, moved: list[object]) -> None:
    assert paging.place(TENSORS, mode) is None
    assert moved == []


def test_flip_is_refused_where_weights_cannot_lie_in_pages() -> None:
    with pytest.raises(PagesUnavailable, match="weights on cpu cannot lie in pages"):
        paging.place(TENSORS, "flip")


def test_auto_does_without_and_says_why(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO):
        assert paging.place(TENSORS, "auto") is None
    assert "weights on cpu cannot lie in pages" in caplog.text


def test_a_move_that_went_half_way_ends_the_start_in_auto_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def into_pages(tensors: object) -> None:
        raise StandbyMissing("no room")

    monkeypatch.setattr(paging, "into_pages", into_pages)
    with pytest.raises(StandbyMissing):
        paging.place(TENSORS, "auto")


@pytest.mark.parametrize(("free_mib", "fits"), [(2, True), (1.99, False)])
def test_auto_leaves_half_of_the_memory_that_is_free(
    free_mib: float, fits: bool, moved: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_mib * (1 << 20)), 1 << 40))
    weights = SimpleNamespace(device=torch.device("cuda", 0), numel=lambda: 1 << 20)
    assert (paging.place([weights], "auto") is PAGES) == fits  # type: ignore[list-item]
    assert paging.place([weights], "flip") is PAGES  # type: ignore[list-item]
