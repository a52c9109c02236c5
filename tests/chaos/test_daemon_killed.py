"""``kill -9`` of the daemon before, in and after a round: nothing torn is served, and the version goes on.

The witness asks throughout; what it was told is judged when the module's last test is over (``conftest.scene``).
"""

import time

import pytest
from witness import Scene

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

RECOVERY = 3.0
"""Seconds that the engine may stand still for a restart in a round, beside the absence of a daemon."""

IN_A_ROUND = [
    pytest.param("before RoundBegan", marks=pytest.mark.long),
    "after RoundBegan",
    "hearing Quiesced",
    pytest.param("before LiveDirty", marks=pytest.mark.long),
    "after LiveDirty",
    "hearing Closed",
    pytest.param("hearing Verified", marks=pytest.mark.long),
    pytest.param("before Decided", marks=pytest.mark.long),
    "after Decided",
    pytest.param("hearing Left", marks=pytest.mark.long),
    pytest.param("before Committed", marks=pytest.mark.long),
    "after Committed",
]


def test_between_rounds(scene: Scene) -> None:
    """The engine serves on without a daemon; a new one takes everything over and pushes the next version."""
    scene.kill_daemon()
    scene.witness.next()
    assert not scene.server.is_paused()
    scene.start_daemon()
    scene.serves(scene.committed[-1])
    scene.publish()


def test_while_nobody_is_there_to_hear_of_a_version(scene: Scene) -> None:
    """Published without a daemon: STABLE and the trainer's Hello tell the next one."""
    scene.kill_daemon()
    step = scene.begin()
    scene.witness.next()
    scene.start_daemon()
    scene.end(step)


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
    rounds = scene.whole.ask("/rounds")["rounds"]
    assert [row for row in rounds if row["outcome"] == "committed" and row["step"] == step], rounds
    marker = scene.whole.directory / "run" / "broadcasts" / f"step_{step}" / "COMMITTED"
    scene.whole.until(marker.exists, f"{marker}, which is written beside the round", 10)


@pytest.mark.parametrize("point", ["hearing Quiesced", pytest.param("after LiveDirty", marks=pytest.mark.long)])
def test_told_to_stop_in_a_round_it_ends_the_round_first(scene: Scene, point: str) -> None:
    """SIGTERM: the version is committed, the engine serves it, and only then the daemon goes, with 0."""
    scene.signal_daemon_at(point, "SIGTERM")
    step = scene.begin()
    scene.wait_daemons_end()
    told = scene.trainer.hear()
    assert (told["step"], told.get("sequence")) == (step, len(scene.committed) + 1), told
    scene.committed.append(step)
    assert not scene.server.is_paused()
    scene.witness.next()
    scene.start_daemon()
    scene.serves(step)


def test_afterwards_versions_go_on(scene: Scene) -> None:
    scene.publish()
    assert scene.whole.status()["committed"]["sequence"] == len(scene.committed)
