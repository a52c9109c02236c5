"""The demo's clients against a server that answers as vLLM does, and as it must not."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web
from weightsync.orchestrator.demo import client as demo_client
from weightsync.orchestrator.demo.client import (
    STREAMED_TOKENS,
    DaemonApi,
    EngineApi,
    RequestFailed,
    TooSlow,
    Traffic,
)

CHOICE = {
    "token_ids": [104, 10],
    "logprobs": {"token_logprobs": [-0.25, -0.5], "top_logprobs": [{"token_id:104": -0.25}, {"token_id:10": -0.5}]},
}


class Engine:
    """``completion`` decides how a request is answered; ``asked`` has the bodies of all requests."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.status, self.silent = 200, False
        self.chunks: list[str] = []
        self.on_stream: Callable[[], None] = lambda: None

    async def completion(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        if self.silent:
            await asyncio.Event().wait()
        if self.status != 200:
            return web.Response(status=self.status, text="not servable")
        if not self.asked[-1].get("stream"):
            return web.json_response({"choices": [CHOICE]})
        self.on_stream()
        response = web.StreamResponse()
        await response.prepare(request)
        for chunk in self.chunks:
            await response.write(f"data: {chunk}\n\n".encode())
        return response


def tokens(count: int) -> str:
    return json.dumps({"choices": [{"token_ids": [1] * count}]})


@contextlib.asynccontextmanager
async def served(engine: Engine) -> AsyncIterator[str]:
    async def paused(request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != "Bearer the-key":
            raise web.HTTPUnauthorized
        return web.json_response({"is_paused": True})

    async def refused(_: web.Request) -> web.Response:
        return web.Response(status=401)

    app = web.Application()
    app.router.add_post("/v1/completions", engine.completion)
    app.router.add_get("/is_paused", paused)
    app.router.add_get("/status", refused)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def api(engine: Engine) -> AsyncIterator[EngineApi]:
    async with served(engine) as url:
        client = EngineApi(url, "the-key")
        try:
            yield client
        finally:
            await client.close()


async def test_a_greedy_completion_with_its_log_probabilities() -> None:
    engine = Engine()
    async with api(engine) as client:
        answer = await client.complete("ab", 2)
        assert await client.paused()
        assert not await client.healthy(), "it has no /health"
        stranger = EngineApi(client._url, "another")
        with pytest.raises(RequestFailed, match="401"):
            await stranger.paused()
        await stranger.close()
    assert (answer.tokens, answer.logprobs, answer.text) == ((104, 10), (-0.25, -0.5), "h·")
    assert answer.top == ((("token_id:104", -0.25),), (("token_id:10", -0.5),))
    assert engine.asked[0]["prompt"] == [97, 98]
    assert (engine.asked[0]["temperature"], engine.asked[0]["max_tokens"]) == (0, 2)


async def test_a_refusal_is_told_with_its_text() -> None:
    engine = Engine()
    engine.status = 503
    async with api(engine) as client:
        with pytest.raises(RequestFailed, match="HTTP 503: not servable"):
            await client.complete("ab", 2)
        with pytest.raises(RequestFailed, match="HTTP 503"):
            _ = [count async for count in client.stream("ab", 2, 5)]


async def test_streamed_tokens_are_counted_and_an_error_within_the_stream_is_one() -> None:
    engine = Engine()
    async with api(engine) as client:
        engine.chunks = [tokens(2), tokens(0), tokens(1), "[DONE]"]
        assert [count async for count in client.stream("ab", 3, 5)] == [2, 0, 1]
        engine.chunks = [tokens(1), '{"error": "engine died"}']
        with pytest.raises(RequestFailed, match="engine died"):
            _ = [count async for count in client.stream("ab", 3, 5)]


async def test_traffic_counts_whole_answers_and_stops_between_two() -> None:
    engine = Engine()
    engine.chunks = [tokens(STREAMED_TOKENS - 1), tokens(1)]
    async with api(engine) as client:
        traffic = Traffic(client)
        engine.on_stream = lambda: traffic.stop() if len(engine.asked) == 3 else None
        await traffic.run(1)
    assert (traffic.requests, traffic.tokens, traffic.failures) == (3, 3 * STREAMED_TOKENS, [])
    assert traffic.asked_at <= traffic.first_token_at


async def test_an_answer_that_is_too_slow_is_a_failure_unless_nobody_wants_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A busy machine at the end of the demo proves nothing; before it, a client has waited in vain."""
    engine = Engine()
    async with api(engine) as client:

        async def slow(*_: Any) -> AsyncIterator[int]:
            traffic.tokens += 1
            if traffic.tokens == 2:
                traffic.stop()
            raise TooSlow("no whole answer within 60 s")
            yield 0

        monkeypatch.setattr(client, "stream", slow)
        monkeypatch.setattr(demo_client, "AFTER_FAILURE_SECONDS", 0.0)
        traffic = Traffic(client)
        await traffic.run(1)
        assert (traffic.failures, traffic.unfinished) == (["no whole answer within 60 s"], 1)
    engine.silent = True
    async with api(engine) as client:
        with pytest.raises(TooSlow, match="no whole answer within 0 s"):
            await client.complete("ab", 2, 0.05)
        with pytest.raises(TooSlow):
            _ = [count async for count in client.stream("ab", 2, 0.05)]


async def test_a_daemon_that_does_not_answer_is_none() -> None:
    async with served(Engine()) as url:
        daemon = DaemonApi(url, "token")
        assert await daemon.status() is None, "it refuses the token"
        assert await daemon.rounds() is None, "it has no such route"
