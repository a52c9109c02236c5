"""Which steps there are, which came and which went."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from weightsync.orchestrator.daemon.run_directory import listing
from weightsync.orchestrator.daemon.run_directory.listing import Listing


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def make(path: Path, *names: str) -> None:
    for name in names:
        (path / name).mkdir()


def test_steps_come_and_go(tmp_path: Path, root: int) -> None:
    found = Listing()
    make(tmp_path, "step_10", "step_9", "other", ".hidden")
    assert found.refresh(root, ()) == ({9, 10}, set())
    assert found.steps == [9, 10]
    assert [problem.path for problem in found.problems] == ["broadcasts/other"]
    make(tmp_path, "step_1")
    (tmp_path / "step_9").rmdir()
    (tmp_path / "other").rmdir()
    assert found.refresh(root, ()) == ({1}, {9})
    assert (found.steps, found.problems) == ([1, 10], ())
    assert found.refresh(root, ()) == (set(), set())


def test_of_too_many_the_highest_are_watched(tmp_path: Path, root: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "MAX_STEPS", 2)
    found = Listing()
    make(tmp_path, "step_1", "step_2")
    assert found.refresh(root, ()) == ({1, 2}, set())
    make(tmp_path, "step_3")
    assert found.refresh(root, ()) == ({3}, {1})
    (tmp_path / "step_3").rmdir()
    assert found.refresh(root, ()) == ({1}, {3})


def test_what_did_not_change_is_not_listed(tmp_path: Path, root: int) -> None:
    found = Listing()
    make(tmp_path, "step_1")
    assert found.refresh(root, (5, 6)) == ({1}, set())
    make(tmp_path, "step_2")
    assert found.refresh(root, (5, 6)) == (set(), set())
    assert found.refresh(root, (5, 7)) == ({2}, set())


def test_strays_are_kept_up_to_a_bound(tmp_path: Path, root: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "MAX_STRAYS", 3)
    found = Listing()
    make(tmp_path, *"fedcba", "step_1")
    found.refresh(root, ())
    assert [problem.path for problem in found.problems] == ["broadcasts/a", "broadcasts/b", "broadcasts/c"]
