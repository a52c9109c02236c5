"""Engines that are killed and come back while no trainer is there take the version from one that serves it, over real
NIXL, whoever is harmed on the way.

What the engines' steps read is judged when the module's last test is over (``Several.judge``).
"""

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from several import NAMES, SETTINGS, Several, StandIn

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


@pytest.fixture(scope="module", params=["copy", pytest.param("live", marks=pytest.mark.long)])
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Several]:
    """All serve a version, and the trainer that wrote it is dead."""
    directory = tmp_path_factory.mktemp("several")
    engines = [StandIn(name, directory, mode=request.param) for name in NAMES]
    several = Several(directory, engines, {**SETTINGS, "fan_out": "auto"})
    try:
        several.open()
        for rank in several.trainer.ranks:
            rank.kill(signal.SIGKILL)
        yield several
        several.judge()
    finally:
        several.close()


def last_round(several: Several) -> dict[str, Any]:
    return dict(several.whole.ask("/rounds?last=1")["rounds"][0])


def test_one_that_returns_is_fed_by_another_that_serves_on(several: Several) -> None:
    began = time.monotonic()
    several.engines["e2"].kill()
    several.engines["e2"].start()
    several.everywhere()
    row = last_round(several)
    assert (row["outcome"], row["kind"], row["lenders"]) == ("committed", "catch-up", {"e2": "e0"})
    several.keep_going(("e0", "e1"), began)


@pytest.mark.long
@pytest.mark.parametrize("point", ["after LiveDirty", "hearing Closed", "hearing Verified"])
def test_a_lender_that_is_killed_harms_nobody(several: Several, point: str) -> None:
    """Once it is back it is known to write no more, and both are fed."""
    several.signal_daemon_at(point, "SIGSTOP")
    several.engines["e2"].kill()
    several.engines["e2"].start()
    several.wait_daemons_stop()
    began = time.monotonic()
    several.engines["e0"].kill()
    several.continue_daemon()
    several.engines["e0"].start()
    several.everywhere()
    assert last_round(several)["outcome"] == "committed"
    several.keep_going(("e1",), began)


@pytest.mark.long
@pytest.mark.parametrize("point", ["after LiveDirty", "hearing Closed", "after Decided"])
def test_the_next_daemon_goes_on_lending(several: Several, point: str) -> None:
    several.signal_daemon_at(point, "SIGKILL")
    several.engines["e1"].kill()
    several.engines["e1"].start()
    several.wait_daemons_death()
    several.start_daemon()
    several.everywhere()
