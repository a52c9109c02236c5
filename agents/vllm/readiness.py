"""``GET /weightsync/ready`` of a vLLM server: 200 while it serves, 503 and why while it is held, torn or paused.

vLLM's own ``/health`` says that its processes live, so a load balancer that asks there sends requests to an engine that
queues them. The server takes this in by an argument: ``--middleware weightsync.agents.vllm.readiness.Readiness``.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from weightsync.agents.vllm.hold import READY

PATH: Final = "/weightsync/ready"

ANSWER_SECONDS: Final = 5.0
"""The engine core answers between two steps; inside a round's update call it answers when that is over."""

Message = MutableMapping[str, Any]


class Readiness:
    """ASGI middleware around vLLM's application; every other request passes it untouched.

    Args:
        app: what it is around.
        seconds: total wait for the engine core's answer.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], seconds: float = ANSWER_SECONDS) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        """As ASGI calls it."""
        if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "GET":
            await self._app(scope, receive, send)
            return
        reason = await self._reason(getattr(scope["app"].state, "engine_client", None))
        body = json.dumps({"ready": not reason, "reason": reason}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 503 if reason else 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _reason(self, engine: Any) -> str:
        """Why the engine does not serve; empty when it does."""
        if engine is None:
            return "the server has no engine yet"
        try:
            async with asyncio.timeout(self._seconds):
                await engine.collective_rpc(READY)
        except TimeoutError:
            return f"the engine has not answered within {self._seconds:g} s: it is inside a round, or overloaded"
        except Exception as error:  # vLLM wraps what the engine core raised in types of its own
            return str(error) or type(error).__name__
        return ""
