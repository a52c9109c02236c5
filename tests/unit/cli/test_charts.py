"""Charts as SVG: well-formed, to scale, without a foreign word in the markup."""

from xml.etree import ElementTree

import pytest
from weightsync.orchestrator.cli.charts import BARS, BOTTOM, HEIGHT, Bar, chart, fewer

SVG = "{http://www.w3.org/2000/svg}"


def drawn(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" '))


def test_bars_are_as_tall_as_their_values() -> None:
    figure = drawn(chart("Stall", "ms", [Bar((("a", 50.0), ("b", 50.0)), "x"), Bar((("a", 25.0),), "y")], "1", "2"))
    tall = [float(bar.attrib["height"]) for bar in figure.iter(f"{SVG}rect")]
    full = HEIGHT - BOTTOM - 8
    assert tall == pytest.approx([full / 2, full / 2, full / 4])
    lower, upper, _ = figure.iter(f"{SVG}rect")
    assert float(upper.attrib["y"]) + full / 2 == pytest.approx(float(lower.attrib["y"]))
    numbers = [text.text for text in figure.iter(f"{SVG}text")]
    assert numbers == ["0", "50", "100", "1", "2"]


def test_nothing_and_zero_can_be_drawn() -> None:
    assert list(drawn(chart("Stall", "ms", [], "", "")).iter(f"{SVG}rect")) == []
    [bar] = drawn(chart("Stall", "ms", [Bar((("a", 0.0),), "x")], "", "")).iter(f"{SVG}rect")
    assert float(bar.attrib["height"]) == 0


def test_what_others_wrote_is_no_markup() -> None:
    figure = drawn(chart("<b>", '"', [Bar((("a", 1.0),), "</title><script>")], "<", "&"))
    assert "script" not in {element.tag for element in figure.iter()}
    assert [title.text for title in figure.iter(f"{SVG}title")] == ["</title><script>"]


def test_many_values_share_bars_and_none_is_averaged_away() -> None:
    bars = [Bar((("a", float(n == 7777)),), str(n)) for n in range(10_000)]
    shown = fewer(bars)
    assert len(shown) == BARS
    assert [bar.says for bar in shown if bar.total] == ["7777"]
    assert fewer(bars[:BARS]) == bars[:BARS]
