"""Where everything that happens comes in: events for the core, tasks of the daemon, and what ends it."""

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from typing import Any

import structlog
from weightsync.orchestrator.core.errors import WeightsyncError
from weightsync.orchestrator.core.events import Event

log = structlog.get_logger(__name__)


class Inbox:
    """One per daemon; every method belongs to its loop.

    Args:
        decide: is given all events that came in one turn of the loop, in their order. What it raises ends the daemon.
    """

    def __init__(self, decide: Callable[[list[Event]], None]) -> None:
        self._decide = decide
        self._ids = itertools.count(1)
        self._pending: list[Event] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.stopped = asyncio.Event()
        """Set when the daemon is to end. Nothing that is posted afterwards is decided."""
        self.failure: BaseException | None = None
        """Why it ends, if by a failure: the first one."""

    def next_id(self) -> int:
        """The number of the next event; whoever makes an event asks for it."""
        return next(self._ids)

    def post(self, event: Event) -> None:
        """Hand an event to the core, in a later turn of the loop; those that come in one turn are decided together."""
        self._pending.append(event)
        if len(self._pending) == 1:
            asyncio.get_running_loop().call_soon(self._flush)

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]":
        """Run ``work`` beside the rest. What it raises ends the daemon; ``close`` cancels it."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def fail(self, error: BaseException) -> None:
        """End the daemon at once: nothing that follows from a broken state may be performed."""
        log.error("the daemon ends", reason=str(error), exc_info=error if _is_a_bug(error) else None)
        if self.failure is None:
            self.failure = error
        self.stopped.set()

    async def close(self) -> None:
        """Cancel the tasks that are still running and wait for them."""
        self.stopped.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _flush(self) -> None:
        events, self._pending = self._pending, []  # what deciding posts comes in a turn of its own
        if self.stopped.is_set():
            return
        try:
            self._decide(events)
        except Exception as error:
            self.fail(error)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        # Asked for in any case: asyncio would only complain of it when the task is collected.
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.fail(error)


def _is_a_bug(error: BaseException) -> bool:
    """Our own errors say all there is to say; of any other one the place matters."""
    return not isinstance(error, WeightsyncError)
