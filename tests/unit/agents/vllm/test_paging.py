"""Which engines get their weights into pages. Moving them is ``memory/pages/test_paged.py``."""

import logging
from types import SimpleNamespace

import pytest
import torch
from weightsync.agents.memory.errors import PagesUnavailable, StandbyMissing
from weightsync.agents.vllm import paging

TENSORS = [torch.zeros(1 << 20, dtype=torch.uint8)]
PAGES = SimpleNamespace(bytes=2 << 20)


def config(**model: bool) -> SimpleNamespace:
    return SimpleNamespace(model_config=SimpleNamespace(**model), cache_config=SimpleNamespace())


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
    assert paging.place(TENSORS, config(), mode) is PAGES
    assert moved == [TENSORS]


@pytest.mark.parametrize("mode", ["live", "copy"])
def test_other_modes_leave_them_where_they_are(mode: paging.Mode, moved: list[object]) -> None:
    assert paging.place(TENSORS, config(), mode) is None
    assert moved == []


@pytest.mark.parametrize("setting", ["enable_sleep_mode", "enable_cumem_allocator"])
def test_pages_of_vllms_own_are_refused_by_their_option(setting: str, moved: list[object]) -> None:
    with pytest.raises(PagesUnavailable, match=f"start without --{setting.replace('_', '-')}"):
        paging.place(TENSORS, config(**{setting: True}), "flip")
    assert moved == []


def test_auto_does_without_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.INFO):
        assert paging.place(TENSORS, config(), "auto") is None
    assert "weights on cpu cannot lie in pages" in caplog.text


def test_a_move_that_went_half_way_ends_the_start_in_auto_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def into_pages(tensors: object) -> None:
        raise StandbyMissing("no room")

    monkeypatch.setattr(paging, "into_pages", into_pages)
    with pytest.raises(StandbyMissing):
        paging.place(TENSORS, config(), "auto")


@pytest.mark.parametrize(("share", "fits"), [(0.5, True), (0.49, False)])
def test_auto_leaves_half_of_the_memory_beside_the_weights(
    share: float, fits: bool, moved: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 MiB of memory, 1 MiB of weights: half of it leaves 2 MiB beside them, and a standby set is half of that."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 6 << 20))
    weights = SimpleNamespace(device=torch.device("cuda", 0), numel=lambda: 1 << 20)
    settings = SimpleNamespace(cache_config=SimpleNamespace(gpu_memory_utilization=share))
    assert (paging.place([weights], settings, "auto") is PAGES) == fits  # type: ignore[list-item]
    assert paging.place([weights], settings, "flip") is PAGES  # type: ignore[list-item]
