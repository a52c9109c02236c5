"""What stands in for a vLLM server where many or lasting ones are needed: its admin routes, a real agent, no model.

The main thread is engine core and worker in one: it performs calls one after another, also those that change weights,
and takes *steps* between them while the scheduler is not paused. No gate keeps a step from reading torn memory: that
nobody resumes such an engine is what is tested. The scheduler is paused from the start, as our plugin holds vLLM, and a
resume is refused as by ``agents.vllm.hold``, and a switch takes place as by ``agents.vllm.boundary``.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any, Protocol

import msgspec
import torch
from aiohttp import web
from weightsync.agents.inference.agent import InferenceAgent
from weightsync.agents.inference.calls import LiveModel, UpdateInfo, parse_init_info, parse_switch_info
from weightsync.agents.vllm.ranks import EngineRanks
from weightsync.orchestrator.protocol.names import Version

STEP_SECONDS = 0.01
PAUSED_SECONDS = 0.5
POST = (
    "/pause", "/collective_rpc", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights",
    "/finish_weight_update",
)  # fmt: skip
ENDED = "end"
"""In the place of a path: the last call."""


class Refused(Exception):
    """The answer is 500 with these words."""


class Model(LiveModel, Protocol):
    """What an engine holds."""

    def step(self) -> None:
        """A batch: read the whole memory."""

    def resumed(self, applied: Version) -> None:
        """It is about to serve this version."""


class Dense:
    """What is the same for any ``Model`` here."""

    def check(self) -> None:
        """Nothing moves."""

    def refresh(self) -> None:
        """Nothing is derived."""

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        raise NotImplementedError("the file system brings nothing here")

    def rebalanced(self, known: str) -> None:
        return None


class Engine:
    """One rank and its scheduler."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._agent = InferenceAgent(EngineRanks(0, 1), torch.device("cpu"), model)
        self._calls: queue.SimpleQueue[tuple[Future[Any], str, dict[str, Any]]] = queue.SimpleQueue()
        self._paused, self._open, self._ends = True, False, False

    def ask(self, path: str, body: dict[str, Any]) -> "Future[dict[str, Any]]":
        """From any thread: what the engine answers, or what its worker raises."""
        answer: Future[dict[str, Any]] = Future()
        self._calls.put((answer, path, body))
        return answer

    def end(self) -> None:
        """From another thread than ``run``'s: close the agent, which ends an update call, and perform nothing more."""
        self._ends = True
        self._agent.close()
        self.ask(ENDED, {})

    def run(self) -> None:
        """Until ``end``."""
        while True:
            try:
                # Never for good: a signal's handler runs in this thread, and one that comes just before a wait begins
                # runs after it.
                answer, path, body = self._calls.get(timeout=PAUSED_SECONDS if self._paused else STEP_SECONDS)
            except queue.Empty:
                if not self._paused:
                    self._model.step()
                continue
            if path == ENDED:
                return
            try:
                answer.set_result(self._perform(path, body))
            except Exception as error:
                self._open = False
                answer.set_exception(error)

    def _perform(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        _require(not self._ends, "weightsync: the engine ends")  # an introduction would begin another agent
        match path:
            case "/is_paused":
                return {"is_paused": self._paused}
            case "/pause":
                self._paused = True
            case "/collective_rpc" if body["method"] == "weightsync_switch":
                return {"results": [self._switch(body["kwargs"])]}
            case "/collective_rpc":
                self._resume(body["kwargs"]["incarnations"])
            case "/init_weight_transfer_engine":
                self._agent.begin(parse_init_info(body["init_info"]))
            case "/start_weight_update":
                self._open = True
            case "/update_weights":
                _require(self._open, "weightsync: update_weights: call /start_weight_update first")
                _require(self._paused, "weightsync: the engine is serving")
                self._agent.update(msgspec.convert(body["update_info"], UpdateInfo))
            case "/finish_weight_update":
                _require(self._open or self._agent.may_run, "weightsync: call /start_weight_update first")
                self._open = False
        return {"status": "ok"}

    def _switch(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        order, began = parse_switch_info(kwargs), time.monotonic()
        me = self._agent.incarnation
        _require(order.incarnations == {0: me}, f"weightsync: this is {me}, not {order.incarnations}")
        reason = self._agent.ready(order) or self._agent.switchable(order)
        _require(not reason, f"weightsync: {order.version} is not served: {reason}")
        before, self._paused = self._paused, True
        self._agent.switch(order)
        self._paused = before
        return {"paused": self._paused, "seconds": time.monotonic() - began}

    def _resume(self, incarnations: dict[str, int]) -> None:
        me, status = self._agent.incarnation, self._agent.status
        _require(incarnations == {"0": me}, f"weightsync: not servable: this is {me}, not {incarnations}")
        _require(self._agent.may_run and not status.held, f"weightsync: not servable: {status}")
        assert status.applied is not None
        self._model.resumed(status.applied)
        self._paused = False


def serve(engine: Engine, host: str, port: int) -> None:
    """Answer over HTTP from now on, on a thread of its own: what vLLM's API server answers itself, and its engine."""
    threading.Thread(target=lambda: asyncio.run(_serve(engine, host, port)), daemon=True).start()


async def _serve(engine: Engine, host: str, port: int) -> None:
    async def world_size(request: web.Request) -> web.Response:
        return web.json_response({"world_size": 1})

    async def called(request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else {}
        try:
            return web.json_response(await asyncio.wrap_future(engine.ask(request.path, body)))
        except Exception as error:  # as vLLM answers for whatever its workers raise
            return web.json_response({"error": {"message": str(error)}}, status=500)

    app = web.Application()
    app.router.add_get("/get_world_size", world_size, allow_head=False)
    app.router.add_get("/is_paused", called, allow_head=False)
    for path in POST:
        app.router.add_post(path, called)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    await asyncio.Event().wait()


def _require(holds: bool, words: str) -> None:
    if not holds:
        raise Refused(words)
