"""The handle of a version: the sequence number, the reason of a failure, or a deadline."""

from concurrent.futures import Future

import pytest
from weightsync.agents.trainer import publication
from weightsync.agents.trainer.publication import Publication, PublishError
from weightsync.orchestrator.protocol.names import Version


def test_a_committed_version_gives_its_sequence_number_again_and_again() -> None:
    outcome: Future[int] = Future()
    handle = Publication(Version(7, 3), outcome)
    assert not handle.done()
    assert not handle.committed()
    outcome.set_result(12)
    assert (handle.done(), handle.committed(), handle.wait(0.0), handle.wait(0.0)) == (True, True, 12, 12)


def test_a_failed_one_gives_the_reason() -> None:
    outcome: Future[int] = Future()
    outcome.set_exception(PublishError("no plan fits"))
    with pytest.raises(PublishError, match="no plan fits"):
        Publication(Version(7, 3), outcome).wait(0.0)


def test_an_undecided_one_ends_at_the_deadline() -> None:
    with pytest.raises(PublishError, match=r"step 3 \(generation 7\) was neither committed nor failed within 0 s"):
        Publication(Version(7, 3), Future()).wait(0.0)


def test_who_waits_looks_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the look raises ends the wait, long before its deadline."""
    monkeypatch.setattr(publication, "LOOK_SECONDS", 0.01)

    def look() -> None:
        raise KeyError("rank 2")

    with pytest.raises(KeyError, match="rank 2"):
        Publication(Version(7, 3), Future()).wait(60.0, look)


def test_what_the_daemon_does_is_logged_now_and_then_and_said_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(publication, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(publication, "SAY_SECONDS", 0.05)
    with pytest.raises(PublishError, match=r"within 0\.2 s; the daemon: waiting for engines e0"):
        Publication(Version(7, 3), Future(), lambda: "waiting for engines e0").wait(0.2)
    lines = [record.getMessage() for record in caplog.records]
    assert 1 <= len(lines) <= 4
    assert all(line.endswith("the daemon: waiting for engines e0") for line in lines)
