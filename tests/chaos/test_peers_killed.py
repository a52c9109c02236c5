"""``kill -9`` of an engine, and of a trainer rank, while idle and in a round.

The witness asks throughout; what it was told is judged when the module's last test is over (``conftest.scene``). An
answer of a restarted engine before its catch-up would be one of its checkpoint, which no version answers.
"""

from pathlib import Path

import pytest
from witness import Scene

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

HARMED_TRAINER = Path(__file__).with_name("harmed_trainer.py")


@pytest.mark.long
def test_an_engine_killed_while_idle_serves_nothing_before_it_has_caught_up(scene: Scene) -> None:
    """From the trainer's slots: nobody publishes anything for it."""
    scene.publish()
    scene.server.kill()
    scene.whole.until(lambda: scene.whole.engine("engine")["state"] == "unreachable", "the engine to be missed")
    before = scene.witness.count()
    scene.server.start()
    scene.serves(scene.committed[-1])
    assert scene.witness.count() > before
    rounds = scene.whole.ask("/rounds")["rounds"]
    assert [row["step"] for row in rounds if row["outcome"] == "committed"] == [1, 2, 2]
    assert scene.whole.status()["committed"]["sequence"] == len(scene.committed)


def test_an_engine_killed_in_a_round_gets_the_version_when_it_returns(scene: Scene) -> None:
    """Of what has landed in it nothing is left."""
    scene.signal_daemon_at("after LiveDirty", "SIGSTOP")
    step = scene.begin()
    scene.wait_daemons_stop()
    scene.server.kill()
    scene.continue_daemon()
    scene.server.start()
    scene.end(step)


def test_a_trainer_rank_killed_in_a_round_changes_nothing_that_is_served(scene: Scene) -> None:
    """Half of the rows of the landing are new; the engine serves on, and the next start of the trainer goes on."""
    scene.trainer.stop()
    scene.start_trainer(2, script=str(HARMED_TRAINER), env={"WEIGHTSYNC_TEST_HARM": "1 SIGKILL"})
    lost = scene.begin()
    dying = scene.trainer.ranks[1].child
    assert dying is not None
    dying.wait(60)
    scene.whole.until(lambda: scene.whole.status()["round"] is None, "the round to end")
    scene.witness.next()
    engine = scene.whole.engine("engine")
    assert (engine["torn"], engine["paused"], engine["version"]["step"]) == (False, False, scene.committed[-1])
    for rank in scene.trainer.ranks:
        rank.kill()
    scene.start_trainer(2)
    assert scene.publish() == lost + 1
    failed = scene.whole.directory / "run" / "broadcasts" / f"step_{lost}" / "FAILED"
    scene.whole.until(failed.exists, "the marker of the step that was given up")  # written beside the rounds
    assert "its trainer ended" in failed.read_text()
