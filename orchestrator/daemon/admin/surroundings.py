"""What agents have found around their processes, and of which release these are; those of one finding together."""

from collections.abc import Iterator
from typing import Final

from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.daemon.admin.views import FindingView
from weightsync.orchestrator.protocol.findings import LEVELS, Finding
from weightsync.orchestrator.protocol.limits import MAX_FINDING_CHARS
from weightsync.orchestrator.protocol.messages import Hello
from weightsync.orchestrator.protocol.text import clean
from weightsync.orchestrator.release import release

MAX_SHOWN: Final = 100
"""Findings of one status; what a whole fleet has is one already, so more of them are hosts that each have their own."""

MEMBERS_SHOWN: Final = 8
"""That one finding names."""


def findings(fleet: Fleet) -> tuple[FindingView, ...]:
    """Worst first. What matters between hosts is left out while all members are on one."""
    several = len({agent.hello.host for agent in fleet.agents.values()}) > 1
    told: dict[Finding, list[str]] = {}
    for member, agent in fleet.agents.items():
        for finding in (*agent.findings, *_release(agent.hello)):
            if several or not finding.several_hosts:
                told.setdefault(finding, []).append(str(member))
    ranked = sorted(told.items(), key=lambda each: LEVELS.index(each[0].level))
    if len(ranked) > MAX_SHOWN:
        rest = ranked[MAX_SHOWN - 1 :]
        more = Finding(rest[0][0].level, f"{len(rest)} more findings", "python -m weightsync.agents doctor, there")
        ranked[MAX_SHOWN - 1 :] = [(more, list(dict.fromkeys(name for _, names in rest for name in names)))]
    return tuple(_view(finding, names) for finding, names in ranked)


def _release(hello: Hello) -> Iterator[Finding]:
    """An agent of another release than the daemon's, whose messages are understood all the same."""
    if hello.release and hello.release != release():
        what = f"runs release {clean(hello.release, MAX_FINDING_CHARS // 2)}, and the daemon {release()}"
        yield Finding("note", what, "install the same release on both sides", "release")


def _view(finding: Finding, names: list[str]) -> FindingView:
    return FindingView(
        level=finding.level,
        check=finding.check,
        what=finding.what,
        fix=finding.fix,
        members=tuple(names[:MEMBERS_SHOWN]),
        count=len(names),
    )
