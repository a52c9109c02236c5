"""The forecast's plan, and the core's fleet that is driven by hand, while a timeline watches."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from weightsync.orchestrator.core.events import Event
from weightsync.orchestrator.daemon.page.timeline import Timeline

UNIT = Path(__file__).resolve().parents[2]


def _conftest_of(folder: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"conftest_of_{folder}", UNIT / folder / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plan = _conftest_of("forecast").plan
Driven: Any = _conftest_of("core").Driven


class Watched(Driven):
    """Each event takes a tenth of a second, and the timeline is told of it as the daemon tells it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.timeline = Timeline()
        super().__init__(*arguments, **options)

    def happens(self, *events: Event) -> Any:
        self.now += 0.1
        commands = super().happens(*events)
        self.timeline.happened(self.fleet, events, self.now)
        return commands


@pytest.fixture
def watch() -> Callable[..., Watched]:
    return Watched
