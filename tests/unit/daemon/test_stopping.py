"""Told to stop, the daemon lets its round end, for a while; told twice, it goes."""

import asyncio
from typing import Any

import pytest
from fleets import policy_for
from weightsync.orchestrator.core.events import Event, StopAsked
from weightsync.orchestrator.core.machine import start
from weightsync.orchestrator.daemon.inbox import Inbox
from weightsync.orchestrator.daemon.stopping import Stopping


class Desk:
    """A daemon whose core does what the test says."""

    def __init__(self, seconds: float = 1000.0) -> None:
        self.fleet, _ = start(policy_for(["e0"]), "j", [], 0.0)
        self.events: list[Event] = []
        self.inbox = Inbox(self.decide)
        self.performed = asyncio.Event()
        outbox: Any = self
        self.stopping = Stopping(self.inbox, outbox, self.fleet, lambda: seconds)

    async def flushed(self) -> None:
        await self.performed.wait()

    def decide(self, events: list[Event]) -> None:
        self.events.extend(events)
        self.fleet.stopping = any(isinstance(event, StopAsked) for event in self.events)
        self.stopping.decided()

    def begin(self) -> None:
        a_round: Any = object()
        self.fleet.round = a_round


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_round_ends_and_all_that_ends_it_is_performed() -> None:
    desk = Desk()
    desk.begin()
    desk.stopping.ask()
    await turns()
    assert [type(event) for event in desk.events] == [StopAsked]
    assert not desk.inbox.stopped.is_set()
    desk.fleet.round = None
    desk.decide([])
    desk.decide([])
    await turns()
    assert not desk.inbox.stopped.is_set(), "COMMITTED is not told yet"
    desk.performed.set()
    await asyncio.wait_for(desk.inbox.stopped.wait(), 5)
    await desk.inbox.close()


async def test_without_a_round_it_ends_at_once() -> None:
    desk = Desk()
    desk.performed.set()
    desk.stopping.ask()
    await asyncio.wait_for(desk.inbox.stopped.wait(), 5)
    await desk.inbox.close()


async def test_told_again_it_does_not_wait() -> None:
    desk = Desk()
    desk.begin()
    desk.stopping.ask()
    await turns()
    desk.stopping.ask()
    assert desk.inbox.stopped.is_set()


@pytest.mark.parametrize("seconds", [0.01])
async def test_a_round_that_does_not_end_is_left_to_the_next_start(seconds: float) -> None:
    desk = Desk(seconds)
    desk.begin()
    desk.stopping.ask()
    await asyncio.wait_for(desk.inbox.stopped.wait(), 5)
    assert desk.fleet.round is not None


async def test_nobody_stops_who_was_not_told_to() -> None:
    desk = Desk()
    desk.performed.set()
    desk.decide([])
    await turns()
    assert not desk.inbox.stopped.is_set()
