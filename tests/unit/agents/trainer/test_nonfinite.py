"""Refused, warned of or let through: what the option says about numbers that are none."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from weightsync.agents.tables.spans import NOWHERE, Spans
from weightsync.agents.trainer.errors import NonFiniteWeights
from weightsync.agents.trainer.nonfinite import judge_numbers, known_option
from weightsync.agents.trainer.slots.finite import NonFinite
from weightsync.orchestrator.protocol.names import Version

VERSION = Version(1, 5)


def slots(*found: NonFinite) -> Any:
    return SimpleNamespace(nonfinite=lambda finite: found)


FOUND = NonFinite("w", 3, 8, blocks=False)


def test_an_unknown_option_is_named() -> None:
    assert known_option("warn") == "warn"
    with pytest.raises(ValueError, match="nonfinite='maybe'; it is one of refuse, warn, allow"):
        known_option("maybe")  # type: ignore[arg-type]


def test_refuse_raises_with_the_tensor() -> None:
    judge_numbers(slots(), "refuse", VERSION)
    with pytest.raises(NonFiniteWeights, match="w"):
        judge_numbers(slots(FOUND), "refuse", VERSION)


def test_warn_says_it_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        judge_numbers(slots(FOUND), "warn", VERSION)
    assert "NaN or infinity in w" in caplog.text


def test_allow_does_not_even_look() -> None:
    def looks(finite: Spans) -> tuple[NonFinite, ...]:
        raise AssertionError("the look at the slots is what allow saves")

    judge_numbers(SimpleNamespace(nonfinite=looks), "allow", VERSION)  # type: ignore[arg-type]


def test_what_a_digest_has_found_finite_is_not_looked_at_again() -> None:
    asked: list[Spans] = []
    finite = Spans.union([])
    told = SimpleNamespace(nonfinite=lambda finite: asked.append(finite) or ())
    judge_numbers(told, "refuse", VERSION, finite)  # type: ignore[arg-type]
    judge_numbers(told, "warn", VERSION)  # type: ignore[arg-type]
    assert [given is finite for given in asked] == [True, False]
    assert asked[1] is NOWHERE
