"""TCP ports of the loopback interface for servers that a test starts by number."""

import contextlib
import random
import socket

HOST = "127.0.0.1"
# Outside what kernels give to connections (from 32768) and to whoever asks for any port.
PORTS = (15_000, 32_000)

_held: list[socket.socket] = []


def free_port() -> int:
    """A port that is this process's until it ends: no other test is given it, and nothing but who is told binds it.

    A port that was merely free a moment ago may be somebody else's by the time its server starts. So a socket keeps
    it, without listening. It is bound while it refuses to share, and shares from then on: a server that sets
    SO_REUSEADDR, as asyncio, uvicorn and torch's stores do, may have it, and may have it again after a restart.
    """
    while True:
        keeper = socket.socket()
        with contextlib.suppress(OSError):
            keeper.bind((HOST, random.randrange(*PORTS)))
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _held.append(keeper)
            return int(keeper.getsockname()[1])
        keeper.close()
