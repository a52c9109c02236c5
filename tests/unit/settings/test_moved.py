"""A key of the last release is there, or refused by name with what took its place.

``released_schema.json`` is what ``config schema`` of the last release prints; ``make changelog VERSION=…`` renews it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from settings_files import MINIMAL, Refusal
from weightsync.orchestrator.settings.moved import MOVED, moved
from weightsync.orchestrator.settings.settings import Settings

Schema = dict[str, Any]


def described(schema: Schema, part: Schema, prefix: str = "") -> Iterator[tuple[str, Schema]]:
    """Every key below ``part`` as ``section.key``, through references, alternatives and lists, with its description."""
    if "$ref" in part:
        part = schema["$defs"][part["$ref"].rpartition("/")[2]]
    for choice in (*part.get("anyOf", ()), *part.get("oneOf", ())):
        yield from described(schema, choice, prefix)
    if "items" in part:
        yield from described(schema, part["items"], prefix)
    for name, below in part.get("properties", {}).items():
        yield f"{prefix}{name}", below
        yield from described(schema, below, f"{prefix}{name}.")


RELEASED: Schema = json.loads(Path(__file__).with_name("released_schema.json").read_text())
PRESENT: Schema = Settings.model_json_schema()
THEN, NOW = (dict(described(schema, schema)) for schema in (RELEASED, PRESENT))


def test_the_released_schema_is_one() -> None:
    assert {"run.id", "listen.port", "engines.url", "transport.rails", "rendezvous.host", "pause.mode"} <= set(THEN)


def test_every_released_key_is_there_or_said_to_have_moved() -> None:
    assert set(THEN) - set(NOW) - set(MOVED) == set()


def test_what_moved_is_gone_and_what_took_its_place_is_there_and_named() -> None:
    assert set(MOVED) & set(NOW) == set()
    for new, instead in MOVED.values():
        assert new == "" or new in NOW
        assert new in instead


def test_every_released_choice_is_still_one() -> None:
    lost = {
        key: gone
        for key in set(THEN) & set(NOW)
        if (gone := set(THEN[key].get("enum", ())) - set(NOW[key].get("enum", ())))
    }
    assert lost == {}
    assert any("enum" in part for part in THEN.values())


@pytest.mark.parametrize("key", MOVED)
def test_a_former_key_is_refused_with_what_to_write_instead(key: str, refusal: Refusal) -> None:
    _, instead = MOVED[key]
    section, _, name = key.rpartition(".")
    added = f"{section}: {{{name}: 1}}\n" if section else f"{name}: 1\n"
    (problem,) = refusal(MINIMAL.replace("listen: {port: 7410}\n", "") + added).problems
    assert (problem.key, problem.line, problem.fix) == (key, 9, instead)
    assert "earlier release" in problem.problem
    variable = f"WEIGHTSYNC__{key.upper().replace('.', '__')}"
    (problem,) = refusal(MINIMAL, {variable: "1"}).problems
    assert (problem.key, problem.variable, problem.fix) == (key, variable, instead)


def test_a_key_that_never_was_has_not_moved() -> None:
    assert moved(("engines", 0, "mode")) == ""
    assert moved(("mode",)) != ""
