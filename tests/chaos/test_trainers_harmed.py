"""SIGSTOP and ``kill -9`` of one of two trainer ranks in each phase, and a second trainer beside one that is stopped.

A trainer that fails with a grant costs every engine of the round: memory that a stopped writer may still write to is
never served. What the engines' steps read is judged when the module's last test is over (``Several.judge``).
"""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import process
from several import NAMES, PHASES, Several, StandIn, cases

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

HARMED = str(Path(__file__).with_name("harmed_trainer.py"))
RESULTS: dict[str, set[str]] = {
    "PAUSING": {"resumed"},
    "QUIESCING": {"resumed"},
    "MARKING": {"resumed", "torn"},  # the last EXPOSED may be heard before the end of its connection
    "EXPOSING": {"resumed", "torn"},
    "WRITING": {"torn", "committed"},  # the CLOSED that is heard may be the last of its own
    "VERIFYING": {"committed"},
    "DECIDING": {"committed"},
    "SWITCHING": {"committed"},
    "RECORDING": {"committed"},
}
"""What becomes of a round in which a rank is killed. One that is stopped is missed later, and granted before."""


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Several]:
    directory = tmp_path_factory.mktemp("several")
    several = Several(directory, [StandIn(name, directory) for name in NAMES])
    try:
        yield several.open(world=2)
        several.judge()
    finally:
        several.close()


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def torn(several: Several) -> list[str]:
    return [name for name in NAMES if several.whole.engine(name)["torn"]]


def restart_trainer(several: Several, world: int, **options: str | dict[str, str]) -> None:
    """Kill what runs, and start the next one."""
    for rank in several.trainer.ranks:
        rank.kill()
    several.start_trainer(world, **options)


def result(several: Several, step: int) -> str:
    """How the round for ``step`` has ended for all engines; empty while it has not."""
    status = several.whole.status()
    engines = [engine for engine in status["engines"] if engine["name"] in NAMES]
    if status["round"] is not None:
        return ""
    if all(engine["torn"] for engine in engines):
        return "torn"
    if not all(engine["state"] == "serving" and not engine["paused"] for engine in engines):
        return ""
    return "committed" if status["committed"]["step"] == step else "resumed"


@pytest.mark.parametrize("phase", cases(PHASES, ("EXPOSING", "VERIFYING")))
def test_a_rank_that_is_stopped_and_goes_on(several: Several, phase: str) -> None:
    """Engines wait for one that was granted, and are repaired without anybody's word; else nobody waits for it."""
    with several.stopped_at(PHASES[phase]) as step:
        several.trainer.ranks[1].kill(signal.SIGSTOP)
        began = time.monotonic()
    ended = several.whole.until(lambda: result(several, step), "the round to end", 20)
    assert ended in {"torn" if way == "resumed" else way for way in RESULTS[phase]}
    if ended == "committed":
        several.keep_going(NAMES, began)
    several.trainer.ranks[1].kill(signal.SIGCONT)
    several.ended(step)
    several.everywhere()


@pytest.mark.parametrize("phase", cases(PHASES, ("QUIESCING",)))
def test_a_rank_that_is_killed(several: Several, phase: str) -> None:
    """Without a grant to it engines go on with what they have; the next start of the trainer goes on in any case."""
    with several.stopped_at(PHASES[phase]) as step:
        dying = several.trainer.ranks[1]
        dying.kill()
        assert dying.child is not None
        dying.child.wait(10)
        began = time.monotonic()
    ended = several.whole.until(lambda: result(several, step), "the round to end", 20)
    assert ended in RESULTS[phase]
    if ended == "committed":
        several.committed.append(step)
    if ended != "torn":
        several.everywhere()
        several.keep_going(NAMES, began)
    restart_trainer(several, 2)
    several.publish()


@pytest.mark.long
def test_a_rank_that_is_killed_when_it_is_granted_leaves_engines_paused_until_the_next_start(several: Several) -> None:
    """Half of the rows are new, half are old."""
    restart_trainer(several, 2, script=HARMED, env={"WEIGHTSYNC_TEST_HARM": "1 SIGKILL"})
    several.begin()
    several.whole.until(lambda: torn(several) == list(NAMES), "all to be torn", 30)
    restart_trainer(several, 2)
    several.publish()


async def test_a_second_trainer_elsewhere_waits_for_the_end_of_the_first(several: Several) -> None:
    """The first is stopped between its grant and its first write. Nothing proves it dead but somebody who looks."""
    restart_trainer(several, 1, script=HARMED, env={"WEIGHTSYNC_TEST_HARM": "0 SIGSTOP"})
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
