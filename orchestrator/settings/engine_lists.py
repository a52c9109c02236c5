"""``engines_from``: engines in files of their own, which something else writes and which may change at any time."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pydantic import ValidationError
from weightsync.orchestrator.settings.anchors import anchored
from weightsync.orchestrator.settings.document import Document
from weightsync.orchestrator.settings.explain import explain
from weightsync.orchestrator.settings.problems import ConfigError, Problem
from weightsync.orchestrator.settings.sections import MAX_ENGINES, EngineList, EngineSection

SUFFIXES: Final = (".yaml", ".yml", ".json")
"""Of files in a directory; others, and hidden ones, which may be half written, are not looked at."""

Look = tuple[tuple[str, int, int, int], ...]
"""Of each file: path, inode, size, time of change in ns."""


def require_different(engines: Sequence[EngineSection]) -> None:
    """Engines of one fleet differ in name and servers, and a pair has both roles.

    Raises:
        ValueError: they do not.
    """
    names: dict[str, int] = {}
    urls: dict[str, int] = {}
    for index, engine in enumerate(engines):
        for what, seen, values in (("name", names, (engine.name,)), ("url", urls, engine.servers)):
            for value in (value.rstrip("/") for value in values):
                if value in seen:
                    raise ValueError(f"entries {seen[value]} and {index} have the same {what} {value!r}")
                seen[value] = index
    for pair in {engine.pair for engine in engines if engine.pair is not None}:
        roles = {engine.role for engine in engines if engine.pair == pair}
        if not {"prefill", "decode"} <= roles:
            raise ValueError(f"pair {pair!r} needs an engine of role prefill and one of role decode")


def with_lists(file: Path, engines: Sequence[EngineSection], source: Path) -> tuple[EngineSection, ...]:
    """The configuration's ``engines`` and those in ``source``. ``file``: the configuration, for errors.

    Raises:
        ConfigError: a file of ``source`` cannot be used, or two engines of all are one.
    """
    try:
        files = files_of(source)
    except OSError as error:
        fix = "name a readable file or directory"
        raise ConfigError(file, Problem("engines_from", str(source), f"cannot be read: {error}", fix)) from error
    found = (*engines, *(engine for each in files for engine in _engines_in(each)))
    try:
        if len(found) > MAX_ENGINES:
            raise ValueError(f"there are {len(found)} engines, at most {MAX_ENGINES}")
        require_different(found)
    except ValueError as error:
        fix = f"change one of them, in engines or in {source}"
        raise ConfigError(file, Problem("engines and engines_from", "", str(error), fix)) from error
    return found


def files_of(source: Path) -> list[Path]:
    """The files that ``source`` names, in their order by name.

    Raises:
        OSError: it cannot be looked at.
    """
    if not source.is_dir():
        return [source]
    with os.scandir(source) as entries:
        names = sorted(e.name for e in entries if e.name.endswith(SUFFIXES) and not e.name.startswith("."))
    return [source / name for name in names]


def look(source: Path) -> Look:
    """Tells whether anything in ``source`` has become another since the last look; empty where nothing is there."""
    found = []
    try:
        for each in files_of(source):
            stat = each.stat()
            found.append((str(each), stat.st_ino, stat.st_size, stat.st_mtime_ns))
    except OSError:
        return ()
    return tuple(found)


def _engines_in(file: Path) -> tuple[EngineSection, ...]:
    document = Document.read(file, plain=True)
    try:
        listed = EngineList.model_validate(document.values)
    except ValidationError as error:
        raise ConfigError(file, *explain(document, {}, error, EngineList)) from error
    return anchored(listed, file.parent).engines
