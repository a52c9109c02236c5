"""Bar charts as inline SVG: no script, no outside resource, readable in light and dark, and by a screen reader."""

import html
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

BARS: Final = 240
"""More values than pixels share a bar, which shows the largest of them: what hurts is not averaged away."""

WIDTH, HEIGHT, LEFT, BOTTOM = 960, 200, 70, 22
"""Of the picture in its own units; LEFT and BOTTOM are room for numbers."""


@dataclass(frozen=True, slots=True)
class Bar:
    """Parts from the bottom up, each of a class of the style sheet with its value; ``says``: shown on pointing."""

    parts: tuple[tuple[str, float], ...]
    says: str

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(value for _, value in self.parts)


def chart(title: str, unit: str, bars: Sequence[Bar], first: str, last: str) -> str:
    """A figure. ``first`` and ``last``: what stands below its ends."""
    shown = fewer(bars)
    most = max((bar.total for bar in shown), default=0.0) or 1.0
    step = (WIDTH - LEFT) / max(1, len(shown))
    lines = [
        f'<figure><figcaption>{_text(title)} <span class="unit">{_text(unit)}</span></figcaption>',
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-label="{_text(title)}: at most {most:.4g} {_text(unit)}">',
    ]
    for share in (0.0, 0.5, 1.0):
        y = _y(share)
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{most * share:.4g}</text>')
    for number, bar in enumerate(shown):
        below = 0.0
        lines.append(f"<g><title>{_text(bar.says)}</title>")
        for name, value in bar.parts:
            top = _y((below + value) / most)
            tall = _y(below / most) - top
            x = LEFT + number * step
            lines.append(
                f'<rect class="{_text(name)}" x="{x:.2f}" y="{top:.2f}" width="{max(0.5, step - 0.5):.2f}"'
                f' height="{tall:.2f}"/>'
            )
            below += value
        lines.append("</g>")
    lines.append(f'<text x="{LEFT}" y="{HEIGHT - 4}">{_text(first)}</text>')
    lines.append(f'<text x="{WIDTH}" y="{HEIGHT - 4}" text-anchor="end">{_text(last)}</text></svg></figure>')
    return "\n".join(lines)


def fewer(bars: Sequence[Bar]) -> list[Bar]:
    """At most BARS, each the largest of its neighbours."""
    if len(bars) <= BARS:
        return list(bars)
    edges = [number * len(bars) // BARS for number in range(BARS + 1)]
    return [max(bars[low:high], key=lambda bar: bar.total) for low, high in itertools.pairwise(edges)]


def _y(share: float) -> float:
    return 8 + (HEIGHT - BOTTOM - 8) * (1 - share)


def _text(text: str) -> str:
    return html.escape(text, quote=True)
