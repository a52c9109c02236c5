"""What blocks runs on a thread of its own."""

import asyncio
import threading

import pytest
from weightsync.agents.link.beside import beside


async def test_what_blocks_beside_the_loop_keeps_nobody_from_ending() -> None:
    release, seen = threading.Event(), []
    waiting = asyncio.create_task(beside(lambda: release.wait(30)))
    seen.append(await beside(threading.current_thread))
    assert seen[0].daemon
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    release.set()
    with pytest.raises(ZeroDivisionError):
        await beside(lambda: 1 // 0)
