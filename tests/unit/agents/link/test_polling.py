"""When the agent's thread looks after its transport, and how the process's threads take turns meanwhile."""

import asyncio
import sys
import time

import pytest
from weightsync.agents.link import polling
from weightsync.agents.link.polling import Polling
from weightsync.agents.turns import SWITCH_SECONDS

pytestmark = pytest.mark.usefixtures("own_turns")


class Transport:
    """Is busy for ``turns`` more polls; when it was polled, and how long turns were then."""

    def __init__(self, turns: int = 0) -> None:
        self.turns = turns
        self.polled: list[float] = []
        self.intervals: list[float] = []
        self._enough: tuple[int, asyncio.Event] | None = None

    def poll(self) -> bool:
        self.polled.append(time.monotonic())
        self.intervals.append(sys.getswitchinterval())
        self.turns -= 1
        if self._enough is not None and len(self.polled) >= self._enough[0]:
            self._enough[1].set()
        return self.turns >= 0

    async def until(self, times: int) -> None:
        self._enough = (times, asyncio.Event())
        await self._enough[1].wait()


async def polled(transport: Transport, times: int, running: Polling) -> None:
    task = asyncio.create_task(running.run())
    async with asyncio.timeout(10):
        await transport.until(times)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_threads_take_quick_turns_while_something_comes_and_only_then() -> None:
    transport = Transport(turns=3)
    await polled(transport, 5, Polling(transport.poll))
    assert transport.intervals[0] == pytest.approx(0.005)
    assert transport.intervals[1:4] == [pytest.approx(SWITCH_SECONDS)] * 3
    assert transport.intervals[4] == pytest.approx(0.005)


async def test_turns_are_as_before_when_the_agent_ends_in_the_middle() -> None:
    transport = Transport(turns=1000)
    await polled(transport, 3, Polling(transport.poll))
    assert sys.getswitchinterval() == pytest.approx(0.005)


async def test_a_word_from_the_daemon_is_not_waited_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "IDLE_SECONDS", 60.0)
    transport = Transport()
    running = Polling(transport.poll)
    asyncio.get_running_loop().call_later(0.01, running.wake)
    await polled(transport, 2, running)
    assert transport.polled[1] - transport.polled[0] < 30


async def test_a_poll_that_fails_is_not_the_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(polling, "IDLE_SECONDS", 0.001)
    transport = Transport(turns=6)

    def poll() -> bool:
        busy = transport.poll()
        if len(transport.polled) in (1, 3, 4):
            raise RuntimeError("out of memory")
        return busy

    await polled(transport, 8, Polling(poll))
    assert len(caplog.records) == 1, "one in ten seconds"
    assert "out of memory" in caplog.text


async def test_it_polls_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "IDLE_SECONDS", 0.001)
    transport = Transport()
    await polled(transport, 4, Polling(transport.poll))
