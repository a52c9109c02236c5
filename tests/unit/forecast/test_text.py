"""Explanations and simulations as text."""

import msgspec
import pytest
from weightsync.orchestrator.forecast.explain import explain
from weightsync.orchestrator.forecast.text import explanation_text, shorten, size, table

MIB = 1 << 20


def test_text_and_json_say_the_same(plan):
    found = explain(plan)
    text = explanation_text(found, top=1)
    assert plan.root in text
    assert "tensors (1 of 2, largest first)" in text
    assert "model.layers.*.norms" not in text
    data = msgspec.json.decode(msgspec.json.encode(found))
    assert data["root"] == plan.root
    assert data["moved"]["direct_bytes"] == 4 * MIB
    assert data["tensors"][1]["slot"] == "gathered"


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (2.16e12, "2.16 TB")])
def test_sizes(count, text):
    assert size(count) == text


def test_columns_are_as_wide_as_their_widest_entry():
    assert table(("A", "LONG"), [("wide", "x"), ("y", "z")]) == ["A     LONG", "wide  x", "y     z"]


def test_long_lists_say_how_many_more_there_are():
    assert shorten(("a", "b", "c"), 2) == ["a", "b", "and 1 more"]
    assert shorten(("a", "b"), 2) == ["a", "b"]
