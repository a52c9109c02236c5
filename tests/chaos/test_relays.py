"""Engines that take each version from another one of its round, over real NIXL, whoever is harmed on the way.

What the engines' steps read is judged when the module's last test is over (``Several.judge``).
"""

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from several import NAMES, SETTINGS, Several, StandIn, cases

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

STILL = 2.0
"""In seconds: a shadow engine's longest time without a step on a busy machine; its switch takes milliseconds."""


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Several]:
    directory = tmp_path_factory.mktemp("several")
    engines = [StandIn(name, directory, mode="copy") for name in NAMES]
    several = Several(directory, engines, {**SETTINGS, "fan_out": "peers"})
    try:
        yield several.open()
        several.judge()
    finally:
        several.close()


def committed(several: Several, step: int) -> dict[str, Any]:
    """The round that brought this step."""
    rows = several.whole.ask("/rounds?last=20")["rounds"]
    (row,) = [row for row in rows if (row["step"], row["outcome"], row["kind"]) == (step, "committed", "publish")]
    return dict(row)


def seed_of(several: Several) -> tuple[str, list[str]]:
    """Which engine the others take from, as in the version that this publishes: the first that was ready; and those."""
    lenders = committed(several, several.publish())["lenders"]
    assert len(set(lenders.values())) == 1, lenders
    return next(iter(lenders.values())), sorted(lenders)


def test_each_version_leaves_the_trainer_once(several: Several) -> None:
    began = time.monotonic()
    for _ in range(2):
        row = committed(several, several.publish())
        (seed,) = set(row["lenders"].values())
        assert {seed, *row["lenders"]} == set(NAMES)
        assert row["bytes"] == 3 * row["trainer_bytes"]
    several.keep_going(NAMES, began, STILL)


@pytest.mark.parametrize(
    "point", cases(["hearing Exposed", "hearing Closed", "hearing Verified"], ["hearing Verified"])
)
def test_one_that_is_killed_before_the_others_have_it_costs_them_nothing(several: Several, point: str) -> None:
    """At the last point it is granted to write and never says that it has ended: once it is back it is known to."""
    seed, others = seed_of(several)
    with several.stopped_at(point) as step:
        several.engines[seed].kill()
        began = time.monotonic()
    several.engines[seed].start()
    several.ended(step)
    several.everywhere()
    several.keep_going(others, began, STILL)


@pytest.mark.parametrize("point", cases(["hearing Closed", "hearing Verified", "after Decided"], []))
def test_a_daemon_that_is_killed_meanwhile_leaves_nobody_behind(several: Several, point: str) -> None:
    several.daemon_killed_at(point, NAMES, STILL)


def test_one_that_ends_for_good_while_it_is_granted_costs_the_others_their_landings(several: Several) -> None:
    """Nothing proves that it has ended. They put other memory in the place of what it could write to, and the trainer
    writes there."""
    for _ in range(5):  # until it is granted before it is missed: the word of its end may be heard first
        seed, others = seed_of(several)
        with several.stopped_at("hearing Verified") as step:
            several.engines[seed].kill()
            began = time.monotonic()
        several.ended(step)
        several.others_serve(seed)
        several.keep_going(others, began, STILL)
        said = several.whole.daemon_log()
        several.engines[seed].start()
        several.everywhere()
        if "is asked for another landing" in said:
            break
    assert all(f"{name}/0 is asked for another landing" in said for name in others)


@pytest.mark.long
def test_one_that_hangs_while_it_is_written_to_is_waited_for_no_longer_than_others(several: Several) -> None:
    with several.stopped_at("hearing Verified") as step:
        several.engines["e2"].signal(signal.SIGSTOP)
        began = time.monotonic()
    several.ended(step)
    several.keep_going(("e0", "e1"), began, STILL)
    several.engines["e2"].signal(signal.SIGCONT)
    several.everywhere()
