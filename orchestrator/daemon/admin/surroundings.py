"""What agents have found around their processes, those of one finding together."""

from typing import Final

from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.daemon.admin.views import FindingView
from weightsync.orchestrator.protocol.findings import LEVELS, Finding

MAX_SHOWN: Final = 100
"""Findings of one status; what a whole fleet has is one already, so more of them are hosts that each have their own."""

MEMBERS_SHOWN: Final = 8
"""That one finding names."""


def findings(fleet: Fleet) -> tuple[FindingView, ...]:
    """Worst first. What matters between hosts is left out while all members are on one."""
    several = len({agent.hello.host for agent in fleet.agents.values()}) > 1
    told: dict[Finding, list[str]] = {}
    for member, agent in fleet.agents.items():
        for finding in agent.findings:
            if several or not finding.several_hosts:
                told.setdefault(finding, []).append(str(member))
    ranked = sorted(told.items(), key=lambda each: LEVELS.index(each[0].level))
    if len(ranked) > MAX_SHOWN:
        rest = ranked[MAX_SHOWN - 1 :]
        more = Finding(rest[0][0].level, f"{len(rest)} more findings", "python -m weightsync.agents doctor, there")
        ranked[MAX_SHOWN - 1 :] = [(more, list(dict.fromkeys(name for _, names in rest for name in names)))]
    return tuple(_view(finding, names) for finding, names in ranked)


def _view(finding: Finding, names: list[str]) -> FindingView:
    return FindingView(
        level=finding.level,
        check=finding.check,
        what=finding.what,
        fix=finding.fix,
        members=tuple(names[:MEMBERS_SHOWN]),
        count=len(names),
    )
