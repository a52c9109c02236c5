"""A stand-in for a vLLM server: its admin routes over HTTP, and one rank with the real agent and real NIXL.

The rank's memory is that of ``tiny_fleet.Target``. What stands for vLLM's main thread is one worker thread: it answers
calls one after another, also those that change weights. The scheduler is a flag, held from the start as our plugin
holds vLLM, and released only for the incarnation that is meant and while the weights are whole. Before a version is
served, every byte of the rank is compared with it; a wrong one ends the process.
"""

import argparse
import asyncio
import json
import os
import signal
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import counts
import torch
from aiohttp import web
from soak_model import masters
from tiny_fleet import Target
from weightsync.agents.inference.agent import InferenceAgent
from weightsync.agents.inference.calls import InitInfo, UpdateInfo, parse_init_info, parse_update_info
from weightsync.agents.vllm.ranks import EngineRanks
from weightsync.orchestrator.protocol.layout import Layout

HOST = "127.0.0.1"
WRONG_BYTES = 3
"""Exit code."""


@dataclass
class Memory:
    """``calls.LiveModel`` of a Target."""

    target: Target

    @property
    def layout(self) -> Layout:
        return self.target.layout

    @property
    def tensors(self) -> Sequence[torch.Tensor]:
        return self.target.memory

    def refresh(self) -> None:
        """Nothing is derived."""

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        raise NotImplementedError("only NIXL writes here")

    def rebalanced(self, known: str) -> None:
        return None


class Server:
    """The routes. ``paused`` is the scheduler's flag, ``open`` whether an update was started."""

    def __init__(self, name: str) -> None:
        self.target = Target.of(name, 0, staging=0)
        self.agent = InferenceAgent(EngineRanks(0, 1), torch.device("cpu"), Memory(self.target))
        self.paused, self.open = True, False
        self._worker = ThreadPoolExecutor(1)

    def application(self) -> web.Application:
        app = web.Application()
        for path in ("/pause", "/collective_rpc", "/init_weight_transfer_engine", "/start_weight_update",
                     "/update_weights", "/finish_weight_update"):  # fmt: skip
            app.router.add_post(path, self.handle)
        for path in ("/is_paused", "/get_world_size"):
            app.router.add_get(path, self.handle, allow_head=False)
        return app

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else {}
        try:
            return web.json_response(await self._answer(request.path, body))
        except Exception as error:  # as vLLM answers for whatever its workers raise
            return web.json_response({"error": f"{type(error).__name__}: {error}"}, status=500)

    async def _answer(self, path: str, body: Any) -> dict[str, Any]:
        match path:
            case "/get_world_size":
                return {"world_size": 1}
            case "/is_paused":
                return {"is_paused": self.paused}
            case "/pause":
                self.paused = True
            case "/start_weight_update":
                self.open = True
            case "/init_weight_transfer_engine":
                info = parse_init_info(body["init_info"])
                await self._on_the_worker(self.agent.begin, info)
            case "/update_weights":
                await self._update(parse_update_info(body["update_info"], UpdateInfo))
            case "/finish_weight_update":
                self.open = False
                self._judge(int(body["weight_version"]))
            case "/collective_rpc":
                self._resume(body["kwargs"]["incarnations"]["0"])
                return {"results": [None]}
        return {"status": "ok"}

    async def _update(self, info: UpdateInfo) -> None:
        if not self.open:
            raise RuntimeError("weightsync: update_weights without an open update; call /start_weight_update first")
        if not self.paused:
            raise RuntimeError("weightsync: the engine is serving")
        try:
            await self._on_the_worker(self.agent.update, info)
        except Exception:
            self.open = False
            raise

    def _judge(self, step: int) -> None:
        try:
            self.target.check(masters(step))
        except AssertionError:
            print(f"step {step}: the memory holds something else", flush=True)
            os._exit(WRONG_BYTES)

    def _resume(self, incarnation: int) -> None:
        agent = self.agent
        if incarnation != agent.incarnation or not agent.may_run or agent.status.held:
            raise RuntimeError(f"weightsync: not servable: {agent.status}, of {agent.incarnation} for {incarnation}")
        applied = agent.status.applied
        assert applied is not None
        self._judge(applied.step)
        self.paused = False

    async def _on_the_worker(self, call: Any, info: InitInfo | UpdateInfo) -> None:
        await asyncio.get_running_loop().run_in_executor(self._worker, call, info)


async def serve(name: str, port: int) -> None:
    server = Server(name)
    runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    await web.TCPSite(runner, HOST, port).start()
    print(json.dumps({"serves": name, "port": port}), flush=True)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await runner.cleanup()
    await asyncio.to_thread(server.agent.close)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("name")
    arguments.add_argument("port", type=int)
    given = arguments.parse_args()
    counts.install()
    torch.set_num_threads(1)
    asyncio.run(serve(given.name, given.port))


if __name__ == "__main__":
    main()
