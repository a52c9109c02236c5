"""SIGSTOP and ``kill -9`` of the daemon in each phase of a round of three engines, at which nobody else is harmed.

What the engines' steps read is judged when the module's last test is over (``Several.judge``).
"""

import time
from collections.abc import Iterator

import pytest
from several import NAMES, ORDINARY, PHASES, Several, StandIn, cases

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(60)]

STOPPED = 2.5
"""In seconds: longer than heartbeats may be missed, so that all connections are lost meanwhile."""
RECOVERY = 3.0
"""From the moment that a daemon listens again until its engines serve, in seconds."""


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Several]:
    directory = tmp_path_factory.mktemp("several")
    several = Several(directory, [StandIn(name, directory) for name in NAMES])
    try:
        yield several.open()
        several.judge()
    finally:
        several.close()


@pytest.mark.parametrize("phase", cases(PHASES, ("WRITING",)))
def test_a_daemon_that_is_stopped_goes_on_with_its_round(several: Several, phase: str) -> None:
    with several.stopped_at(PHASES[phase]) as step:
        began = time.monotonic()
        several.whole.until(lambda: time.monotonic() - began > STOPPED, "the stop to last")
    several.ended(step)
    several.everywhere()
    several.keep_going(NAMES, began, STOPPED + RECOVERY + ORDINARY)


@pytest.mark.parametrize("phase", cases(PHASES, ("QUIESCING", "DECIDING")))
def test_a_daemon_that_is_killed_costs_its_restart(several: Several, phase: str) -> None:
    several.signal_daemon_at(PHASES[phase], "SIGKILL")
    step = several.begin()
    several.wait_daemons_death()
    died = time.monotonic()
    several.start_daemon()
    absent = time.monotonic() - died
    several.ended(step)
    several.everywhere()
    several.keep_going(NAMES, died, absent + RECOVERY + ORDINARY)
