"""SIGSTOP and ``kill -9`` of one of two trainer ranks, and a second trainer beside one that is stopped with a grant.

A trainer that fails in a round costs every engine of it: memory that a stopped writer may still write to is never
served. What the engines' steps read is judged at the end of each test (``Several.judge``).
"""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import process
from several import NAMES, SETTINGS, Several, StandIn

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

HARMED = str(Path(__file__).with_name("harmed_trainer.py"))


@pytest.fixture
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Several]:
    directory = tmp_path_factory.mktemp("several")
    several = Several(directory, [StandIn(name, directory) for name in NAMES], SETTINGS)
    try:
        yield several
        several.judge()
    finally:
        several.close()


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def torn(several: Several) -> list[str]:
    return [name for name in NAMES if several.whole.engine(name)["torn"]]


@pytest.mark.parametrize("point", [pytest.param("after RoundBegan", marks=pytest.mark.long), "hearing Exposed"])
def test_a_rank_that_is_stopped_and_goes_on(several: Several, point: str) -> None:
    """It is granted before it is missed, so that engines wait for it; they are repaired without anybody's word."""
    several.open(world=2)
    with several.stopped_at(point) as step:
        several.trainer.ranks[1].kill(signal.SIGSTOP)
    several.whole.until(lambda: torn(several) == list(NAMES), "all to be torn", 20)
    several.trainer.ranks[1].kill(signal.SIGCONT)
    several.ended(step)
    several.everywhere()


@pytest.mark.long
def test_a_rank_that_is_killed_leaves_engines_paused_until_the_next_start(several: Several) -> None:
    several.open(world=2)
    several.trainer.stop()
    several.start_trainer(2, script=HARMED, env={"WEIGHTSYNC_TEST_HARM": "1 SIGKILL"})
    several.begin()
    several.whole.until(lambda: torn(several) == list(NAMES), "all to be torn", 30)
    for rank in several.trainer.ranks:
        rank.kill()
    several.start_trainer(2)
    several.publish()


async def test_a_second_trainer_elsewhere_waits_for_the_end_of_the_first(several: Several) -> None:
    """The first is stopped between its grant and its first write. Nothing proves it dead but somebody who looks."""
    several.open()
    several.trainer.stop()
    several.start_trainer(script=HARMED, env={"WEIGHTSYNC_TEST_HARM": "0 SIGSTOP"})
    first, child = several.trainer, several.trainer.ranks[0].child
    assert child is not None
    several.begin()
    several.whole.until(lambda: stopped(child.pid), "the first to be stopped")
    several.whole.until(lambda: torn(several) == list(NAMES), "all to be torn", 30)
    several.start_trainer(script=HARMED, env={"WEIGHTSYNC_TEST_HOST": "elsewhere"})
    step = several.begin()
    several.whole.until(
        lambda: "is not proved dead" in several.whole.status()["state"], "the first to be waited for", 30
    )
    assert several.whole.status()["round"] is None
    served = {name: len(several.engines[name].steps()) for name in NAMES}
    first.ranks[0].kill(signal.SIGCONT)  # it writes what it was granted, into memory that nobody serves
    first.ranks[0].kill()
    assert {name: len(several.engines[name].steps()) for name in NAMES} == served
    said = await process("declare-dead", "trainer/0", "--config", several.whole.config)
    assert said.code == 0, said
    several.ended(step)
    several.everywhere()
