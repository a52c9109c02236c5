"""What an agent says of its surroundings: what was found there, and the daemon's clock beside this host's."""

import email.utils
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from weightsync.agents.link.beside import beside
from weightsync.orchestrator.protocol.findings import Finding, Level, in_short
from weightsync.orchestrator.protocol.messages import Examined, TransportSettings
from weightsync.orchestrator.protocol.names import Member

log = logging.getLogger(__name__)

Look = Callable[[TransportSettings], Iterable[Finding]]
"""Looks at this process's surroundings, for that transport; on a thread of its own."""

_LOGGED: Final[dict[Level, int]] = {
    "error": logging.ERROR, "warning": logging.WARNING, "note": logging.INFO, "ok": logging.DEBUG,
}  # fmt: skip

SKEW_SECONDS: Final = 3.0
"""A date tells whole seconds, and an answer takes a while."""


def clock(date: str, now: float) -> Iterator[Finding]:
    """``date``: as its answer's header says, ``now``: by ours, in unix time."""
    try:
        skew = email.utils.parsedate_to_datetime(date).timestamp() + 0.5 - now
    except (ValueError, TypeError, OverflowError):
        return
    if abs(skew) > SKEW_SECONDS:
        what = f"the daemon's clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this host's"
        yield Finding("warning", what, "synchronise both hosts' clocks (chrony, NTP)", "clock")


async def examination(
    member: Member, look: Look, transport: TransportSettings, dated: tuple[str, float]
) -> Examined | None:
    """What to say, which is logged here, too; None: nothing is wrong. ``dated``: see ``clock``."""
    found = in_short([*clock(*dated), *await beside(lambda: list(look(transport)))])
    for finding in found:
        log.log(_LOGGED[finding.level], "%s: %s", member, finding.text)
    return Examined(findings=found) if found else None
