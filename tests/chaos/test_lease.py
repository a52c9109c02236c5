"""``kill -9`` of a daemon that nobody starts again: whoever holds a whole committed version serves on by itself.

What the engine says throughout is judged when the module's last test is over, as for ``test_daemon_killed``.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import VllmServer
from witness import Scene

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

LEASE = 4.0
MARGIN = 8.0
"""From the end of the lease until an engine must serve on a busy machine, in seconds. Without one it never does."""
PATIENCE = {"quiesce_seconds": 5, "transfer_seconds": 5, "verify_seconds": 5, "finish_seconds": 5}
"""So that an update call that nobody ends is over in 20 s."""


@pytest.fixture(scope="module")
def leased(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """As ``conftest.scene``, with a lease."""
    directory = tmp_path_factory.mktemp("leased")
    server = VllmServer(qwen3, env={"WEIGHTSYNC_MODE": "live"}, log=directory / "vllm.log")
    scene = Scene(directory, server, {"commit": {"lease_seconds": LEASE}, "deadlines": PATIENCE})
    try:
        scene.open()
        yield scene
        scene.judge()
    finally:
        scene.close()
        server.close()


def dies_at(scene: Scene, point: str) -> tuple[int, float]:
    """The step that was being published when the daemon died there, and when that was."""
    scene.signal_daemon_at(point, "SIGKILL")
    step = scene.begin()
    scene.wait_daemons_death()
    return step, time.monotonic()


@pytest.mark.parametrize(
    "point",
    [pytest.param("answered PAUSE", marks=pytest.mark.long), "hearing Quiesced"],
    ids=["paused", "inside the update call"],
)
def test_an_engine_to_which_nobody_wrote_serves_on(leased: Scene, point: str) -> None:
    step, died = dies_at(leased, point)
    leased.witness.next(LEASE + MARGIN)
    served = time.monotonic() - died
    assert LEASE / 2 < served < LEASE + MARGIN, "not before the daemon could have come back, and not long after"
    assert not leased.server.is_paused()
    leased.start_daemon()
    leased.end(step)


def test_an_engine_that_may_be_torn_does_not(leased: Scene) -> None:
    step, _ = dies_at(leased, "hearing Closed")
    said = leased.witness.count()
    with pytest.raises(AssertionError, match="nobody has answered"):
        leased.witness.next(2 * LEASE)
    assert leased.witness.count() == said
    leased.start_daemon()
    leased.end(step)


@pytest.mark.long
def test_memory_that_was_verified_and_decided_is_not_written_again(leased: Scene) -> None:
    """The worker has long left the update call, as torn, when a daemon comes that knows what was decided."""
    step, _ = dies_at(leased, "after Decided")
    log = leased.server.log_path
    leased.whole.until(lambda: "nothing was decided within" in log.read_text(), "the worker to give up", 60)
    assert leased.server.is_paused()
    with pytest.raises(AssertionError, match="nobody has answered"):
        leased.witness.next(LEASE)
    assert leased.server.is_paused()
    before = log.read_text().count("torn no longer")
    leased.start_daemon()
    leased.end(step)
    assert log.read_text().count("torn no longer") == before + 1
    rounds = [row for row in leased.whole.ask("/rounds")["rounds"] if row["step"] == step]
    assert [row["outcome"] for row in rounds] == ["committed"], rounds
