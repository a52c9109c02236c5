"""A process that stands in for a vLLM server where many are needed: its routes, a real agent, real memory, no model.

Its main thread is engine core and worker in one: it performs calls one at a time and, while it is not paused, takes
*steps* between them. A step reads the whole weight memory and writes one line, "<monotonic seconds> <sha256>", to the
file SAID. No gate keeps a step from reading torn memory: that nobody resumes such an engine is what is tested. A resume
is refused as by ``agents.vllm.hold``, and a switch takes place as by ``agents.vllm.boundary``.

Arguments: port, config.json of the model, SAID.
"""

import functools
import hashlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from tiny_models import model_shapes
from weightsync.agents.inference.agent import InferenceAgent
from weightsync.agents.inference.calls import InitInfo, UpdateInfo, parse_switch_info
from weightsync.agents.memory.arena import host_arena, region_of
from weightsync.agents.vllm.ranks import EngineRanks
from weightsync.orchestrator.protocol.layout import Layout, Tensor, row

STEP_SECONDS = 0.01
HOST = "127.0.0.1"
GET = {"/is_paused", "/get_world_size", "/version"}
POST = {
    "/pause", "/collective_rpc", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights",
    "/finish_weight_update",
}  # fmt: skip


class Refused(Exception):
    """The answer is 500 with these words."""


class Memory:
    """All tensors of the checkpoint, bfloat16 and dense in one region, in the order of their names; a ``LiveModel``."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        tensors, rows, offset = [], [], 0
        for name, shape in sorted(shapes.items()):
            strides = (2 * shape[1], 2) if len(shape) == 2 else (2,)
            rows.append(row(len(tensors), 0, offset, (0,) * len(shape), shape, strides))
            tensors.append(Tensor(name, "bfloat16", shape))
            offset += 2 * int(np.prod(shape))
        self.tensors = (host_arena(offset).zero_(),)
        self.layout = Layout(tuple(tensors), (region_of(self.tensors[0]),), np.array(rows, dtype="<i8").tobytes())

    def said(self) -> str:
        return hashlib.sha256(self.tensors[0].numpy()).hexdigest()

    def refresh(self) -> None:
        pass  # nothing is derived

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        raise NotImplementedError("the file system brings nothing here")

    def rebalanced(self, known: str) -> None:
        return None


class Engine:
    """What the main thread does."""

    def __init__(self, memory: Memory, said: Path) -> None:
        self.calls: queue.SimpleQueue[tuple[Future[Any], str, dict[str, Any]]] = queue.SimpleQueue()
        self._memory, self._said = memory, said.open("a", buffering=1)
        self._agent = InferenceAgent(EngineRanks(0, 1), torch.device("cpu"), memory)
        self._paused, self._open = True, False

    def run(self) -> None:
        while True:
            try:
                answer, path, body = self.calls.get(timeout=None if self._paused else STEP_SECONDS)
            except queue.Empty:
                self._said.write(f"{time.monotonic():.4f} {self._memory.said()}\n")
                continue
            try:
                answer.set_result(self._perform(path, body))
            except Exception as error:
                self._open = False
                answer.set_exception(error)

    def _perform(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
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
                self._agent.begin(msgspec.convert(body["init_info"], InitInfo))
            case "/start_weight_update":
                self._open = True
            case "/update_weights":
                self._require(self._open, "weightsync: update_weights: call /start_weight_update first")
                self._require(self._paused, "weightsync: the engine is serving")
                self._agent.update(msgspec.convert(body["update_info"], UpdateInfo))
            case "/finish_weight_update":
                self._require(self._open or self._agent.may_run, "weightsync: call /start_weight_update first")
                self._open = False
        return {"status": "ok"}

    def _switch(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        order, began = parse_switch_info(kwargs), time.monotonic()
        me = self._agent.incarnation
        self._require(order.incarnations == {0: me}, f"weightsync: this is {me}, not {order.incarnations}")
        reason = self._agent.switchable(order)
        self._require(not reason, f"weightsync: {order.version} is not served: {reason}")
        before, self._paused = self._paused, True
        self._agent.switch(order)
        self._paused = before
        return {"paused": self._paused, "seconds": time.monotonic() - began}

    def _resume(self, incarnations: dict[str, int]) -> None:
        me = self._agent.incarnation
        self._require(incarnations == {"0": me}, f"weightsync: not servable: this is {me}, not {incarnations}")
        status = self._agent.status
        self._require(self._agent.may_run and not status.held, f"weightsync: not servable: {status}")
        self._paused = False

    @staticmethod
    def _require(holds: bool, words: str) -> None:
        if not holds:
            raise Refused(words)


class Routes(BaseHTTPRequestHandler):
    """The server's side: what vLLM's API server answers itself, and what the engine core must perform."""

    protocol_version = "HTTP/1.1"
    engine: Engine

    def do_OPTIONS(self) -> None:
        self._answer(405 if self.path in GET | POST else 404, {})

    def do_GET(self) -> None:
        self._called()

    def do_POST(self) -> None:
        self._called()

    def _called(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        path = self.path.partition("?")[0]
        match path:
            case "/get_world_size":
                self._answer(200, {"world_size": 1})
            case "/version":
                self._answer(200, {"version": "stand-in"})
            case _:
                answer: Future[dict[str, Any]] = Future()
                self.engine.calls.put((answer, path, body))
                try:
                    self._answer(200, answer.result())
                except Exception as error:
                    self._answer(500, {"error": {"message": str(error)}})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        if "OPTIONS" not in str(args[0]):
            print(f"{time.monotonic():.3f}", format % args, file=sys.stderr, flush=True)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True


def main() -> None:
    port, config, said = sys.argv[1:]
    engine = Engine(Memory(model_shapes(json.loads(Path(config).read_text()))), Path(said))
    routes = type("RoutesHere", (Routes,), {"engine": engine})
    server = Server((os.environ.get("STANDIN_HOST", HOST), int(port)), functools.partial(routes))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    engine.run()


if __name__ == "__main__":
    main()
