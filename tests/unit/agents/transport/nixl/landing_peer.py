"""An engine's rank as a process of its own: ``landing_peer.py NUMBER OF LANDING LANDS``.

Prints one JSON line with its layout, endpoint name and card, and polls until its standard input closes. Each line on it
is answered by one: ``connect HEX``, ``begin EPOCH NUMBER``, ``end EPOCH NUMBER``, ``arrive`` (with what goes wrong),
``digest`` (of the receiver, as JSON), ``memory`` (in hex), ``clear``. After ``SIGSTOP N`` or ``SIGKILL N`` it sends
that signal to itself when it hears that chunk N has landed, before anything is done about it; after ``SEVER N`` it
breaks all its TCP connections then. Several for one chunk are done in the order in which they came.
"""

import asyncio
import json
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import msgspec
import row_parallel
from nixl_peer import sever
from weightsync.agents.errors import AgentError
from weightsync.agents.transport.nixl.notices import Notice
from weightsync.agents.transport.nixl.receiver import NixlReceiver
from weightsync.orchestrator.protocol.messages import Connect, NixlSettings
from weightsync.orchestrator.protocol.names import RoundName, Version


class Process:
    def __init__(self, number: int, of: int, landing: int, lands: str) -> None:
        self.rank = row_parallel.target(number, of, landing, lands)
        self.receiver = NixlReceiver(self.rank.target())
        self.receiver.open(NixlSettings())
        self.at_chunk: defaultdict[int, list[Callable[[], None]]] = defaultdict(list)
        endpoint = self.receiver._opened
        self.heard, endpoint.heard = endpoint.heard, self.hears

    def hears(self, peer: str, notice: Notice) -> None:
        for do in self.at_chunk.pop(notice.chunk, ()):
            do()
        self.heard(peer, notice)

    def introduction(self) -> str:
        name, card = self.receiver.announcement()
        layout = msgspec.msgpack.encode(self.rank.layout)
        return json.dumps({"layout": layout.hex(), "name": name, "card": card.hex()})

    async def answer(self, word: str, *arguments: str) -> str:
        match word:
            case "connect":
                connect = msgspec.msgpack.decode(bytes.fromhex(arguments[0]), type=Connect)
                failed = await self.receiver.connect(connect)
                return str({str(member): str(error) for member, error in failed.items()})
            case "begin":
                self.receiver.begin(RoundName(*map(int, arguments)))
            case "end":
                self.receiver.end(RoundName(*map(int, arguments)))
            case "arrive":
                try:
                    self.receiver.arrive(Version(1, 1))
                except AgentError as error:
                    return f"{type(error).__name__}: {error}"
            case "digest":
                return json.dumps(self.receiver.digest())
            case "memory":
                return self.rank.memory[0].numpy().tobytes().hex()
            case "clear":
                self.rank.memory[0].zero_()
            case "SIGSTOP" | "SIGKILL":
                self.at_chunk[int(arguments[0])].append(partial(os.kill, os.getpid(), signal.Signals[word]))
            case "SEVER":
                self.at_chunk[int(arguments[0])].append(sever)
        return "done"

    async def live(self) -> None:
        print(self.introduction(), flush=True)
        lines = asyncio.StreamReader(limit=1 << 26)
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
        polling = asyncio.create_task(self.poll())
        while line := (await lines.readline()).decode():
            print(await self.answer(*line.split()), flush=True)
        polling.cancel()

    async def poll(self) -> None:
        while True:
            self.receiver.poll()
            await asyncio.sleep(0.001)


if __name__ == "__main__":
    number, of, landing = map(int, sys.argv[1:4])
    asyncio.run(Process(number, of, landing, sys.argv[4]).live())
