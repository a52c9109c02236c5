"""The judge of the soak: what grows is found, and what warms up or wavers is not."""

import os
import threading

import pytest
from measure import WARM_ROUNDS, Growth, Measured, Sample, growth, held_by
from soak import BOUNDS, JOURNAL_MB, excesses, judged


def life(values, what="fds", every=10):
    return [Sample("daemon", 7, WARM_ROUNDS + every * n, {what: value}) for n, value in enumerate(values)]


def warmed(values, **more):
    return [Sample("daemon", 7, 0, {}), *life(values, **more)]


def test_what_grows_in_every_round_is_found() -> None:
    found = growth(warmed(range(16)), "fds")
    assert found == Growth("daemon", 7, "fds", by=13.5 - 5.5, rounds=80.0)


def test_what_warms_up_is_none() -> None:
    early = [Sample("daemon", 7, n, {"fds": 50.0 * n}) for n in range(WARM_ROUNDS)]
    found = growth([*early, *life([30, 40, 50, 50, 50, 50, 50, 50])], "fds")
    assert found is not None
    assert found.by == 0


def test_one_odd_sample_is_none() -> None:
    found = growth(warmed([5] * 15 + [90]), "fds")
    assert found is not None
    assert found.by == 0


def test_a_short_life_says_nothing() -> None:
    assert growth(warmed([1, 2, 3]), "fds") is None
    assert growth(warmed([1, 2, 3, 4]), "rss_mb") is None


def test_each_life_is_its_own() -> None:
    first = [Sample("e0", 1, n * 10, {"fds": 9.0}) for n in range(10)]
    second = [Sample("e0", 2, 100 + n * 10, {"fds": 20.0}) for n in range(10)]
    assert [(g.pid, g.by) for g in Measured(samples=[*first, *second]).growths()] == [(1, 0), (2, 0)]


@pytest.mark.parametrize("what", BOUNDS)
def test_more_than_its_bound_is_said(what: str) -> None:
    """By twice the bound and one, in 1,000 rounds."""
    grown = Growth("e0", 7, what, by=2 * BOUNDS[what] + 1, rounds=1000.0)
    (said,) = excesses([grown], 0.0)
    assert f"{what} of e0 (pid 7) grew by" in said
    assert excesses([Growth("e0", 7, what, by=BOUNDS[what], rounds=1000.0)], JOURNAL_MB) == []


def test_a_rate_is_by_a_thousand_rounds() -> None:
    assert judged(Growth("e0", 7, "rss_mb", by=6.0, rounds=2000.0)) == 3.0
    assert judged(Growth("e0", 7, "rss_mb", by=6.0, rounds=50.0)) == 6.0
    assert judged(Growth("e0", 7, "fds", by=6.0, rounds=2000.0)) == 6.0


def test_a_journal_that_is_too_large_is_said() -> None:
    assert excesses([], JOURNAL_MB + 1) == [f"the journal has {JOURNAL_MB + 1:.1f} MB, more than {JOURNAL_MB:g}"]


def test_a_process_is_seen_as_the_system_sees_it() -> None:
    before = held_by(os.getpid())
    ends = threading.Event()
    thread = threading.Thread(target=ends.wait)
    thread.start()
    left, right = os.pipe()
    after = held_by(os.getpid())
    ends.set()
    thread.join()
    os.close(left)
    os.close(right)
    assert (after["threads"], after["fds"]) == (before["threads"] + 1, before["fds"] + 2)
    assert before["rss_mb"] > 1
