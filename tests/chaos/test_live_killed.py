"""``kill -9`` of the daemon, and of a trainer rank, in a round that writes into the weights of a paused engine.

Nothing torn is served, and the version goes on. The witness asks throughout; what it was told is judged when the
module's last test is over (``conftest.scene``).
"""

import time
from pathlib import Path

import pytest
from witness import Scene

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

MODE = "live"
"""See ``conftest.scene``."""

HARMED_TRAINER = Path(__file__).with_name("harmed_trainer.py")

RECOVERY = 3.0
"""Seconds that the engine may stand still for a restart in a round, beside the absence of a daemon."""

IN_A_ROUND = [
    pytest.param("after RoundBegan", marks=pytest.mark.long),
    "hearing Quiesced",
    pytest.param("before LiveDirty", marks=pytest.mark.long),
    pytest.param("after LiveDirty", marks=pytest.mark.long),
    "hearing Closed",
    pytest.param("hearing Verified", marks=pytest.mark.long),
    pytest.param("before Decided", marks=pytest.mark.long),
    "after Decided",
    pytest.param("hearing Left", marks=pytest.mark.long),
    pytest.param("before Committed", marks=pytest.mark.long),
    pytest.param("after Committed", marks=pytest.mark.long),
]


@pytest.mark.parametrize("point", IN_A_ROUND)
def test_in_a_round(scene: Scene, point: str) -> None:
    scene.signal_daemon_at(point, "SIGKILL")
    step = scene.begin()
    scene.wait_daemons_death()
    died = time.monotonic()
    scene.start_daemon()
    absence = time.monotonic() - died
    scene.end(step)
    silence = scene.witness.silence(died)
    assert silence <= absence + RECOVERY, f"without an answer for {silence:.1f} s, {absence:.1f} s without a daemon"
    scene.was_committed(step)


@pytest.mark.parametrize(
    "point",
    [pytest.param("hearing Quiesced", marks=pytest.mark.long), pytest.param("after LiveDirty", marks=pytest.mark.long)],
)
def test_told_to_stop_in_a_round_it_ends_the_round_first(scene: Scene, point: str) -> None:
    """SIGTERM: the version is committed, the engine serves it, and only then the daemon goes, with 0."""
    scene.told_to_stop(point)


def test_a_trainer_rank_killed_in_a_round_leaves_the_engine_paused_until_it_is_repaired(scene: Scene) -> None:
    """Half of the rows are new, half are old; only the next start of the trainer can mend that."""
    scene.trainer.stop()
    scene.start_trainer(2, script=str(HARMED_TRAINER), env={"WEIGHTSYNC_TEST_HARM": "1 SIGKILL"})
    torn = scene.begin()

    def is_torn() -> bool:
        engine = scene.whole.engine("engine")
        return bool(engine["torn"]) and scene.whole.status()["round"] is None

    scene.whole.until(is_torn, "the engine to be torn")
    assert scene.server.is_paused()
    status, body = scene.server.post("/resume")
    assert status == 500, body
    assert "not servable" in str(body)
    assert scene.server.is_paused()
    assert "torn and paused" in scene.whole.status()["state"]
    for rank in scene.trainer.ranks:
        rank.kill()
    scene.start_trainer(2)
    assert scene.publish() == torn + 1
    failed = scene.whole.directory / "run" / "broadcasts" / f"step_{torn}" / "FAILED"
    scene.whole.until(failed.exists, "the marker of the step that was given up")  # written beside the rounds
    assert "its trainer ended" in failed.read_text()
