"""``kill -9`` of the daemon before, in and after a round of an engine that serves on: it is never stopped for that.

The witness asks throughout; what it was told is judged when the module's last test is over (``conftest.scene``).
"""

import pytest
from witness import Scene

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

IN_A_ROUND = [
    pytest.param("before RoundBegan", marks=pytest.mark.long),
    pytest.param("after RoundBegan", marks=pytest.mark.long),
    pytest.param("before LiveDirty", marks=pytest.mark.long),
    "after LiveDirty",
    pytest.param("hearing Closed", marks=pytest.mark.long),
    "hearing Verified",
    pytest.param("before Decided", marks=pytest.mark.long),
    "after Decided",
    "hearing Left",
    pytest.param("before Committed", marks=pytest.mark.long),
    pytest.param("after Committed", marks=pytest.mark.long),
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
    scene.witness.next()
    assert not scene.server.is_paused(), "it serves without a daemon"
    scene.start_daemon()
    scene.end(step)
    scene.was_committed(step)


@pytest.mark.parametrize("point", ["after LiveDirty", pytest.param("hearing Verified", marks=pytest.mark.long)])
def test_told_to_stop_in_a_round_it_ends_the_round_first(scene: Scene, point: str) -> None:
    """SIGTERM: the version is committed, the engine serves it, and only then the daemon goes, with 0."""
    scene.told_to_stop(point)


def test_afterwards_versions_go_on(scene: Scene) -> None:
    scene.publish()
    assert scene.whole.status()["committed"]["sequence"] == len(scene.committed)


def test_no_round_but_the_first_has_paused_it(scene: Scene) -> None:
    assert scene.server.log_path.read_text().count("POST /pause") <= 1
