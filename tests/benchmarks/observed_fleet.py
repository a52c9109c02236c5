"""Agents and engines of a whole fleet in one process, which say all words of a round and hold no weights.

Each trainer rank holds one tensor, each inference rank all of them: everybody writes to everybody. The control
connections, the engines' HTTP and the markers are the real ones; digests agree because all of them are the same.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from aiohttp import web
from weightsync.agents.link.client import ControlClient
from weightsync.orchestrator.protocol.edges import PeerTransfer
from weightsync.orchestrator.protocol.layout import Layout, Region, Tensor, row
from weightsync.orchestrator.protocol.limits import SCHEMA_VERSION
from weightsync.orchestrator.protocol.markers import encode_manifest, manifest
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Announce,
    Closed,
    Commit,
    Connect,
    EngineStatus,
    Expose,
    Exposed,
    FromDaemon,
    Grant,
    Hello,
    Left,
    Outcome,
    Quiesced,
    Ready,
    Staged,
    TrainerStatus,
    Verified,
    Verify,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Member, RoundName, Version

RUN: Final = "observed"
GENERATION: Final = 7
TENSOR_BYTES: Final = 128
HOST: Final = "127.0.0.1"
POST: Final = (
    "/pause", "/collective_rpc", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights",
    "/finish_weight_update",
)  # fmt: skip


def layout(holds: range, world: int) -> Layout:
    """Those of ``world`` tensors that are in ``holds``, dense in one region."""
    tensors = tuple(Tensor(f"model.layers.{number}.w", "bfloat16", (8, 8)) for number in range(world))
    rows = [row(number, 0, at * TENSOR_BYTES, (0, 0), (8, 8), (16, 2)) for at, number in enumerate(holds)]
    region = Region(1 << 30, TENSOR_BYTES * len(holds))
    return Layout(tensors, (region,), np.asarray(rows, dtype="<i8").tobytes())


class SpokenAgent:
    """One connection, and its task."""

    def __init__(self, url: str, token: Path) -> None:
        self.connected = asyncio.Event()
        self.client = ControlClient(url, token, self.hello, self.hear)
        self.running = asyncio.create_task(self.client.run())

    def hello(self) -> Hello:
        raise NotImplementedError

    def hear(self, message: FromDaemon) -> None:
        raise NotImplementedError


class Writer(SpokenAgent):
    """A trainer rank. ``outcome`` is called with what became of a version."""

    def __init__(self, rank: int, world: int, outcome: Callable[[Outcome], None], url: str, token: Path) -> None:
        self.member, self.world, self.outcome = Member("trainer", "", rank), world, outcome
        self.staged: Version | None = None
        super().__init__(url, token)

    def hello(self) -> Hello:
        return Hello(
            schema=SCHEMA_VERSION, run_id=RUN, member=self.member, world=self.world, generation=GENERATION,
            incarnation=1 + self.member.rank, trainer=TrainerStatus(staged=self.staged),
        )  # fmt: skip

    def stage(self, version: Version) -> None:
        self.staged = version
        self.client.send(Staged(version=version, bytes=TENSOR_BYTES, convert_seconds=0.0, digest_seconds=0.0))

    def hear(self, message: FromDaemon) -> None:
        match message:
            case Welcome():
                rank = self.member.rank
                self.client.send(Announce(layout=layout(range(rank, rank + 1), self.world), endpoint_name="t"))
            case Connect():
                self.client.send(Ready(fingerprint=message.fingerprint))
                self.connected.set()
            case Grant():
                peers = tuple(PeerTransfer(peer, TENSOR_BYTES, 1, 0.001, (1, 1)) for peer in message.members)
                self.client.send(Closed(round=message.round, peers=peers))
            case Outcome():
                self.outcome(message)


class Rank(SpokenAgent):
    """An inference rank; ``left`` is called when it has left a round, with whether it was committed."""

    def __init__(self, member: Member, world: int, tensors: int, left: Callable[[bool], None], url: str, token: Path):
        self.member, self.world, self.tensors, self.left = member, world, tensors, left
        self.applied: Version | None = None
        self.window: RoundName | None = None
        super().__init__(url, token)

    def hello(self) -> Hello:
        return Hello(
            schema=SCHEMA_VERSION, run_id=RUN, member=self.member, world=self.world, incarnation=1 + self.member.rank,
            engine=EngineStatus(self.applied, self.window),
        )  # fmt: skip

    def update(self, round_name: RoundName) -> None:
        self.window = round_name
        self.client.send(Quiesced(round=round_name))

    def hear(self, message: FromDaemon) -> None:
        match message:
            case Welcome():
                self.client.send(Announce(layout=layout(range(self.tensors), self.tensors), endpoint_name="i"))
            case Connect():
                self.client.send(Ready(fingerprint=message.fingerprint))
                self.connected.set()
            case Expose():
                self.client.send(Exposed(round=message.round))
            case Verify():
                digest, size = (self.tensors, self.tensors), self.tensors * TENSOR_BYTES
                self.client.send(
                    Verified(round=message.round, digest=digest, bytes=size, apply_seconds=0.0, digest_seconds=0.0)
                )
            case Commit() | Abort():
                if isinstance(message, Commit):
                    self.applied = message.version
                self.window = None
                self.client.send(Left(round=message.round, status=EngineStatus(self.applied)))
                self.left(isinstance(message, Commit))


class SpokenEngine:
    """A server with vLLM's admin routes, and its ranks, which come when the daemon has introduced itself."""

    def __init__(self, name: str, ranks: int, tensors: int, url: str, token: Path) -> None:
        self.name, self._world, self._tensors, self._url, self._token = name, ranks, tensors, url, token
        self.ranks: list[Rank] = []
        self._paused = True
        self._left: asyncio.Queue[bool] = asyncio.Queue()

    def attach(self) -> None:
        if not self.ranks:
            self.ranks = [
                Rank(Member("inference", self.name, number), self._world, self._tensors, self._left.put_nowait,
                     self._url, self._token)
                for number in range(self._world)
            ]  # fmt: skip

    async def serve(self) -> int:
        """Its port."""
        app = web.Application()
        for path in ("/get_world_size", "/is_paused"):
            app.router.add_get(path, self._answer, allow_head=False)
        for path in POST:
            app.router.add_post(path, self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, HOST, 0).start()
        return int(self._runner.addresses[0][1])

    async def close(self) -> None:
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        body: dict[str, Any] = await request.json() if request.can_read_body else {}
        match request.path:
            case "/get_world_size":
                return web.json_response({"world_size": self._world})
            case "/is_paused":
                return web.json_response({"is_paused": self._paused})
            case "/pause":
                self._paused = True
            case "/collective_rpc":
                self._paused = False
            case "/init_weight_transfer_engine":
                self.attach()
            case "/update_weights":
                info = body["update_info"]
                for rank in self.ranks:
                    rank.update(RoundName(info["round_epoch"], info["round_number"]))
                committed = [await self._left.get() for _ in self.ranks]
                return web.json_response({"status": "ok"}, status=200 if all(committed) else 500)
        return web.json_response({"status": "ok"})


