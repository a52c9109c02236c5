"""``report``: the history of rounds as one HTML file, with charts, to be sent to whoever was not there; or as JSON."""

import argparse
import html
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from weightsync.orchestrator.cli.charts import Bar, chart
from weightsync.orchestrator.cli.common import Exit, json_text
from weightsync.orchestrator.cli.status import rounds_view
from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.daemon.admin.views import RoundRow, RoundsView
from weightsync.orchestrator.protocol.text import clean
from weightsync.orchestrator.release import release

MAX_ROWS: Final = 500
"""Of the table; the charts are of all rounds."""

PHASES: Final = tuple(phase.value for phase in Phase)

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --faint: #d0d7de }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --faint: #30363d } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } figure { margin: 1.5rem 0 } figcaption { font-weight: 600 } .unit { font-weight: 400 }
svg { width: 100%; height: auto } svg text { font-size: 11px; fill: var(--ink) } svg line { stroke: var(--faint) }
.committed { fill: #2f81f7 } .failed { fill: #d1242f } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px } th, td { padding: .2rem .6rem;
  border-bottom: 1px solid var(--faint); text-align: right; white-space: nowrap }
td:last-child, th:last-child { text-align: left; white-space: normal }
.key span { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em }
"""

_COLOURS: Final = (
    "#2f81f7", "#1a7f37", "#9a6700", "#bc4c00", "#8250df", "#cf222e", "#0a7ea4", "#bf3989", "#57606a", "#4d9375",
)  # fmt: skip


class ReportView(msgspec.Struct, frozen=True, kw_only=True):
    """What a report says of its rounds. ``stall_*`` and ``bytes`` are of those that committed; ``made`` in unix time.

    ``stall_*``: of the longest that an engine took no step in a round, paused or to switch. ``faults``: whose fault it
    was → how many of the rounds that did not commit.
    """

    run: str
    source: str
    release: str
    made: float
    committed: int
    stall_median_ms: float | None
    stall_95_percent_ms: float | None
    bytes: int
    faults: dict[str, int]
    rounds: tuple[RoundRow, ...]


def report(options: argparse.Namespace) -> int:
    """Writes the file and says where; with ``options.json`` prints what it would hold, and writes none.

    Raises:
        ConfigError: as ``daemon_of``.
    """
    view, code = rounds_view(options, options.last)
    if view is None:
        return code
    if options.json:
        print(json_text(summed(view, time.time())))
        return Exit.OK
    try:
        options.out.write_text(page(view, time.time()), encoding="utf-8")
    except OSError as error:
        print(f"{options.out} cannot be written: {error.strerror}. Fix: give another --out", file=sys.stderr)
        return Exit.IO
    print(f"{len(view.rounds)} rounds: {Path(options.out).absolute()}")
    return Exit.OK


def page(view: RoundsView, now: float) -> str:
    """The whole document; ``now`` in unix time."""
    rows = view.rounds
    title = f"Rounds of run {view.run}"
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{_text(title)}</title>'
        f"<style>{_STYLE}{''.join(f'.p{n} {{ fill: {c}; background: {c} }}' for n, c in enumerate(_COLOURS))}</style>"
        f"</head><body><h1>{_text(title)}</h1>"
    )
    made = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    foot = f"<p>Made {made} by weightsync-orchestrator {_text(release())}, from the {view.source}.</p></body></html>\n"
    if not rows:
        return f"{head}<p>No round has ended yet.</p>{foot}"
    return "\n".join([head, _sum(summed(view, now)), *_charts(rows), _table(rows), foot])


def summed(view: RoundsView, now: float) -> ReportView:
    """The rounds with their sums; ``now`` in unix time."""
    good = [row for row in view.rounds if row.outcome == "committed"]
    stalls = sorted(row.stood_ms for row in good)
    blame = Counter(row.fault or "unknown" for row in view.rounds if row.outcome != "committed")
    return ReportView(
        run=view.run,
        source=view.source,
        release=release(),
        made=now,
        committed=len(good),
        stall_median_ms=statistics.median(stalls) if stalls else None,
        stall_95_percent_ms=stalls[min(len(stalls) - 1, len(stalls) * 95 // 100)] if stalls else None,
        bytes=sum(row.bytes for row in good),
        faults=dict(blame.most_common()),
        rounds=view.rounds,
    )


def _sum(sums: ReportView) -> str:
    parts = [f"{len(sums.rounds)} rounds, {sums.committed} committed"]
    if sums.stall_median_ms is not None:
        parts.append(
            f"stall of those: median {sums.stall_median_ms:.0f} ms, 95 % within {sums.stall_95_percent_ms:.0f} ms"
        )
        parts.append(f"{sums.bytes / 1e9:.1f} GB moved")
    parts += [f"{count} not committed by fault of the {fault}" for fault, count in sums.faults.items()]
    return f"<p>{_text('; '.join(parts))}.</p>"


def _charts(rows: Sequence[RoundRow]) -> list[str]:
    ends = f"round {rows[0].round}", f"round {rows[-1].round}"

    def simple(title: str, unit: str, values: Sequence[float]) -> str:
        bars = [
            Bar(((_class(row), value),), f"round {row.round}, step {row.step}: {value:.4g} {unit} ({row.outcome})")
            for row, value in zip(rows, values, strict=True)
        ]
        return chart(title, unit, bars, *ends)

    stacked = [
        Bar(
            tuple((f"p{n % len(_COLOURS)}", row.times_ms.get(name, 0.0)) for n, name in enumerate(PHASES)),
            f"round {row.round}: "
            + ", ".join(f"{name} {row.times_ms[name]:.1f} ms" for name in PHASES if name in row.times_ms),
        )
        for row in rows
    ]
    key = "".join(f'<span class="p{n % len(_COLOURS)}"></span>{name}' for n, name in enumerate(PHASES))
    return [
        simple("Stall: the longest that an engine took no step", "ms", [row.stood_ms for row in rows]),
        chart("Phases", "ms", stacked, *ends),
        f'<p class="key">{key}</p>',
        simple("Wire", "GB/s", [row.wire_gb_per_s for row in rows]),
        simple("Bytes", "GB", [row.bytes / 1e9 for row in rows]),
    ]


def _table(rows: Sequence[RoundRow]) -> str:
    names = ("round", "step", "try", "outcome", "engines", "GB", "GB/s", "stall ms", "total ms", "ended", "why")
    lines = [
        f'<div class="scroll"><table><thead><tr>{"".join(f"<th>{name}</th>" for name in names)}</tr></thead><tbody>'
    ]
    for row in reversed(rows[-MAX_ROWS:]):
        ended = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(row.unix_time)) if row.unix_time else ""
        cells = (
            row.round, str(row.step), str(row.attempt), row.outcome, str(len(row.engines)), f"{row.bytes / 1e9:.2f}",
            f"{row.wire_gb_per_s:.2f}", f"{row.stood_ms:.0f}", f"{row.total_ms:.0f}", ended, "; ".join(row.why),
        )  # fmt: skip
        lines.append(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}</tr>")
    more = len(rows) - MAX_ROWS
    return "\n".join(
        [*lines, "</tbody></table></div>", f"<p>{more} older rounds are in the charts only.</p>" if more > 0 else ""]
    )


def _class(row: RoundRow) -> str:
    return "committed" if row.outcome == "committed" else "failed"


def _text(text: str) -> str:
    return html.escape(clean(text), quote=True)
