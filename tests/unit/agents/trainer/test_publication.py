"""The handle of a version: the sequence number, the reason of a failure, or a deadline."""

from concurrent.futures import Future

import pytest
from weightsync.agents.trainer.publication import Publication, PublishError
from weightsync.orchestrator.protocol.names import Version


def test_a_committed_version_gives_its_sequence_number_again_and_again() -> None:
    outcome: Future[int] = Future()
    publication = Publication(Version(7, 3), outcome)
    assert not publication.done()
    outcome.set_result(12)
    assert (publication.done(), publication.wait(0.0), publication.wait(0.0)) == (True, 12, 12)


def test_a_failed_one_gives_the_reason() -> None:
    outcome: Future[int] = Future()
    outcome.set_exception(PublishError("no plan fits"))
    with pytest.raises(PublishError, match="no plan fits"):
        Publication(Version(7, 3), outcome).wait(0.0)


def test_an_undecided_one_ends_at_the_deadline() -> None:
    with pytest.raises(PublishError, match=r"step 3 \(generation 7\) was neither committed nor failed within 0 s"):
        Publication(Version(7, 3), Future()).wait(0.0)
