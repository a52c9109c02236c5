"""Ends of edges that are written while their version is made."""

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from weightsync.agents.transport.ahead import write_ahead
from weightsync.agents.transport.filling import Filled, Filling, whole
from weightsync.agents.transport.grants import OpenGrant
from weightsync.agents.transport.interface import Ended, HandedOver, Sender
from weightsync.orchestrator.protocol.messages import Grant
from weightsync.orchestrator.protocol.names import Digest, Member, RoundName, Version

ROUND, VERSION = RoundName(3, 1), Version(7, 2)
FIRST, SECOND, HANGS = (Member("inference", f"e{n}", 0) for n in range(3))


class Wire(Sender):
    """The first edge gets all, the second one breaks, the third one ends when the test says so."""

    def __init__(self) -> None:
        self.ended: Ended = lambda end: None
        self.seconds = 0.0
        self.filled: Filled = whole

    def open(self, settings: Any) -> None: ...

    async def write(
        self,
        round_name: RoundName,
        members: Sequence[Member],
        deadline_seconds: float,
        ended: Ended,
        filled: Filled = whole,
    ) -> None:
        self.ended, self.seconds, self.filled = ended, deadline_seconds, filled
        ended(HandedOver(FIRST, 10))
        ended(HandedOver(SECOND, 4, error="reset"))


async def begun() -> tuple[Wire, Filling, "asyncio.Task[None]", list[tuple[Member, int, str, Digest | None]]]:
    told: list[tuple[Member, int, str, Digest | None]] = []
    wire, filling = Wire(), Filling(VERSION, torch.device("cpu"))

    async def digests(version: Version) -> dict[Member, Digest]:
        assert version == VERSION
        await asyncio.sleep(0)
        return {member: (1, member.rank) for member in (FIRST, SECOND, HANGS)}

    def tell(known: Any, end: HandedOver) -> None:
        told.append((end.member, end.bytes, end.error, known.get(end.member)))

    members = (FIRST, SECOND, HANGS)
    grant = OpenGrant(Grant(round=ROUND, version=VERSION, fingerprint="", members=members, deadline_seconds=5.0), print)
    task = asyncio.create_task(write_ahead(wire, grant, members, 5.0, filling, digests, tell))
    await asyncio.sleep(0.01)
    return wire, filling, task, told


async def test_an_edge_that_fails_is_told_at_once_and_others_when_their_digests_are_known() -> None:
    wire, filling, task, told = await begun()
    assert told == [(SECOND, 4, "reset", None)]
    assert wire.filled == filling.filled
    assert wire.seconds > 5.0, "the conversion has time of its own"
    filling.ended.set_result(True)
    wire.ended(HandedOver(HANGS, 10))
    assert len(told) == 1, "their digests are being computed"
    await task
    assert told[1:] == [(FIRST, 10, "", (1, 0)), (HANGS, 10, "", (1, 0))]
    wire.ended(HandedOver(HANGS, 10))
    assert told[-1] == (HANGS, 10, "", (1, 0)), "one that was given up ends later, and is told at once"


async def test_of_a_version_that_is_given_up_no_edge_has_all() -> None:
    _, filling, task, told = await begun()
    filling.ended.set_result(False)
    await task
    assert told[1:] == [(FIRST, 10, f"{VERSION} was given up", None)]
