"""Pages of the site made from the tables of a round (with a drawing of its phases) and of its markers."""

import html
import inspect
from collections.abc import Callable
from typing import Final

import msgspec
from weightsync.orchestrator.core.round.phases import ROWS
from weightsync.orchestrator.core.round.transitions import TABLE, Action, Phase, Report
from weightsync.orchestrator.protocol.limits import MAX_MARKER_BYTES
from weightsync.orchestrator.protocol.markers import BROADCASTS, KINDS, OUTCOMES, Manifest

WIDTH, HEIGHT, GAP, PER_LINE = 150, 44, 34, 3

DONE: Final[dict[Action, str]] = {
    Action.note: "counted; the phase may be complete",
    Action.leave_out: "the round goes on without that engine",
    Action.leave_out_late: "the round goes on without the engines that are late",
    Action.give_up: "the round is given up",
    Action.drop: "out of turn: the agent's connection is dropped",
    Action.ignore: "late, or accounted for",
}


def rounds() -> str:
    """What a round does in each phase when something happens, as the core's tables have it."""
    lines = [
        "# Rounds",
        "",
        "Made from the tables by which the daemon decides; [architecture](../architecture.md) explains them.",
        "",
    ]
    lines += [
        _drawing(),
        "",
        "## Phases",
        "",
        "| phase | it waits until nobody is among | then | late is the fault of |",
    ]
    lines += ["|---|---|---|---|"]
    for phase, row in ROWS.items():
        waits = " ".join(
            (inspect.getdoc(row.missing) or row.missing.__name__.replace("_", " ")).split("\n\n")[0].split()
        )
        lines.append(f"| `{phase.value}` | {waits} | {_after(phase)} | {row.late} |")
    lines += ["", "## What is done about what happens", ""]
    lines += [f"* **{action.value.replace('_', ' ')}**: {text}" for action, text in DONE.items()]
    phases = list(TABLE)
    lines += ["", f"| | {' | '.join(f'`{phase.value}`' for phase in phases)} |", "|---" * (len(phases) + 1) + "|"]
    for report in Report:
        actions = [TABLE[phase].get(report) for phase in phases]
        told = ["" if action is None else action.value.replace("_", " ") for action in actions]
        lines.append(f"| {report.value} | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def _after(phase: Phase) -> str:
    then = ROWS[phase].then
    return f"`{then.value}`" if isinstance(then, Phase) else f"the round ends: {then.__name__}"


def _ways_out(phase: Phase) -> str:
    """Whether the table knows a way to give a round up there."""
    return "may be given up" if Action.give_up in TABLE[phase].values() else "engines may be left out"


def _drawing() -> str:
    """The phases as boxes in their order, those after the decision in another colour, each with its way out."""
    parts = []
    forward = list(ROWS).index(Phase.DECIDING)
    for number, phase in enumerate(ROWS):
        x, y = (number % PER_LINE) * (WIDTH + GAP) + 1, (number // PER_LINE) * (HEIGHT + GAP) + 1
        fill = "#3f51b5" if number < forward else "#00796b"
        out = _ways_out(phase) if number < forward else "only forward"
        parts.append(
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{fill}"/>'
            f'<text x="{x + WIDTH / 2}" y="{y + 19}" fill="#fff" font-weight="bold">{html.escape(phase.value)}</text>'
            f'<text x="{x + WIDTH / 2}" y="{y + 35}" fill="#fff" font-size="10">{out}</text>'
        )
        if not isinstance(ROWS[phase].then, Phase):
            continue
        if number % PER_LINE < PER_LINE - 1:
            line = f"M{x + WIDTH} {y + HEIGHT / 2} h{GAP - 3}"
        else:
            left = (PER_LINE - 1) * (WIDTH + GAP)
            line = f"M{x + WIDTH / 2} {y + HEIGHT} v{GAP / 2} h{-left} v{GAP / 2 - 3}"
        parts.append(f'<path d="{line}" fill="none" stroke="currentColor" marker-end="url(#to)"/>')
    lines = -(-len(ROWS) // PER_LINE)
    width, height = PER_LINE * (WIDTH + GAP) - GAP + 2, lines * (HEIGHT + GAP) - GAP + 2
    chain = " → ".join(phase.value for phase in ROWS)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{chain}" style="max-width: {width}px"'
        ' font-family="sans-serif" font-size="13" text-anchor="middle"><defs>'
        '<marker id="to" orient="auto" refX="5" refY="3" markerWidth="6" markerHeight="6">'
        '<path d="M0 0 L6 3 L0 6 z" fill="currentColor"/></marker></defs>'
        f"{''.join(parts)}</svg>"
    )


WRITERS: Final = {
    "STABLE": "the trainer's rank 0: all that a version consists of is staged",
    "TRANSFER_READY": "the daemon: a round has begun to bring it to the engines",
    "COMMITTED": "the daemon: the version is decided, and its engines serve it or will",
    "FAILED": "the daemon: it will not be tried any more; `reason` says why",
}


def markers() -> str:
    """The markers of a step and what they say."""
    lines = [
        "# Markers", "",
        f"Files of at most {MAX_MARKER_BYTES // 1024} KiB in `{BROADCASTS}/step_<N>/` of the run directory, each empty",
        "or one JSON object. They are for people and for waking up; what counts is the journal:",
        "[operations](../operations.md#the-run-directory).",
        "", "| marker | who writes it, and when |", "|---|---|",
    ]  # fmt: skip
    lines += [
        f"| `{kind}` | {WRITERS[kind]}{'; one of the two outcomes' if kind in OUTCOMES else ''} |" for kind in KINDS
    ]
    lines += [
        "",
        "## Fields",
        "",
        " ".join((Manifest.__doc__ or "").replace("``", "`").split()),
        "",
        "| field | always |",
        "|---|---|",
    ]
    for field in msgspec.structs.fields(Manifest):
        lines.append(f"| `{field.encode_name}` | {'yes' if field.required else 'where it applies'} |")
    return "\n".join(lines) + "\n"


PAGES: Final[dict[str, Callable[[], str]]] = {"reference/rounds.md": rounds, "reference/markers.md": markers}
"""Page of the site → what makes it."""
