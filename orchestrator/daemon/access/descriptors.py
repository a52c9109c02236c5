"""How many descriptors this process may have, and how many the fleet needs: one for each connection."""

import resource
from collections.abc import Iterable
from typing import Final

from weightsync.orchestrator.settings.problems import Problem
from weightsync.orchestrator.settings.sections import EngineSection
from weightsync.orchestrator.settings.settings import Settings

RESERVE: Final = 128
"""For all that is no connection: the journal, scans of the run directory, the log, the planner, a command's process."""

PER_SERVER: Final = 3
"""Of one API server of an engine: the agent of one rank at least, a call that lasts for a round, a probe beside it."""

MOST: Final = 1 << 20
"""Where there is no hard limit: the kernel's own, by default (fs.nr_open)."""


def limit() -> int:
    """The soft limit (RLIMIT_NOFILE), at which the kernel refuses."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else soft


def reachable() -> int:
    """What ``raise_limit`` comes to."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return MOST if hard == resource.RLIM_INFINITY else hard


def raise_limit() -> int:
    """Raise the soft limit to the hard one, which needs no privilege; what it is now.

    The soft one is 1024 nearly everywhere, for the sake of programs that use select(2), which we do not.
    """
    if limit() < reachable():
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (reachable(), hard))
    return limit()


def needed(engines: Iterable[EngineSection], trainer_ranks: int | None, admitted: int = 0) -> int:
    """At the least, for these engines and ranks, and ``admitted`` engines of one server that may come by themselves."""
    servers = sum(len(engine.servers) for engine in engines) + admitted
    return RESERVE + (trainer_ranks or 0) + PER_SERVER * servers


def too_few(allowed: int, settings: Settings) -> Problem | None:
    """What to say where ``allowed`` descriptors are not enough for the fleet of ``settings``."""
    admit, ranks = settings.engines_admit, settings.trainer.world
    admitted = 0 if admit is None else admit.at_most
    wanted = needed(settings.engines, ranks, admitted)
    if allowed >= wanted:
        return None
    coming = f" (and {admitted} that engines_admit.at_most lets come)" if admitted else ""
    fleet = f"{len(settings.engines)} engines{coming} and {ranks or 'some'} trainer ranks"
    problem = f"this process may open {allowed} files, and {fleet} need {wanted} at the least"
    return Problem("", "", problem, f"LimitNOFILE={max(2 * wanted, 65_536)} in the systemd unit, or ulimit -Hn")
