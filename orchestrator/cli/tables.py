"""Status and history as text for people."""

import textwrap
from collections.abc import Sequence
from typing import Final

from weightsync.orchestrator.core.round.transitions import Phase
from weightsync.orchestrator.daemon.admin.views import (
    EngineView,
    FindingView,
    LinkView,
    ProblemView,
    RoundRow,
    StatusView,
    TrainerView,
    VersionView,
)

WIDTH: Final = 100
"""Columns of a terminal that people have; what is longer goes on in the next line, or ends in … within a table."""

MAX_CELL: Final = 32
"""Of a table: a name may have 128 characters; ``--json`` has all of it."""

NAMED: Final = 10
"""Characters of engines' names in a table of rounds before they are only counted."""

SHOWN_ROUNDS: Final = 5
"""Rounds in ``status``; ``rounds`` shows more."""

SHOWN_TRAINERS: Final = 8
"""Trainer ranks in ``status`` before they are only counted."""

SHOWN: Final = 8
"""Tensors in ``status`` before they are only counted; ``plan explain`` names all."""

BAR: Final = 70
"""Columns of a round's waterfall."""

_UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB")


def status_text(status: StatusView, now: float) -> str:
    """The whole status, what is wrong first, in lines of at most WIDTH; ``now`` in unix time."""
    parts = [
        "\n".join(_head(status, now)),
        _table(_ENGINE_COLUMNS, [_engine(engine, now) for engine in status.engines]),
    ]
    if modes := _modes(status.engines):
        parts.append("\n".join(modes))
    if status.trainers:
        parts.append(_trainers(status.trainers, now))
    if status.rounds:
        parts.append(rounds_text(status.rounds[-SHOWN_ROUNDS:], now))
    if status.unneeded:
        shown = ", ".join(status.unneeded[:SHOWN]) + (", …" if len(status.unneeded) > SHOWN else "")
        unneeded = f"{len(status.unneeded)} tensors of the trainer that no engine needs: {shown}"
        parts.append("\n".join(_wrapped(unneeded)))
    if notes := [line for finding in status.findings if finding.level == "note" for line in _note(finding)]:
        parts.append("\n".join(notes))
    if left_out := [line for engine in status.engines for line in _left_out(engine)]:
        parts.append("\n".join(left_out))
    return "\n\n".join(parts)


def _head(status: StatusView, now: float) -> list[str]:
    """What is wrong, what is done, and what the operator wants."""
    release = f" {status.release}," if status.release else ""
    daemon = f"daemon{release} epoch {status.epoch}" + (f", up {_age(now - status.started)}" if status.started else "")
    source = "" if status.source == "daemon" else "  [from the journal: the daemon does not answer]"
    lines = _wrapped(f"run {status.run}, {daemon}, journal {status.journal_id[:8] or '-'}{source}")
    for problem in status.problems:
        lines += _problem(problem, now)
    lines += _wrapped(status.state)
    lines += _wrapped(f"committed: {_committed(status.committed, now)}")
    if status.round is not None:
        under_way = status.round
        whom = f", waits for {under_way.waits_for}" if under_way.waits_for else ""
        lines += _wrapped(
            f"round {under_way.round}: step {under_way.version.step}, attempt {under_way.attempt}, for"
            f" {_age(under_way.elapsed_seconds)}; {under_way.phase} for {_age(under_way.phase_seconds)}{whom}"
        )
    for waiting in status.waiting:
        since = _age(now - waiting.since)
        lines += _wrapped(f"publish of step {waiting.version.step}: waits {since} for {waiting.waits_for}")
    return lines


def check_line(status: StatusView) -> str:
    """One line for a monitor: the worst that is wrong, or what is served."""
    if not status.problems:
        serving = sum(engine.state in ("serving", "updating") for engine in status.engines)
        step = f"step {status.committed.step}" if status.committed is not None else "nothing"
        return f"ok: {step} is committed, {serving} of {len(status.engines)} engines serve"
    first, more = status.problems[0], len(status.problems) - 1
    return _plain(f"{first.severity}: {first.what}" + (f" (and {more} more)" if more else ""))


def _problem(problem: ProblemView, now: float) -> list[str]:
    since = f" [{_age(now - problem.since)}]" if problem.since else ""
    lines = _wrapped(f"{problem.severity.upper()}: {problem.what}{since}")
    return lines + (_wrapped(f"Fix: {problem.fix}", "    ") if problem.fix else [])


