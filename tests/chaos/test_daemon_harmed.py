"""SIGSTOP and restarts of the daemon in each phase of a round of three engines, at which nobody else is harmed.

What the engines' steps read is judged when the module's last test is over (``Several.judge``).
"""

import signal
import time
from collections.abc import Iterator

import pytest
from several import NAMES, ORDINARY, PHASES, Several, StandIn, cases

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(60)]

STOPPED = 2.5
"""In seconds: longer than heartbeats may be missed, so that all connections are lost meanwhile."""
RECOVERY = 3.0
"""From the moment that a daemon listens again until its engines serve, in seconds."""
TOLD = (signal.SIGTERM,)
RESTARTS = {
    f"{' and '.join(number.name for number in how)} in {phase}": (how, phase)
    for phase in PHASES
    for how in ((signal.SIGKILL,), TOLD, (signal.SIGTERM, signal.SIGINT))
}


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


@pytest.mark.parametrize(
    "case", cases(RESTARTS, ("SIGKILL in QUIESCING", "SIGTERM and SIGINT in WRITING", "SIGTERM in DECIDING"))
)
def test_a_restart_in_a_round_costs_its_engines_less_than_three_seconds(several: Several, case: str) -> None:
    """Beside the time that no daemon listens: the process itself starts in 0.7 s (``make bench-restart``).

    Told once to stop, the daemon ends its round first, so that its absence costs nothing; told twice it ends at once.
    """
    how, phase = RESTARTS[case]
    restart = several.restart_daemon_at(PHASES[phase], how)
    several.ended(restart.step)
    several.everywhere()
    several.keep_going(NAMES, restart.began, RECOVERY + (0.0 if how == TOLD else restart.absence))
