"""The engine client against vLLM's own routes, served by vLLM's own application; only the engine behind is a double."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from weightsync.orchestrator.daemon.engines.errors import EngineMisconfigured, EngineNotServable, EngineRefused
from weightsync.orchestrator.daemon.engines.interface import EngineSetup, HubAddress, RoundUpdate
from weightsync.orchestrator.daemon.engines.vllm import OPTIONAL, REQUIRED, VllmClient
from weightsync.orchestrator.protocol.names import RoundName, Version

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]

LONG = 30.0
"""Total deadline of a call, in seconds; nothing here takes so long."""

HUB = HubAddress("ws://h/agents", "glm")
UPDATE = RoundUpdate(RoundName(3, 9), Version(7, 40), 20.0)


class Engine:
    """Stands in for vLLM's AsyncLLM: what the routes call, and in which order."""

    def __init__(self) -> None:
        self.called: list[tuple[str, object]] = []
        self.paused = False
        self.version: str | None = "default"
        self.fail = ""
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(world_size=2, world_size_across_dp=4))

    async def pause_generation(self, **options: object) -> None:
        self.called.append(("pause", options))
        self.paused = True

    async def collective_rpc(self, **call: object) -> list[object]:
        self._may_fail()
        self.called.append(("collective_rpc", call))
        self.paused = False
        return []

    async def is_paused(self) -> bool:
        return self.paused

    async def init_weight_transfer_engine(self, request: Any) -> None:
        self._may_fail()
        self.called.append(("init", request.init_info))

    async def start_weight_update(self, **options: object) -> None:
        self.called.append(("start", options))

    async def update_weights(self, request: Any) -> None:
        self._may_fail()
        self.called.append(("update", request.update_info))

    async def finish_weight_update(self, version: str | None = None) -> None:
        self.called.append(("finish", version))
        self.version = version

    async def get_weight_version(self) -> str | None:
        return self.version

    def _may_fail(self) -> None:
        if self.fail:
            raise RuntimeError(self.fail)


@contextlib.asynccontextmanager
async def vllm_routes(engine: Engine, *, dev_mode: bool = True) -> AsyncIterator[str]:
    import uvicorn
    from fastapi import FastAPI
    from vllm.entrypoints.rl.online.api_router import router as rl
    from vllm.entrypoints.serve.dev.rpc.api_router import router as rpc
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
    from vllm.entrypoints.serve.instrumentator.basic import router as basic

    app = FastAPI()
    app.include_router(basic)
    if dev_mode:
        app.include_router(rl)
        app.include_router(rpc)
    init_exception_handler(app)

    app.state.engine_client = engine
    app.state.args = SimpleNamespace(log_error_stack=False)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        task = asyncio.create_task(server.serve([listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


@contextlib.asynccontextmanager
async def talking(engine: Engine, *, dev_mode: bool = True) -> AsyncIterator[VllmClient]:
    async with vllm_routes(engine, dev_mode=dev_mode) as url:
        client = VllmClient(EngineSetup("a", url, None, "keep", "recompute"))
        try:
            yield client
        finally:
            await client.close()


async def test_a_round_through_vllms_routes() -> None:
    engine = Engine()
    async with talking(engine) as client:
        facts = await client.probe(LONG)
        assert client.routes == REQUIRED.keys() | OPTIONAL.keys()
        assert facts.ranks == 4
        assert facts.server.removeprefix("vLLM ")
        assert facts.notes == ("tells its weight version",)
        await client.attach(HUB, LONG)
        await client.pause(LONG)
        assert await client.is_paused(LONG)
        await client.update(UPDATE, LONG)
        await client.finish(UPDATE.version, LONG)
        assert engine.version == "40"
        await client.resume({0: 2**62 + 1}, LONG)
        assert not await client.is_paused(LONG)
    assert sorted(name for name, _ in engine.called[1:3]) == ["pause", "start"], "at the same time"
    engine.called[1:3] = sorted(engine.called[1:3], key=lambda call: call[0])
    assert [name for name, _ in engine.called] == ["init", "pause", "start", "update", "finish", "collective_rpc"]
    resume = {"method": "weightsync_resume", "kwargs": {"incarnations": {"0": 2**62 + 1}}, "timeout": None, "args": ()}
    assert engine.called[5] == ("collective_rpc", resume)
    assert engine.called[0] == (
        "init",
        {"hub_url": "ws://h/agents", "run_id": "glm", "engine": "a", "world": 4},
    )
    assert engine.called[1] == ("pause", {"mode": "keep", "clear_cache": True})
    assert engine.called[3] == (
        "update",
        {
            "token": "3.9",
            "round_epoch": 3,
            "round_number": 9,
            "generation": 7,
            "step": 40,
            "deadline_seconds": 20.0,
            "exposes": True,
        },
    )


async def test_errors_of_workers_keep_their_words() -> None:
    engine = Engine()
    async with talking(engine) as client:
        await client.probe(LONG)
        engine.fail = "Call to collective_rpc method failed: digest differs on rank 1"
        with pytest.raises(EngineRefused, match="digest differs on rank 1"):
            await client.update(UPDATE, LONG)
        engine.fail = "Weight transfer not configured. Please set weight_transfer_config"
        with pytest.raises(EngineMisconfigured, match="--weight-transfer-config"):
            await client.attach(HUB, LONG)
        engine.fail = "weightsync: not servable: rank 0 holds no committed version"
        with pytest.raises(EngineNotServable, match="rank 0"):
            await client.resume({0: 2**62 + 1}, LONG)


async def test_without_dev_mode_it_says_so() -> None:
    async with talking(Engine(), dev_mode=False) as client:
        with pytest.raises(EngineMisconfigured, match="VLLM_SERVER_DEV_MODE=1"):
            await client.probe(LONG)
