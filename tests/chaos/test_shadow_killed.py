"""``kill -9`` of the daemon in a round of a real vLLM that serves on: it is never stopped for that, and goes on.

The witness asks throughout; what it was told is judged when the module's last test is over (``conftest.scene``).
"""

import pytest
from witness import Scene

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

MODE = "copy"
"""See ``conftest.scene``."""

IN_A_ROUND = [
    pytest.param("after RoundBegan", marks=pytest.mark.long),
    "after LiveDirty",
    pytest.param("hearing Closed", marks=pytest.mark.long),
    "hearing Verified",
    "after Decided",
    "hearing Left",
    pytest.param("after Committed", marks=pytest.mark.long),
]


@pytest.mark.parametrize("point", IN_A_ROUND)
def test_in_a_round(scene: Scene, point: str) -> None:
    scene.signal_daemon_at(point, "SIGKILL")
    step = scene.begin()
    scene.wait_daemons_death()
    scene.witness.next()
    assert not scene.server.is_paused(), "it serves without a daemon"
    scene.start_daemon()
    scene.end(step)
    rounds = scene.whole.ask("/rounds")["rounds"]
    assert [row for row in rounds if row["outcome"] == "committed" and row["step"] == step], rounds


def test_no_round_but_the_first_has_paused_it(scene: Scene) -> None:
    scene.publish()
    assert scene.server.log_path.read_text().count("POST /pause") <= 1
