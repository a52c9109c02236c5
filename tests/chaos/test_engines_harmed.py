"""SIGSTOP and ``kill -9`` of one engine of three, in each phase of a round: the others go on, and it comes back.

What the engines' steps read is judged when the module's last test is over (``Several.judge``).
"""

import signal
import time
from collections.abc import Iterator

import pytest
from several import BOUND, NAMES, Several, StandIn

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

PHASES = {
    "PAUSING": "after RoundBegan",
    "QUIESCING": "hearing Quiesced",
    "MARKING": "after LiveDirty",
    "EXPOSING": "hearing Exposed",
    "WRITING": "hearing Closed",
    "VERIFYING": "hearing Verified",
    "DECIDING": "after Decided",
    "SWITCHING": "hearing Left",
    "RECORDING": "after Committed",
}
"""The point of the daemon at which each phase is harmed; see ``pointed_daemon``."""


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Several]:
    directory = tmp_path_factory.mktemp("several")
    several = Several(directory, [StandIn(name, directory) for name in NAMES])
    try:
        yield several.open()
        several.judge()
    finally:
        several.close()


@pytest.mark.parametrize("phase", PHASES)
def test_one_that_is_stopped_costs_the_others_the_patience(several: Several, phase: str) -> None:
    with several.stopped_at(PHASES[phase]) as step:
        several.engines["e0"].signal(signal.SIGSTOP)
        began = time.monotonic()
    several.ended(step)
    several.others_serve("e0")
    assert max(several.engines[name].still(began) for name in ("e1", "e2")) < BOUND
    several.engines["e0"].signal(signal.SIGCONT)
    several.everywhere()


@pytest.mark.parametrize("phase", PHASES)
def test_one_that_is_killed_costs_the_others_the_patience(several: Several, phase: str) -> None:
    with several.stopped_at(PHASES[phase]) as step:
        several.engines["e0"].kill()
        began = time.monotonic()
    several.ended(step)
    several.others_serve("e0")
    assert max(several.engines[name].still(began) for name in ("e1", "e2")) < BOUND
    several.engines["e0"].start()
    several.everywhere()