class SpokenFleet:
    """``trainers`` writers and ``engines`` of ``ranks`` each."""

    def __init__(self, trainers: int, engines: int, ranks: int, url: str, credentials: Path) -> None:
        self._world, self._url, self._credentials = trainers, url, credentials
        token = credentials / "engine.token"
        self.engines = [SpokenEngine(f"e{number}", ranks, trainers, url, token) for number in range(engines)]
        self._writers: list[Writer] = []
        self._outcomes: asyncio.Queue[Outcome] = asyncio.Queue()

    async def start_trainer(self) -> None:
        """Returns when the whole fleet has met."""
        token = self._credentials / "trainer.token"
        self._writers = [
            Writer(rank, self._world, self._outcomes.put_nowait, self._url, token) for rank in range(self._world)
        ]
        await asyncio.gather(*(writer.connected.wait() for writer in self._writers))
        await asyncio.gather(*(rank.connected.wait() for engine in self.engines for rank in engine.ranks))

    async def publish(self, step: int, run_directory: Path) -> None:
        """Stage and mark a step, and wait until every writer knows that it is committed."""
        version = Version(GENERATION, step)
        for writer in self._writers:
            writer.stage(version)
        folder = run_directory / "broadcasts" / f"step_{step}"
        folder.mkdir(parents=True)
        (folder / "STABLE").write_bytes(encode_manifest(manifest(RUN, version)))
        for _ in self._writers:
            outcome = await self._outcomes.get()
            assert outcome.committed, outcome
            assert outcome.version == version, outcome

    async def close(self) -> None:
        agents = [*self._writers, *(rank for engine in self.engines for rank in engine.ranks)]
        await asyncio.gather(*(agent.client.close() for agent in agents))
        await asyncio.gather(*(agent.running for agent in agents))
        await asyncio.gather(*(engine.close() for engine in self.engines))