def _wrapped(text: str, indent: str = "") -> list[str]:
    """In lines of at most WIDTH; the second and later ones are indented."""
    return textwrap.wrap(_plain(text), WIDTH, initial_indent=indent, subsequent_indent=indent + "    ")


def rounds_text(rounds: Sequence[RoundRow], now: float) -> str:
    """A table of rounds, oldest first, each failure's reason below its row."""
    if not rounds:
        return "no round has ended yet"
    table = _table(_ROUND_COLUMNS, [_round(row, now) for row in rounds], _SPARE_OF_ROUNDS).splitlines()
    lines = [table[0]]
    for row, line in zip(rounds, table[1:], strict=True):
        lines.append(line)
        lines += [line for sentence in row.why for line in _wrapped(sentence, "    ")]
    return "\n".join(lines)


def round_text(row: RoundRow, now: float) -> str:
    """One round: what it was, what it cost, phase by phase, and why it ended so."""
    lines = rounds_text([row], now).splitlines()
    lines += _wrapped(f"engines: {', '.join(row.engines) or '-'}")
    phases = {phase.value: row.times_ms[phase.value] for phase in Phase if phase.value in row.times_ms}
    if row.links:
        lines += ["", _table(_LINK_COLUMNS, [_link(link) for link in row.links])]
        lines += [line for link in row.links for line in _slow(link)]
    most, began = max(sum(phases.values()), 1e-9), 0.0
    lines.append("")
    for name, ms in phases.items():
        before, length = (round(BAR * part / most) for part in (began, ms))
        lines.append(f"{name:<12}{ms:>10.1f} ms  {' ' * before}{'█' * max(1, length)}")
        began += ms
    others = {name: ms for name, ms in row.times_ms.items() if name not in phases}
    lines += ["", *_wrapped(", ".join(f"{name} {ms:.1f} ms" for name, ms in others.items()))] if others else []
    return "\n".join(lines)


_ENGINE_COLUMNS: Final = (
    "ENGINE", "ROLE", "MODE", "STATE", "SINCE", "VERSION", "BESIDE", "RANKS", "PAUSED", "FAULT",
)  # fmt: skip
_ROUND_COLUMNS: Final = (
    "ROUND", "KIND", "STEP", "TRY", "OUTCOME", "ENGINES", "BYTES", "GB/S", "PAUSE", "STALL", "SWITCH", "VERIFY",
    "TOTAL", "AGO",
)  # fmt: skip
_SPARE_OF_ROUNDS: Final = ("VERIFY", "PAUSE", "TRY")
"""What a table of rounds that is too wide does without, and ``rounds show`` has."""
_LINK_COLUMNS: Final = ("LINK", "BY", "EDGES", "BYTES", "GB/S", "SLOW")

_LEFT_OUT: Final = {
    "unwritten": "stay as its start left them",
    "unneeded": "are in its checkpoint only",
    "unprobed": "are written, and whether they are read is not known",
}


def _link(link: LinkView) -> tuple[str, ...]:
    rate, slow = (f"{link.gb_per_s:.2f}" if link.gb_per_s else "-"), (str(link.slow_edges) if link.slow_edges else "-")
    return (link.link, ",".join(link.ways) or "-", str(link.edges), _bytes(link.bytes), rate, slow)


def _slow(link: LinkView) -> list[str]:
    return [
        line
        for slow in link.slow
        for line in _wrapped(
            f"slow: {slow.edge} {slow.gb_per_s:.2f} GB/s of {slow.link_gb_per_s:.2f}"
            + (f" ({slow.by})" if slow.by else ""),
            "    ",
        )
    ]


def _engine(engine: EngineView, now: float) -> tuple[str, ...]:
    ranks = f"{engine.ranks_connected}/{engine.ranks_expected or '?'}"
    paused = {None: "?", True: "yes", False: "no"}[engine.paused]
    state = f"{engine.state} (TORN)" if engine.torn and engine.state != "torn" else engine.state
    since = _age(now - engine.since) if engine.since else "-"
    version = "-" if engine.version is None else f"step {engine.version.step}"
    beside = "-" if engine.standby is None else f"step {engine.standby.step}"
    mode = engine.mode or "-"
    return (engine.name, engine.role, mode, state, since, version, beside, ranks, paused, engine.fault)


def _modes(engines: Sequence[EngineView]) -> list[str]:
    """Why engines land as they do, those of one reason together."""
    alike: dict[tuple[str, str], list[str]] = {}
    for engine in engines:
        if engine.mode:
            alike.setdefault((engine.mode, engine.mode_because), []).append(engine.name)
    lines = []
    for (mode, because), names in list(alike.items())[:SHOWN]:
        who = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        why = f": {because}" if because else ""
        lines += _wrapped(f"{who} {'lands' if len(names) == 1 else 'land'} by {mode}{why}")
    return lines


