"""The release is the installed distribution's, or said not to be one."""

import importlib.metadata

import pytest
from weightsync.orchestrator.release import DISTRIBUTION, UNKNOWN, release


def test_it_is_the_installed_one() -> None:
    assert release() == importlib.metadata.version(DISTRIBUTION)


def test_a_tree_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    release.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert release() == UNKNOWN
    release.cache_clear()
