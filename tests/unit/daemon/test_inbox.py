"""What comes in: events decided together and in order, tasks that are not forgotten, and the first failure."""

import asyncio

import pytest
from weightsync.orchestrator.core.errors import InvariantViolation
from weightsync.orchestrator.core.events import Event, Tick
from weightsync.orchestrator.daemon.inbox import Inbox


class Core:
    """In the core's place: what it was given to decide."""

    def __init__(self) -> None:
        self.batches: list[list[Event]] = []
        self.error: Exception | None = None
        self.inbox = Inbox(self.decide)

    def decide(self, events: list[Event]) -> None:
        if self.error is not None:
            raise self.error
        self.batches.append(events)

    def tick(self) -> Tick:
        event = Tick(self.inbox.next_id())
        self.inbox.post(event)
        return event


@pytest.fixture
async def core() -> Core:
    return Core()


async def test_what_comes_in_one_turn_is_decided_together(core: Core) -> None:
    first, second = core.tick(), core.tick()
    assert core.batches == [], "in a later turn"
    await asyncio.sleep(0)
    third = core.tick()
    await asyncio.sleep(0)
    assert core.batches == [[first, second], [third]]
    assert [first.id, second.id, third.id] == [1, 2, 3]


async def test_what_is_posted_while_deciding_is_decided_next(core: Core) -> None:
    answers: list[Tick] = []

    def decide(events: list[Event]) -> None:
        core.batches.append(events)
        if not answers:
            answers.append(core.tick())

    core.inbox = Inbox(decide)
    first = core.tick()
    for _ in range(3):
        await asyncio.sleep(0)
    assert core.batches == [[first], answers]


@pytest.mark.parametrize("error", [InvariantViolation("S1: made up"), KeyError("a bug")])
async def test_what_deciding_raises_ends_the_daemon(core: Core, error: Exception) -> None:
    core.error = error
    core.tick()
    await asyncio.wait_for(core.inbox.stopped.wait(), 10)
    assert core.inbox.failure is error


async def test_the_first_failure_is_the_reason_and_nothing_is_decided_after_it(core: Core) -> None:
    first, second = OSError("the disk is gone"), KeyError("what follows from it")
    core.tick()
    core.inbox.fail(first)
    core.inbox.fail(second)
    await asyncio.sleep(0)
    assert core.inbox.failure is first
    assert core.batches == []


async def test_a_task_that_breaks_is_not_forgotten(core: Core) -> None:
    error = ValueError("in the background")

    async def breaks() -> None:
        raise error

    core.inbox.spawn(breaks(), "breaking")
    await asyncio.wait_for(core.inbox.stopped.wait(), 10)
    assert core.inbox.failure is error


async def test_closing_ends_tasks_and_is_no_failure(core: Core) -> None:
    ended: list[str] = []

    async def for_ever(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    async def at_once() -> None:
        ended.append("at once")

    tasks = [core.inbox.spawn(for_ever("a"), "a"), core.inbox.spawn(for_ever("b"), "b")]
    await core.inbox.spawn(at_once(), "at once")
    await core.inbox.close()
    assert ended[0] == "at once"
    assert sorted(ended[1:]) == ["a", "b"]
    assert all(task.cancelled() for task in tasks)
    assert core.inbox.failure is None
    assert [task.get_name() for task in tasks] == ["a", "b"]
