"""Harm to a fleet of which two engines land versions beside their weights and one lands them live.

The shadow engines serve on, whatever happens to the trainer, the daemon or another engine before the decision, and are
never torn. What the engines' steps read is judged when the module's last test is over (``Several.judge``).
"""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from several import NAMES, PHASES, SETTINGS, Several, StandIn, cases

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

SHADOW, LIVE = NAMES[:2], NAMES[2]
STILL = 2.0
"""In seconds: a shadow engine's longest time without a step on a busy machine; its switch takes milliseconds."""
HARMED = str(Path(__file__).with_name("harmed_trainer.py"))
MODES = dict.fromkeys(SHADOW, "copy") | {LIVE: "live"}


def fleet_of(directory: Path, settings: dict[str, Any] = SETTINGS) -> Several:
    return Several(directory, [StandIn(name, directory, mode=mode) for name, mode in MODES.items()], settings)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Several]:
    several = fleet_of(tmp_path_factory.mktemp("several"))
    try:
        yield several.open()
        several.judge()
    finally:
        several.close()


def test_an_ordinary_round_of_both_kinds(several: Several) -> None:
    began = time.monotonic()
    for _ in range(3):
        several.publish()
    several.keep_going(SHADOW, began, STILL)


@pytest.mark.parametrize("phase", cases(PHASES, ("MARKING", "WRITING", "VERIFYING", "DECIDING", "SWITCHING")))
def test_a_daemon_that_is_killed_and_started_again_stops_no_shadow_engine(several: Several, phase: str) -> None:
    several.daemon_killed_at(PHASES[phase], SHADOW, STILL)


@pytest.mark.parametrize("phase", cases(PHASES, ("WRITING", "VERIFYING")))
def test_a_shadow_engine_that_hangs_costs_the_other_nothing(several: Several, phase: str) -> None:
    with several.stopped_at(PHASES[phase]) as step:
        several.engines["e0"].signal(signal.SIGSTOP)
        began = time.monotonic()
    several.ended(step)
    several.others_serve("e0")
    several.keep_going(["e1"], began, STILL)
    several.engines["e0"].signal(signal.SIGCONT)
    several.everywhere()


@pytest.mark.parametrize("phase", cases(PHASES, ("EXPOSING", "SWITCHING")))
def test_a_shadow_engine_that_is_killed_costs_the_other_nothing(several: Several, phase: str) -> None:
    with several.stopped_at(PHASES[phase]) as step:
        several.engines["e0"].kill()
        began = time.monotonic()
    several.ended(step)
    several.others_serve("e0")
    several.keep_going(["e1"], began, STILL)
    several.engines["e0"].start()
    several.everywhere()


def test_engines_that_change_at_once_stand_still_for_the_switch_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = {**SETTINGS, "commit": {**SETTINGS["commit"], "together": True}}
    several = fleet_of(tmp_path_factory.mktemp("together"), settings)
    try:
        several.open()
        began = time.monotonic()
        for _ in range(3):
            several.publish()
        several.keep_going(SHADOW, began, STILL)
        several.judge()
    finally:
        several.close()


def test_what_one_engine_has_verified_is_not_sent_again_for_the_other(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Both are needed for a commit, and one is killed when the other has all of the version."""
    directory = tmp_path_factory.mktemp("kept")
    several = Several(directory, [StandIn(name, directory, mode="copy") for name in SHADOW])
    try:
        several.open()
        whole = several.whole.ask("/rounds?last=1")["rounds"][-1]["bytes"]
        began = time.monotonic()
        with several.stopped_at(PHASES["WRITING"]) as step:
            several.engines["e0"].kill()
        several.whole.until(lambda: "round given up" in several.whole.daemon_log(), "its end", 30)
        several.engines["e0"].start()
        several.ended(step)
        several.everywhere()
        first, second = several.whole.ask("/rounds?last=2")["rounds"]
        assert (first["step"], first["outcome"], first["bytes"]) == (step, "failed", whole)
        assert (second["step"], second["outcome"], second["bytes"]) == (step, "committed", whole // 2)
        several.keep_going(["e1"], began, STILL)
        several.judge()
    finally:
        several.close()


def test_a_trainer_that_is_killed_in_mid_write_changes_nothing_that_is_served(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """One of its two ranks writes what it was granted, the other is killed at its grant."""
    several = fleet_of(tmp_path_factory.mktemp("killed"))
    try:
        several.open(world=2)
        several.trainer.stop()
        several.start_trainer(2, script=HARMED, env={"WEIGHTSYNC_TEST_HARM": "1 SIGKILL"})
        began = time.monotonic()
        several.begin()
        several.whole.until(lambda: several.whole.engine(LIVE)["torn"], f"{LIVE} to be torn", 30)
        for rank in several.trainer.ranks:
            rank.kill()
        views = {name: several.whole.engine(name) for name in SHADOW}
        assert [(view["torn"], view["paused"], view["version"]["step"]) for view in views.values()] == [
            (False, False, several.committed[-1])
        ] * 2
        several.start_trainer(2)
        several.publish()
        several.keep_going(SHADOW, began, STILL)
        several.judge()
    finally:
        several.close()


@pytest.mark.long
def test_a_trainer_that_wakes_up_after_another_ones_commit_changes_nothing_that_is_served(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """It was stopped between its grant and its first write, and by its machine's memory it reaches what it could reach.
    The other one says that it is elsewhere, so that nothing proves the first dead; nobody declares it."""
    directory = tmp_path_factory.mktemp("wakes")
    several = Several(directory, [StandIn(name, directory, mode="copy") for name in NAMES])
    try:
        several.open()
        several.trainer.stop()
        several.start_trainer(script=HARMED, env={"WEIGHTSYNC_TEST_HARM": "0 SIGSTOP"})
        first = several.trainer
        began = time.monotonic()
        several.begin()
        several.whole.until(lambda: "another landing" in several.whole.daemon_log(), "spares to be asked for", 30)
        several.start_trainer(script=HARMED, env={"WEIGHTSYNC_TEST_HOST": "elsewhere"})
        several.publish()
        first.ranks[0].kill(signal.SIGCONT)
        several.publish()
        several.keep_going(NAMES, began, STILL)
        several.judge()
    finally:
        several.close()
