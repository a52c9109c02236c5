"""HTTP clients of the demo: for the engine's completions (tokens and log-probabilities) and the daemon's status."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import msgspec
from weightsync.orchestrator.cli.client import Denied, Unreachable, fetch
from weightsync.orchestrator.daemon.admin.views import RoundRow, RoundsView, StatusView
from weightsync.orchestrator.demo.setup import MODEL_NAME, TEXT

ANSWER_SECONDS: Final = 60.0
"""For one whole answer, a pause of the engine included."""

HELD_SECONDS: Final = 900.0
"""For the answers that wait until the engine holds its first version: longer than the demo waits for it."""

AFTER_FAILURE_SECONDS: Final = 1.0
"""Before a client asks again."""

BETWEEN_SECONDS: Final = 0.25
"""Between two requests of a client: on two cores the trainer would have to wait for clients that never rest."""

ASK_SECONDS: Final = 5.0
"""For one small question to the engine or the daemon."""

TOP_LOGPROBS: Final = 5
STREAMED_TOKENS: Final = 48
CHECKED_TOKENS: Final = 32
MAX_LINE_BYTES: Final = 1024 * 1024
"""One event of a stream; a chunk with a token and its log-probabilities has a few hundred."""

MAX_ROUNDS: Final = 10_000


class RequestFailed(Exception):
    """The engine refused, failed, or stopped in the middle of an answer."""


class TooSlow(RequestFailed):
    """The answer did not come in time; a busy machine may be all that is wrong."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One greedy completion; equality is bit for bit. ``top`` has the best candidates of each position."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[tuple[tuple[str, float], ...], ...]

    @property
    def text(self) -> str:
        """Its tokens as the bytes that they stand for."""
        return "".join(chr(token) if 32 <= token < 127 else "·" for token in self.tokens)


