"""What both ends have by default, and which of several failures speaks for a push."""

from collections.abc import Collection, Sequence
from typing import Any

import pytest
from weightsync.agents.errors import AgentError
from weightsync.agents.transport.interface import HandedOver, PushError, Sender
from weightsync.agents.transport.nixl.errors import EdgeError, MetadataError
from weightsync.orchestrator.protocol.names import Member, Version

A, B = Member("inference", "a", 0), Member("inference", "b", 0)


def test_a_push_tells_who_was_written_and_why_the_others_were_not() -> None:
    error = PushError((HandedOver(A, 10),), {B: MetadataError("torn")})
    assert str(error) == "b/0: torn"
    assert (error.moved, list(error.failures)) == ((HandedOver(A, 10),), [B])
    assert (error.fault, error.retry) == ("network", True)


def test_the_failure_that_no_retry_helps_speaks_for_all() -> None:
    failures: dict[Member, AgentError] = {A: MetadataError("torn"), B: EdgeError("outside its region")}
    error = PushError((), failures)
    assert (error.fault, error.retry) == ("daemon", False)
    assert str(error) == "a/0: torn; b/0: outside its region"


class Least(Sender):
    """A transport that only does what it must."""

    def open(self, settings: Any) -> None: ...

    async def write(
        self, members: Sequence[Member], deadline_seconds: float, groups: Collection[int] | None = None
    ) -> tuple[HandedOver, ...]:
        return ()


async def test_what_a_transport_does_not_need_it_does_not_write() -> None:
    least = Least()
    least.stage(Version(1, 1))
    await least.connect(())
    least.poll()
    least.close()
    assert least.announcement() == ("", b"")
    assert least.in_flight() is False
    with pytest.raises(TypeError, match="abstract"):
        Sender()  # type: ignore[misc]
