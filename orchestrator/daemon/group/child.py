"""``rendezvous: tcpstore``, the daemon's side: a child process joins vLLM's StatelessProcessGroup in its stead.

The daemon imports neither torch nor vLLM. The child (``python -m weightsync.agents.link.process_group``) is rank 0 and
holds the group's store; it is told what to do over its standard input, answers over its standard output, and ends when
either the daemon closes the pipe or the daemon itself ends. The group pickles: for trusted networks only,
off by default.
"""

import asyncio
import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import ClassVar, Final, TypeVar

import msgspec
from weightsync.orchestrator.core.errors import WeightsyncError
from weightsync.orchestrator.protocol.codec import ProtocolError, decode_from_agent, encode
from weightsync.orchestrator.protocol.group import (
    LENGTH_BYTES,
    Answer,
    Barrier,
    Command,
    Deliver,
    Done,
    Failed,
    Gather,
    Join,
    PipePiece,
    answers,
    checked_length,
    packed,
)
from weightsync.orchestrator.protocol.messages import Announce, Connect, Fault, FromAgent, Ready, TcpStoreRendezvous

CHILD_MODULE: Final = "weightsync.agents.link.process_group"

CLOSE_SECONDS: Final = 2.0
"""How long the child may take to end by itself; it has nothing to save."""

SECONDS_OVER: Final = 5.0
"""The daemon's deadline beyond the child's, so that the child's own reason arrives."""

T = TypeVar("T", bound=FromAgent)


class TcpStoreError(WeightsyncError):
    """The group did not carry a message, or its child process ended. Worth a retry with a new group."""

    fault: ClassVar[Fault] = "network"
    retry = True


class TcpStoreRendezvousServer:
    """Rank 0 of one group; the agents are ranks 1 … world − 1. One call at a time; after an error only ``close``.

    Args:
        info: ``host`` and ``port`` where the store listens, and ``timeout_seconds``, which bounds every single call.
            ``rank`` and ``world`` are not read.
        child: the command line of the child process.
        seconds_over: how much longer than the child the daemon waits.
    """

    def __init__(
        self,
        info: TcpStoreRendezvous,
        *,
        # -P: modules that lie in the working directory must not take the place of installed ones.
        child: Sequence[str] = (sys.executable, "-P", "-m", CHILD_MODULE),
        seconds_over: float = SECONDS_OVER,
    ) -> None:
        self._info = info
        self._command_line = tuple(child)
        self._seconds_over = seconds_over
        self._world = 0
        self._child: asyncio.subprocess.Process | None = None

    async def start(self, world: int) -> None:
        """Start the child and wait until all ``world`` − 1 agents have joined.

        Raises:
            TcpStoreError: no vLLM beside this daemon, the address is taken, or somebody is missing at the deadline.
        """
        self._world = world
        # Standard error is the daemon's own, so that the child's tracebacks reach the log.
        self._child = await asyncio.create_subprocess_exec(
            *self._command_line, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        info = self._info
        await self._command(Join(info.host, info.port, world, info.timeout_seconds))

    async def gather_announces(self) -> dict[int, Announce]:
        """Round 1: every agent's Announce, by rank.

        Raises:
            TcpStoreError: somebody's is missing at the deadline, or is something else.
        """
        return await self._gather(Announce)

    async def deliver(self, connects: Mapping[int, Connect]) -> None:
        """Round 2: to each rank its own Connect, which no other rank reads.

        Raises:
            TcpStoreError: the child could not.
        """
        for rank, connect in connects.items():
            await self._command(Deliver(rank, encode(connect)))

    async def gather_ready(self) -> dict[int, Ready]:
        """The end of round 2: every agent's Ready, by rank.

        Raises:
            TcpStoreError: somebody's is missing at the deadline, or is something else.
        """
        return await self._gather(Ready)

    async def barrier(self) -> None:
        """Wait until every agent is here, and let them go.

        Raises:
            TcpStoreError: somebody is missing at the deadline.
        """
        await self._command(Barrier(self._info.timeout_seconds))

    async def close(self) -> None:
        """End the child and reap it, within CLOSE_SECONDS."""
        child, self._child = self._child, None
        if child is None:
            return
        if child.stdin is not None:
            child.stdin.close()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await child.wait()
        except TimeoutError:
            pass
        finally:  # Also when this task is cancelled while it waits: nobody else knows of the child.
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
        await child.wait()

    async def _gather(self, kind: type[T]) -> dict[int, T]:
        said: dict[int, T] = {}
        for piece in await self._ask(Gather(self._info.timeout_seconds)):
            try:
                message = decode_from_agent(piece.data)
            except ProtocolError as error:
                raise TcpStoreError(f"rank {piece.rank} of the group sent a malformed message: {error}") from error
            if not isinstance(message, kind):
                raise TcpStoreError(f"rank {piece.rank} sent {type(message).__name__} instead of {kind.__name__}")
            said[piece.rank] = message
        if said.keys() != set(range(1, self._world)):
            raise TcpStoreError(f"{len(said)} of {self._world - 1} agents answered")
        return said

    async def _command(self, command: Command) -> None:
        for piece in await self._ask(command):
            raise TcpStoreError(f"the child answered {type(command).__name__} with what rank {piece.rank} says")

    async def _ask(self, command: Command) -> list[PipePiece]:
        """Have the child carry out ``command``; its answers up to Done."""
        child, name = self._child, type(command).__name__
        if child is None or child.stdin is None or child.stdout is None:
            raise TcpStoreError("the group is closed")
        pieces: list[PipePiece] = []
        try:
            async with asyncio.timeout(self._info.timeout_seconds + self._seconds_over):
                child.stdin.write(packed(command))
                await child.stdin.drain()
                while not isinstance(answer := await _answer(child.stdout), Done):
                    if isinstance(answer, Failed):
                        raise TcpStoreError(answer.reason)
                    # Nothing that a child says may grow without bound in the daemon.
                    if len(pieces) == self._world:
                        raise TcpStoreError(f"the child answered {name} with more than {self._world} messages")
                    pieces.append(answer)
        except TimeoutError:
            raise TcpStoreError(f"the child did not carry out {name} in time") from None
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise TcpStoreError(f"the child ended during {name}; its own words are on standard error") from error
        except (ValueError, msgspec.MsgspecError, RecursionError) as error:
            raise TcpStoreError(f"the child broke the protocol during {name}: {error}") from error
        return pieces


async def _answer(pipe: asyncio.StreamReader) -> Answer:
    length = checked_length(int.from_bytes(await pipe.readexactly(LENGTH_BYTES)))
    return answers.decode(await pipe.readexactly(length))
