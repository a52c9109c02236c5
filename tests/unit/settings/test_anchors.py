"""Relative paths count from the directory of their file."""

from pathlib import Path

from weightsync.orchestrator.settings.anchors import anchored
from weightsync.orchestrator.settings.sections import EngineList, EngineSection


def test_paths_at_any_depth() -> None:
    key = EngineSection(name="a", url="http://h:1", api_key_file=Path("keys/a"))
    other = EngineSection(name="b", url="http://h:2", api_key_file=Path("/keys/b"))
    found = anchored(EngineList(engines=(key, other)), Path("/etc/weightsync"))
    assert [engine.api_key_file for engine in found.engines] == [Path("/etc/weightsync/keys/a"), Path("/keys/b")]
