"""Processes of a benchmark: one function in a process of its own, spoken to over a pipe."""

import asyncio
import multiprocessing
import multiprocessing.connection
import resource
import sys
from collections.abc import Callable
from typing import Any, Final

SETUP_SECONDS: Final = 120.0
DESCRIPTORS_BESIDE_SOCKETS: Final = 256

Pipe = multiprocessing.connection.Connection


class Child:
    """``function(pipe, *arguments)`` in a process of its own; ended by closing the pipe."""

    def __init__(self, function: Callable[..., None], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=function, args=(theirs, *arguments))
        self._process.start()
        theirs.close()

    def receive(self, seconds: float = SETUP_SECONDS) -> Any:
        if not self._pipe.poll(seconds):
            raise TimeoutError(f"the {self._process.name} said nothing for {seconds} s")
        return self._pipe.recv()

    def send(self, what: object) -> None:
        self._pipe.send(what)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(SETUP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def allow_sockets(agents: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = agents + DESCRIPTORS_BESIDE_SOCKETS
    if hard != resource.RLIM_INFINITY and hard < needed:
        sys.exit(f"{agents} agents need {needed} file descriptors; the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


async def closed(pipe: Pipe) -> None:
    """Wait until the other end of ``pipe`` is closed."""
    done = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pipe.fileno(), done.set)
    await done.wait()
    loop.remove_reader(pipe.fileno())
