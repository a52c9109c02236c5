"""A trainer rank that may stop in mid-write, as a process of its own: ``late_writer.py DEVICE``.

Prints one JSON line with its layout, endpoint name and card. Each line on its standard input is answered by one:
``connect HEX``, ``fill SEED``, ``write EPOCH NUMBER SECONDS`` (what went wrong, or "done"). After ``stop before N``
or ``stop after N`` it sends itself SIGSTOP around its N-th post from then on. SIGUSR1 has it say where each of its
threads is, on its standard error.
"""

import asyncio
import faulthandler
import json
import os
import signal
import sys
from functools import partial
from typing import Any

import msgspec
import row_parallel
import torch
from weightsync.agents.memory.arena import arena
from weightsync.agents.transport.nixl.sender import NixlSender
from weightsync.agents.transport.shares import Shares
from weightsync.kernels.warm import warm_up
from weightsync.orchestrator.protocol.messages import Connect, NixlSettings
from weightsync.orchestrator.protocol.names import RoundName

RING_BYTES = 2048
"""The cargo is many times longer: it takes dozens of posts."""


class Late:
    """NIXL's agent, which stops its process around one post."""

    def __init__(self, agent: Any, when: str, number: int) -> None:
        self._agent, self._when, self._left = agent, when, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)

    def transfer(self, handle: Any) -> Any:
        self._left -= 1
        if (self._left, self._when) == (0, "before"):
            os.kill(os.getpid(), signal.SIGSTOP)
        state = self._agent.transfer(handle)
        if (self._left, self._when) == (0, "after"):
            os.kill(os.getpid(), signal.SIGSTOP)
        return state


class Process:
    def __init__(self) -> None:
        self.rank = row_parallel.source(0, 1, RING_BYTES)
        self.sender = NixlSender(self.rank.source())
        self.sender.open(NixlSettings())
        self.shares = Shares(self.rank.layout, self.rank.memory)

    async def answer(self, word: str, *arguments: str) -> str:
        match word:
            case "connect":
                connect = msgspec.msgpack.decode(bytes.fromhex(arguments[0]), type=Connect)
                failed = await self.sender.connect(self.shares.replan(connect))
                return str({str(member): str(error) for member, error in failed.items()} or "done")
            case "fill":
                row_parallel.fill([self.rank], row_parallel.masters(int(arguments[0])))
                if self.rank.memory[0].is_cuda:
                    torch.cuda.synchronize()
            case "stop":
                endpoint = self.sender._opened
                endpoint._agent = Late(endpoint._agent, arguments[0], int(arguments[1]))
            case "write":
                errors: list[str] = []
                name, seconds = RoundName(int(arguments[0]), int(arguments[1])), float(arguments[2])
                members = list(self.shares.sizes)
                await self.sender.write(name, members, seconds, lambda end: errors.append(end.error))
                return ", ".join(filter(None, errors)) or "done"
        return "done"

    async def live(self) -> None:
        name, card = self.sender.announcement()
        layout = msgspec.msgpack.encode(self.rank.layout)
        print(json.dumps({"layout": layout.hex(), "name": name, "card": card.hex()}), flush=True)
        lines = asyncio.StreamReader(limit=1 << 26)
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
        while line := (await lines.readline()).decode():
            print(await self.answer(*line.split()), flush=True)


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)
    warm_up(torch.device(sys.argv[1]))
    row_parallel.host_arena = partial(arena, device=torch.device(sys.argv[1]))  # type: ignore[assignment]
    asyncio.run(Process().live())
