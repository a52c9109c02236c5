"""``rendezvous: tcpstore``: both rounds and the barrier over vLLM's own StatelessProcessGroup.

An agent joins as rank 1 … N; rank 0 is a child process of the daemon, which is this module run as ``python -m`` (the
daemon itself imports neither torch nor vLLM). The group pickles what it carries, and whoever reaches its port can send
a pickle: for trusted networks only, and off by default. What we put in is only bytes of our own codec.

What of the group is used, and why: ``send_obj`` names its key by the receiver alone, so two senders to one receiver
overwrite each other. Hence what agents say goes out by ``broadcast_obj`` from their own rank, where only rank 0 looks;
rank 0, the only one to do so, uses ``send_obj`` for what one agent alone is to have. ``barrier`` spins at full speed
when its store is gone and bounds each phase by itself, so the barrier here is made of the same two calls: arrive, be
let go, leave. One blocking call of one deadline each; the cost grows with N and not with N².
"""

import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any, BinaryIO, Final

import msgspec
from weightsync.agents.errors import AgentError
from weightsync.orchestrator.protocol.codec import ProtocolError, decode_from_daemon, encode
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
    checked_length,
    commands,
    packed,
)
from weightsync.orchestrator.protocol.messages import Announce, Connect, Ready, TcpStoreRendezvous
from weightsync.orchestrator.protocol.text import clean

DAEMON_RANK: Final = 0

MAX_WAITING_COMMANDS: Final = 4
"""The daemon waits for Done before its next command; more than one waiting is a mistake, not a load."""

SHORTEST_WAIT_SECONDS: Final = 0.01
"""The store takes 0 for no limit at all; what has come is still to be had when the time is over."""

_ARRIVED, _GO, _LEFT = b"arrived", b"go", b"left"


class GroupError(AgentError):
    """The group could not be joined or did not carry a message in time. Worth a retry with a new group."""

    fault = "network"
    retry = True


class SpgRendezvous:
    """An agent's membership. Every method blocks: run them on a thread of their own.

    Args:
        info: where and as which rank to join; ``timeout_seconds`` bounds every single call.

    Raises:
        GroupError: no vLLM in this process, or the group did not come together in time.
    """

    def __init__(self, info: TcpStoreRendezvous) -> None:
        self._rank = info.rank
        self._group = join_group(info.host, info.port, info.rank, info.world, info.timeout_seconds)

    def announce(self, announce: Announce) -> None:
        """Round 1: to the daemon."""
        self._say(encode(announce))

    def connect(self) -> Connect:
        """Round 2: wait for what the daemon has for this agent.

        Raises:
            GroupError: it did not come within ``timeout_seconds``, or is something else.
        """
        data = _carried(lambda: self._group.recv_obj(DAEMON_RANK), "Connect")
        try:
            message = decode_from_daemon(_as_bytes(data))
        except ProtocolError as error:
            raise GroupError(f"the daemon's Connect is malformed: {error}") from error
        if not isinstance(message, Connect):
            raise GroupError(f"{type(message).__name__} where Connect was expected")
        return message

    def ready(self, ready: Ready) -> None:
        """Round 2 is done: to the daemon."""
        self._say(encode(ready))

    def barrier(self, deadline_seconds: float) -> None:
        """Wait until every agent and the daemon are here.

        Raises:
            GroupError: not within ``deadline_seconds``.
        """
        self._say(_ARRIVED)
        self._group.store.set_timeout(timedelta(seconds=deadline_seconds))
        _carried(lambda: self._group.broadcast_obj(None, src=DAEMON_RANK), "the barrier")
        self._say(_LEFT)

    def close(self) -> None:
        """Leave the group. A call that is blocked on another thread ends by its own deadline."""
        self._group = None

    def _say(self, data: bytes) -> None:
        _carried(lambda: self._group.broadcast_obj(data, src=self._rank), "a message to the daemon")