class EngineApi:
    """One vLLM server; ``key`` opens its admin routes."""

    def __init__(self, url: str, key: str = "") -> None:
        self._url = url
        self._admin = {"Authorization": f"Bearer {key}"}
        self._session = aiohttp.ClientSession(read_bufsize=MAX_LINE_BYTES)

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def healthy(self) -> bool:
        """Whether it answers requests by now."""
        try:
            async with self._session.get(f"{self._url}/health", timeout=_total(ASK_SECONDS)) as response:
                return response.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    async def paused(self) -> bool:
        """What ``/is_paused`` says.

        Raises:
            RequestFailed: it cannot be asked.
        """
        try:
            async with self._session.get(
                f"{self._url}/is_paused", headers=self._admin, timeout=_total(ASK_SECONDS), raise_for_status=True
            ) as response:
                return bool((await response.json())["is_paused"])
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError) as error:
            raise RequestFailed(f"/is_paused: {error}") from error

    async def complete(self, prompt: str, tokens: int, seconds: float = ANSWER_SECONDS) -> Answer:
        """A greedy completion of exactly ``tokens`` tokens.

        Raises:
            TooSlow: it needed more than ``seconds``.
            RequestFailed: it refused or failed.
        """
        try:
            async with self._session.post(
                f"{self._url}/v1/completions", json=_body(prompt, tokens, TOP_LOGPROBS), timeout=_total(seconds)
            ) as response:
                if response.status != 200:
                    raise RequestFailed(f"HTTP {response.status}: {(await response.text())[:200]}")
                choice = (await response.json())["choices"][0]
        except TimeoutError as error:
            raise TooSlow(f"no whole answer within {seconds:.0f} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error
        told = choice["logprobs"]
        top = tuple(tuple(position.items()) for position in told["top_logprobs"])
        return Answer(tuple(choice["token_ids"]), tuple(told["token_logprobs"]), top)

    async def stream(self, prompt: str, tokens: int, seconds: float) -> AsyncIterator[int]:
        """How many tokens came with each chunk of a streamed completion, as it comes.

        Raises:
            TooSlow: it needed more than ``seconds``.
            RequestFailed: it refused or failed.
        """
        ask = _body(prompt, tokens, 0) | {"stream": True}
        try:
            async with self._session.post(f"{self._url}/v1/completions", json=ask, timeout=_total(seconds)) as response:
                if response.status != 200:
                    raise RequestFailed(f"HTTP {response.status}: {(await response.text())[:200]}")
                async for line in response.content:
                    data = line.decode().strip().removeprefix("data: ")
                    if data and data != "[DONE]":
                        yield _tokens_in(json.loads(data))
        except TimeoutError as error:
            raise TooSlow(f"no whole answer within {seconds:.0f} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error


def _tokens_in(chunk: dict[str, Any]) -> int:
    if "error" in chunk:
        raise RequestFailed(str(chunk["error"])[:200])
    return len(chunk["choices"][0].get("token_ids") or ())


def _body(prompt: str, tokens: int, logprobs: int) -> dict[str, Any]:
    return {
        "model": MODEL_NAME,
        "prompt": list(prompt.encode()),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": logprobs,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def _total(seconds: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=seconds)


@dataclass
class Traffic:
    """Clients that stream completions one after the other, from before the first version to after the last.

    An answer that is too slow once no further ones are wanted is ``unfinished`` and no failure: the machine is busy.

    ``gap`` is the longest time in seconds that a client waited for its next token once the engine had begun to
    answer, the time from a request to its first token included. Times of day are unix time.
    """

    engine: EngineApi
    requests: int = 0
    tokens: int = 0
    gap: float = 0.0
    failures: list[str] = field(default_factory=list)
    unfinished: int = 0
    waiting: int = 0
    asked_at: float = 0.0
    first_token_at: float = 0.0
    _stop: bool = False

    async def run(self, clients: int) -> None:
        """Until ``stop``; requests under way are finished, not cut off."""
        self.asked_at = time.time()
        async with asyncio.TaskGroup() as group:
            for client in range(clients):
                group.create_task(self._client(client))

    def stop(self) -> None:
        """No further requests."""
        self._stop = True

    async def _client(self, number: int) -> None:
        while not self._stop:
            prompt = TEXT[(self.requests + number) % len(TEXT)][0]
            self.waiting += 0 if self.first_token_at else 1
            try:
                await self._one(prompt)
            except RequestFailed as error:
                if self._stop and isinstance(error, TooSlow):
                    self.unfinished += 1
                    return
                self.failures.append(str(error))
                await asyncio.sleep(AFTER_FAILURE_SECONDS)

    async def _one(self, prompt: str) -> None:
        before = time.monotonic() if self.first_token_at else None
        seconds = ANSWER_SECONDS if self.first_token_at else HELD_SECONDS
        received = 0
        async for count in self.engine.stream(prompt, STREAMED_TOKENS, seconds):
            if not count:
                continue
            now = time.monotonic()
            self.first_token_at = self.first_token_at or time.time()
            self.gap = max(self.gap, now - before if before is not None else 0.0)
            before, received = now, received + count
            self.tokens += count
        if received != STREAMED_TOKENS:
            raise RequestFailed(f"{received} of {STREAMED_TOKENS} tokens came")
        self.requests += 1
        await asyncio.sleep(BETWEEN_SECONDS)


class DaemonApi:
    """The daemon's own routes; None means that it did not answer."""

    def __init__(self, url: str, token: str) -> None:
        self._url, self._token = url, token

    async def rounds(self) -> Sequence[RoundRow] | None:
        """The finished rounds, oldest first."""
        data = await self._get(f"/rounds?last={MAX_ROUNDS}")
        return None if data is None else msgspec.json.decode(data, type=RoundsView).rounds

    async def status(self) -> StatusView | None:
        """The daemon at this moment."""
        data = await self._get("/status")
        return None if data is None else msgspec.json.decode(data, type=StatusView)

    async def _get(self, route: str) -> bytes | None:
        try:
            return await fetch(self._url + route, self._token, ASK_SECONDS)
        except (Unreachable, Denied):
            return None
