"""What both ends have by default."""

from collections.abc import Sequence
from typing import Any

import pytest
from weightsync.agents.transport.interface import Ended, HandedOver, Sender
from weightsync.orchestrator.protocol.names import Member, RoundName, Version


class Least(Sender):
    """A transport that only does what it must."""

    def open(self, settings: Any) -> None: ...

    async def write(
        self, round_name: RoundName, members: Sequence[Member], deadline_seconds: float, ended: Ended
    ) -> None:
        for member in members:
            ended(HandedOver(member, 10))


async def test_what_a_transport_does_not_need_it_does_not_write() -> None:
    least, member, ends = Least(), Member("inference", "a", 0), list[HandedOver]()
    least.stage(Version(1, 1))
    assert await least.connect(()) == {}, "no edge has failed"
    await least.write(RoundName(1, 1), [member], 1.0, ends.append)
    assert ends == [HandedOver(member, 10, descriptors=0, seconds=0.0, error="")]
    least.stop([member], "the round is over")
    assert least.poll() is False
    least.close()
    assert least.announcement() == ("", b"")
    assert list(least.in_flight()) == []
    with pytest.raises(TypeError, match="abstract"):
        Sender()  # type: ignore[misc]
