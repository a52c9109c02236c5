"""SIGSTOP and ``kill -9`` of one engine of three, in each phase of a round: the others go on, and it comes back.

What the engines' steps read is judged when the module's last test is over (``Several.judge``).
"""

import signal
import time
from collections.abc import Iterator

import pytest
from several import NAMES, PHASES, Several, StandIn, cases

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(60)]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Several]:
    directory = tmp_path_factory.mktemp("several")
    several = Several(directory, [StandIn(name, directory) for name in NAMES])
    try:
        yield several.open()
        several.judge()
    finally:
        several.close()


@pytest.mark.parametrize("phase", cases(PHASES, ("PAUSING", "EXPOSING", "SWITCHING")))
def test_one_that_is_stopped_costs_the_others_the_patience(several: Several, phase: str) -> None:
    with several.stopped_at(PHASES[phase]) as step:
        several.engines["e0"].signal(signal.SIGSTOP)
        began = time.monotonic()
    several.ended(step)
    several.others_serve("e0")
    several.keep_going(("e1", "e2"), began)
    several.engines["e0"].signal(signal.SIGCONT)
    several.everywhere()


@pytest.mark.parametrize("phase", cases(PHASES, ("WRITING", "DECIDING")))
def test_one_that_is_killed_costs_the_others_the_patience(several: Several, phase: str) -> None:
    with several.stopped_at(PHASES[phase]) as step:
        several.engines["e0"].kill()
        began = time.monotonic()
    several.ended(step)
    several.others_serve("e0")
    several.keep_going(("e1", "e2"), began)
    several.engines["e0"].start()
    several.everywhere()
