"""deploy/config.example.yaml names every key, says every default truly, and loads."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from weightsync.orchestrator.settings.explain import models_in
from weightsync.orchestrator.settings.settings import Settings, load

EXAMPLE = Path(__file__).parents[3] / "deploy" / "config.example.yaml"


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        for inner in models_in(field.annotation):
            yield from fields(inner, f"{prefix}{name}.")


def test_it_loads() -> None:
    settings = load(EXAMPLE, {})
    assert [engine.role for engine in settings.engines] == ["prefill", "decode"]


def test_it_names_every_key_and_no_other() -> None:
    text = EXAMPLE.read_text()
    named = set(re.findall(r"^[ #-]*([a-z_]+):", text, re.MULTILINE))
    known = {key.rpartition(".")[2] for key, _ in fields(Settings)}
    assert known <= named
    # Words at the start of a comment may be followed by a colon, too.
    assert named - known <= {"nixl", "hub", "filesystem", "live", "tcpstore"}


def test_every_section_has_its_own_keys_in_the_example() -> None:
    settings = load(EXAMPLE, {})
    for key, field in fields(Settings):
        value: object = settings
        for part in key.split("."):
            value = value[0] if isinstance(value, tuple) else value
            value = getattr(value, part, None)
        if key.startswith(
            ("engines", "run", "listen", "state", "rendezvous", "transport", "advertise", "trainer", "credentials")
        ):
            continue
        if not isinstance(value, BaseModel):
            assert value == field.default, f"{key}: the example deviates from the default"


def test_its_comments_state_the_true_defaults() -> None:
    text = EXAMPLE.read_text()
    for key, field in fields(Settings):
        default = field.default
        if isinstance(default, int | float) and not isinstance(default, bool):
            name = key.rpartition(".")[2]
            around = re.search(rf"[Dd]efault: {default:g}\b[^\n]*\n(?:[^\n]*\n)?[ #]*{name}: ", text) or re.search(
                rf"default: {default:g}\)(.|\n)*{name}: ", text
            )
            assert around, f"{key}: the comment above it must say its default {default:g}"