def join_group(host: str, port: int, rank: int, world: int, timeout_seconds: float) -> Any:
    """vLLM's StatelessProcessGroup, joined.

    Raises:
        GroupError: no vLLM in this process, or the group did not come together in time.
    """
    try:
        from vllm.distributed.utils import StatelessProcessGroup
    except ImportError as error:
        raise GroupError(f"rendezvous tcpstore needs vLLM in every process that takes part: {error}") from error
    timeout = math.ceil(timeout_seconds)
    return _carried(
        lambda: StatelessProcessGroup.create(
            host, port, rank, world, data_expiration_seconds=timeout, store_timeout=timeout
        ),
        f"the join of rank {rank} of {world} at {host}:{port}",
    )


def _carried(call: Callable[[], Any], what: str) -> Any:
    try:
        return call()
    except Exception as error:  # torch raises its own kinds, which differ between versions
        raise GroupError(f"the group did not carry {what}: {clean(str(error))}") from error


def _as_bytes(data: object) -> bytes:
    if not isinstance(data, bytes):
        raise GroupError(f"the group carried a {type(data).__name__} instead of bytes")
    return data


# ------------------------------------------------------------------------------------------ rank 0, the daemon's child
class Rank0:
    """Carries out the daemon's commands, one at a time."""

    def __init__(self) -> None:
        self._group: Any = None
        self._world = 0

    def perform(self, command: Command) -> Iterator[Answer]:
        """Answers to ``command``, all but Done.

        Raises:
            GroupError: it could not be carried out in time.
        """
        match command:
            case Join():
                self._world = command.world
                self._group = join_group(
                    command.host, command.port, DAEMON_RANK, command.world, command.timeout_seconds
                )
            case Gather():
                yield from self._gather(command.timeout_seconds)
            case Deliver():
                _carried(lambda: self._group.send_obj(command.data, command.rank), f"a message to {command.rank}")
            case Barrier():
                self._barrier(command.timeout_seconds)

    def _gather(self, timeout_seconds: float) -> Iterator[PipePiece]:
        due = time.monotonic() + timeout_seconds
        for rank in range(1, self._world):
            self._group.store.set_timeout(timedelta(seconds=max(due - time.monotonic(), SHORTEST_WAIT_SECONDS)))
            data = _carried(partial(self._group.broadcast_obj, None, src=rank), f"what rank {rank} says")
            yield PipePiece(rank, _as_bytes(data))

    def _barrier(self, timeout_seconds: float) -> None:
        self._expect(_ARRIVED, timeout_seconds)
        _carried(lambda: self._group.broadcast_obj(_GO, src=DAEMON_RANK), "the barrier")
        self._expect(_LEFT, timeout_seconds)  # This process holds the store: nobody may need it when it ends.

    def _expect(self, word: bytes, timeout_seconds: float) -> None:
        for piece in self._gather(timeout_seconds):
            if piece.data != word:
                raise GroupError(f"rank {piece.rank} is not at the barrier: {len(piece.data)} bytes instead of a word")


def _read_commands(pipe: BinaryIO, into: "queue.Queue[Command]") -> None:
    """Read until the daemon closes the pipe or dies, and end this process then, whatever it waits for."""
    try:
        while head := pipe.read(LENGTH_BYTES):
            into.put_nowait(commands.decode(pipe.read(checked_length(int.from_bytes(head)))))
    except (ValueError, OSError, msgspec.MsgspecError, queue.Full) as error:
        print(
            f"weightsync.agents.link.process_group: the daemon broke the protocol: {error}", file=sys.stderr, flush=True
        )
    os._exit(0)


def main() -> None:
    """Rank 0: commands on standard input, answers on standard output; ends with the former's end."""
    answers_out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # vLLM prints; what it prints is no answer.
    waiting: queue.Queue[Command] = queue.Queue(MAX_WAITING_COMMANDS)
    threading.Thread(target=_read_commands, args=(sys.stdin.buffer, waiting), daemon=True).start()
    rank0 = Rank0()
    while True:
        command = waiting.get()
        try:
            for answer in rank0.perform(command):
                answers_out.write(packed(answer))
            answers_out.write(packed(Done()))
        except GroupError as error:
            answers_out.write(packed(Failed(clean(str(error)))))
        answers_out.flush()


if __name__ == "__main__":
    main()
