"""What blocks runs on a thread of its own, and what computes is waited for whoever is cancelled."""

import asyncio
import threading

import pytest
from weightsync.agents.link.beside import beside, computed


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


async def test_the_loop_goes_on_while_work_computes() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def work() -> int:
        begun.set()
        assert go_on.wait(30), "only the loop lets it go on"
        return 7

    waiting = asyncio.create_task(computed(work))
    assert await asyncio.to_thread(begun.wait, 30)
    go_on.set()
    assert await waiting == 7
    with pytest.raises(ZeroDivisionError):
        await computed(lambda: 1 // 0)


async def test_a_caller_that_is_cancelled_leaves_when_the_work_has_ended() -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), []

    def work() -> None:
        begun.set()
        assert go_on.wait(30)
        ended.append(True)

    waiting = asyncio.create_task(computed(work))
    assert await asyncio.to_thread(begun.wait, 30)
    for _ in range(2):  # cancelling once more changes nothing
        waiting.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not waiting.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ended == [True]
