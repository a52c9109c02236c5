"""One look at real sockets on 127.0.0.1."""

import socket
import time

import pytest
from aiohttp import web
from servers_here import only, served, speaking, vllm
from weightsync.orchestrator.cli.doctor.looking import MAX_LOOK_BYTES, Silent, look


async def test_an_answer_with_its_clock() -> None:
    async with served(vllm(date=time.time() - 3600)) as url:
        answer = await look(f"{url}/version", 5)
    assert (answer.status, answer.body) == (200, b'{"version": "0.32.0"}')
    assert answer.skew == pytest.approx(-3600, abs=3)
    assert answer.server


async def test_what_is_no_answer() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(Silent, match=r"[Cc]onnect"):
            await look(f"http://127.0.0.1:{free.getsockname()[1]}/health", 5)
        free.listen()  # it takes connections from here on, and says nothing
        with pytest.raises(Silent, match=r"does not answer within 0\.1 s"):
            await look(f"http://127.0.0.1:{free.getsockname()[1]}/health", 0.1)
    async with speaking(b"SSH-2.0-OpenSSH_9.6\r\n") as url:
        with pytest.raises(Silent, match="speaks no HTTP"):
            await look(f"{url}/health", 5)


async def test_an_answer_without_end() -> None:
    async def endless(_: web.Request) -> web.Response:
        return web.Response(body=b"x" * (MAX_LOOK_BYTES + 1))

    async with served(only(big=endless)) as url:
        with pytest.raises(Silent, match=f"more than {MAX_LOOK_BYTES} bytes"):
            await look(f"{url}/big", 5)
