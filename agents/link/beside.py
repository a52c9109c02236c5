"""Calls that block or compute, beside the event loop of an agent: whatever they take, heartbeats are answered."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Collection
from typing import Any, TypeVar

T = TypeVar("T")


async def beside(call: Callable[[], T]) -> T:
    """``call``, which blocks, on a thread of its own that no end of this process waits for."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: Exception | None) -> None:
        if result.done():
            return  # nobody waits any more
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)  # type: ignore[arg-type]

    def perform() -> None:
        value, failure = None, None
        try:
            value = call()
        except Exception as error:  # handed to the loop
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, value, failure)

    threading.Thread(target=perform, name="weightsync group", daemon=True).start()
    return await result


async def computed(work: Callable[[], T]) -> T:
    """The result of ``work``, which ends by itself and uses what is nobody else's meanwhile.

    A caller that is cancelled, and however often, leaves only when ``work`` has ended.
    """
    running = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        await until_ended([running])
    except asyncio.CancelledError as error:
        raise error from running.exception()
    return running.result()


async def until_ended(work: Collection["asyncio.Future[Any]"]) -> None:
    """Until all of ``work`` has ended, however it has. A caller that is cancelled, and however often, leaves only
    then."""
    cancelled: asyncio.CancelledError | None = None
    while running := [each for each in work if not each.done()]:
        try:
            await asyncio.wait(running)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