def _note(finding: FindingView) -> list[str]:
    more = f" and {finding.count - len(finding.members)} more" if finding.count > len(finding.members) else ""
    who, where = f"{', '.join(finding.members)}{more}", f"{finding.check}: " if finding.check else ""
    fix = f". Fix: {finding.fix}" if finding.fix else ""
    return _wrapped(f"note of {who}: {where}{finding.what}{fix}")


def _left_out(engine: EngineView) -> list[str]:
    return [
        line
        for entry in engine.left_out
        for line in _wrapped(
            f"{entry.count} tensors of {engine.name} {_LEFT_OUT.get(entry.kind, entry.kind)} ({entry.reason}): "
            f"{', '.join(entry.names[:SHOWN])}{', …' if entry.count > min(SHOWN, len(entry.names)) else ''}"
        )
    ]


def _round(row: RoundRow, now: float) -> tuple[str, ...]:
    wire = f"{row.wire_gb_per_s:.2f}" if row.wire_gb_per_s else "-"
    pause, stall, verify, total = (f"{ms:.0f}" for ms in (row.pause_ms, row.stall_ms, row.verify_ms, row.total_ms))
    switch = f"{row.switch_ms:.1f}" if row.switch_ms else "-"
    kind = "-" if row.kind == "publish" else row.kind
    if row.lenders:
        how = "via" if row.kind == "publish" else "from"
        kind = _cut(f"{how} {','.join(sorted(set(row.lenders.values())))}", 16)
    ago = _age(now - row.unix_time) if row.unix_time else "-"
    names = ",".join(row.engines) or "-"
    engines = names if len(names) <= NAMED else str(len(row.engines))
    who = (row.round, kind, str(row.step), str(row.attempt), row.outcome, engines)
    return (*who, _bytes(row.bytes), wire, pause, stall, switch, verify, total, ago)


def _trainers(trainers: Sequence[TrainerView], now: float) -> str:
    rows = []
    for trainer in trainers[:SHOWN_TRAINERS]:
        staged = "-" if trainer.staged is None else f"step {trainer.staged.step}"
        process = f"{trainer.host}:{trainer.pid}" if trainer.pid else "-"
        since = _age(now - trainer.since) if trainer.since else "-"
        rows.append((f"trainer/{trainer.rank}", trainer.state, staged, process, since))
    more = len(trainers) - SHOWN_TRAINERS
    return _table(("TRAINER", "STATE", "STAGED", "PROCESS", "SINCE"), rows) + (
        f"\n… and {more} more" if more > 0 else ""
    )


def _committed(version: VersionView | None, now: float) -> str:
    if version is None:
        return "nothing yet"
    age = f", {_age(now - version.unix_time)} ago" if version.unix_time else ""
    digest = f", digest {version.digest[:16]}" if version.digest else ""
    return f"step {version.step} (generation {version.generation}), commit {version.sequence}{age}{digest}"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], spare: tuple[str, ...] = ()) -> str:
    """Columns as wide as their widest cell; numbers to the right; no column of which nothing is known. ``spare``: those
    that go, in this order, as long as the table is too wide."""
    kept = [column for column in range(len(header)) if not rows or any(row[column] not in ("", "-") for row in rows)]
    cells = [tuple(_cut(_plain(row[column]), MAX_CELL) for column in kept) for row in rows]
    header = tuple(header[column] for column in kept)
    widths = [max(len(row[column]) for row in (header, *cells)) for column in range(len(header))]
    if spare and sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        going = header.index(spare[0]) if spare[0] in header else len(header)
        without = [(*row[:going], *row[going + 1 :]) for row in (header, *cells)]
        return _table(without[0], without[1:], spare[1:])
    right = [bool(cells) and all(_numeric(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in (header, *cells):
        padded = (
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        )
        lines.append(_cut("  ".join(padded).rstrip(), WIDTH))
    return "\n".join(lines)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _plain(text: str) -> str:
    """Without control characters: names and errors come from other processes, and a terminal obeys escapes."""
    return "".join(character if character.isprintable() else " " for character in text)


def _numeric(cell: str) -> bool:
    return cell == "-" or cell.partition(" ")[0].replace(".", "", 1).isdigit()


def _bytes(count: int) -> str:
    value, unit = float(count), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.{0 if unit == 0 else 1}f} {_UNITS[unit]}" if count else "-"


def _age(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} d"
