"""What a load balancer is told; the application behind is a double, as ASGI calls it."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from weightsync.agents.vllm.hold import READY
from weightsync.agents.vllm.readiness import PATH, Readiness


class Engine:
    def __init__(self, error: Exception | None = None, *, silent: bool = False) -> None:
        self.error, self.silent, self.asked = error, silent, 0

    async def collective_rpc(self, method: str) -> list[Any]:
        assert method == READY
        self.asked += 1
        if self.silent:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        return []


passed: list[str] = []


async def application(scope: Any, receive: Any, send: Any) -> None:
    passed.append(scope["path"])


async def get(engine: Engine | None, path: str = PATH, method: str = "GET", kind: str = "http") -> tuple[int, Any]:
    """Status and body of the middleware's answer; (0, None) where it passes the request on."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    state = SimpleNamespace() if engine is None else SimpleNamespace(engine_client=engine)
    scope = {"type": kind, "path": path, "method": method, "app": SimpleNamespace(state=state)}
    await Readiness(application, seconds=0.05)(scope, None, send)  # type: ignore[arg-type]
    if not sent:
        return 0, None
    start, body = sent
    assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()
    return start["status"], json.loads(body["body"])


async def test_an_engine_that_serves_is_ready() -> None:
    assert await get(Engine()) == (200, {"ready": True, "reason": ""})


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (Engine(RuntimeError("weightsync: not serving: rank 0: torn")), "weightsync: not serving: rank 0: torn"),
        (Engine(ValueError()), "ValueError"),
        (Engine(silent=True), "the engine has not answered within 0.05 s: it is inside a round, or overloaded"),
        (None, "the server has no engine yet"),
    ],
)
async def test_any_other_is_not_and_says_why(engine: Engine | None, reason: str) -> None:
    assert await get(engine) == (503, {"ready": False, "reason": reason})


@pytest.mark.parametrize(
    "request_",
    [{"path": "/health"}, {"path": PATH + "/"}, {"method": "POST"}, {"kind": "websocket"}],
    ids=["path", "slash", "method", "kind"],
)
async def test_everything_else_passes(request_: dict[str, str]) -> None:
    passed.clear()
    engine = Engine()
    assert await get(engine, **request_) == (0, None)
    assert (len(passed), engine.asked) == (1, 0)
