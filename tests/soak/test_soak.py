"""A hundred rounds of the soak; ``make soak`` has two thousand, and fifty with a real vLLM."""

from pathlib import Path

import pytest
from soak import Soak, excesses

ROUNDS, RESTARTS = 100, 4


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_a_hundred_rounds_with_restarts_leave_nothing_behind(tmp_path: Path) -> None:
    soak = Soak(tmp_path, ROUNDS, RESTARTS, seed=1)
    try:
        soak.run()
    finally:
        soak.close()
    growths = soak.measured.growths()
    assert {g.process for g in growths} >= {"daemon", "trainer", "e0"}
    assert {g.what for g in growths} >= {"rss_mb", "fds", "threads", "registrations", "objects"}
    assert excesses(growths, soak.journal_mb) == []
