"""What a check has found, as ``doctor``, ``config check`` and agents tell it: level, evidence and fix."""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Literal

import msgspec
from weightsync.orchestrator.protocol.fields import Reason, Spoken
from weightsync.orchestrator.protocol.limits import (
    MAX_FINDING_CHARS,
    MAX_FINDING_CHECK_CHARS,
    MAX_FINDING_FIX_CHARS,
    MAX_FINDINGS,
)
from weightsync.orchestrator.protocol.text import clean

FINDINGS_SCHEMA: Final = 1
"""Raised when a field changes its meaning; new fields do not raise it."""

WIDTH: Final = 100
"""Columns of a terminal that people have."""

MAX_CHECK_CHARS: Final = 24
"""Of the table's column of names; ``--json`` has all of it."""

Level = Literal["error", "warning", "note", "ok"]

LEVELS: Final[tuple[Level, ...]] = ("error", "warning", "note", "ok")
"""Worst first. error: it cannot work; warning: it works slowly, unsafely or by luck; note: worth knowing."""


class Finding(Spoken, frozen=True):
    """One thing that was looked at. ``what``: the evidence; ``fix``: what to do, where something is wrong.

    ``check``: what was looked at: a key of the configuration, a variable, a device, an engine. ``several_hosts``: it
    matters only where members are on several hosts.
    """

    level: Level
    what: Reason
    fix: Reason = ""
    check: Reason = ""
    several_hosts: bool = False
    spoken = ("what", "fix", "check")

    @property
    def text(self) -> str:
        """All of it but the level, on one line."""
        where = f"{self.check}: " if self.check else ""
        return clean(f"{where}{self.what}" + (f". Fix: {self.fix}" if self.fix else ""))


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of a ``doctor --json``."""

    place: str
    findings: tuple[Finding, ...]
    schema: int = FINDINGS_SCHEMA


def examined(check: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What ``look`` finds. A check that breaks is a finding itself: the others are wanted all the more."""
    found: list[Finding] = []
    try:
        found.extend(look())
    except Exception as error:  # whatever this machine has that the check did not think of
        found.append(broke(check, error))
    return found


def broke(check: str, error: Exception) -> Finding:
    """The finding that a check could not be made."""
    what = f"could not be looked at: {type(error).__name__}: {error}"
    return Finding("warning", clean(what), "look at it by hand, and report this", check)


def in_short(found: Iterable[Finding]) -> tuple[Finding, ...]:
    """Those that an agent tells: what is more than ``ok``, worst first, each cut, at most MAX_FINDINGS."""
    ranked = sorted((each for each in found if each.level != "ok"), key=lambda each: LEVELS.index(each.level))
    if len(ranked) > MAX_FINDINGS:
        more = len(ranked) - MAX_FINDINGS + 1
        rest = Finding(ranked[MAX_FINDINGS - 1].level, f"{more} more findings", "python -m weightsync.agents doctor")
        ranked[MAX_FINDINGS - 1 :] = [rest]
    return tuple(
        msgspec.structs.replace(
            each,
            what=clean(each.what, MAX_FINDING_CHARS),
            fix=clean(each.fix, MAX_FINDING_FIX_CHARS),
            check=clean(each.check, MAX_FINDING_CHECK_CHARS),
        )
        for each in ranked
    )


def exit_code(findings: Iterable[Finding]) -> int:
    """2 with an error, 1 with a warning, else 0; as ``status --check`` tells a monitor."""
    levels = {finding.level for finding in findings}
    return 2 if "error" in levels else 1 if "warning" in levels else 0


def findings_text(findings: Sequence[Finding]) -> str:
    """A table, worst first, of lines of at most WIDTH columns; the fix stands below what it mends."""
    ranked = sorted(findings, key=lambda finding: LEVELS.index(finding.level))
    column = max((min(len(finding.check), MAX_CHECK_CHARS) for finding in findings), default=0)
    lines = []
    for finding in ranked:
        head = f"{finding.level:<9}{clean(finding.check, MAX_CHECK_CHARS):<{column}}  "
        room = " " * len(head)
        lines += textwrap.wrap(clean(finding.what), WIDTH, initial_indent=head, subsequent_indent=room)
        if finding.fix:
            lines += textwrap.wrap(clean(finding.fix), WIDTH, initial_indent=f"{room}→ ", subsequent_indent=f"{room}  ")
    return "\n".join([*lines, "", _sum(findings)])


def _sum(findings: Sequence[Finding]) -> str:
    counts = {level: sum(finding.level == level for finding in findings) for level in LEVELS}
    named = [f"{count} {level}{'s' * (count > 1)}" for level, count in counts.items() if count and level != "ok"]
    return ", ".join([*named, f"{counts['ok']} ok"])
