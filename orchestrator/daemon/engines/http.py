"""One bounded HTTP exchange with an engine: total deadline, capped body, no redirect, typed errors."""

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import aiohttp
import msgspec
from weightsync.orchestrator.daemon.engines.errors import EngineRefused, EngineTimeout, EngineUnreachable
from weightsync.orchestrator.daemon.tracing import traceparent
from weightsync.orchestrator.protocol.proof import ADMIN_HEADER
from weightsync.orchestrator.protocol.text import clean

MAX_ANSWER_BYTES: Final = 16 * 1024 * 1024
"""The largest answer that is read is a server's OpenAPI document, under 1 MiB."""

MAX_EXCERPT_CHARS: Final = 1000
"""Of a refusal's body in an error: enough for a message from each rank, too little for a page of HTML."""

MAX_READ_FOR_EXCERPT: Final = 64 * 1024
"""Of a refusal's body, larger ones are shown and not parsed: the loop has other things to do."""

MIN_KEY_CHARS: Final = 6
"""Shorter ones are in too many words to be searched for."""

MAX_CONNECTIONS: Final = 8
"""To one engine at a time: the update call and a probe beside it, with room for the routes' probing."""

ATTEMPTS: Final = 4
"""Of an idempotent call, within its deadline; a server restart behind a proxy shows as one or two failures. aiohttp
repeats a GET whose connection broke once by itself, so that the server may see twice as many of those."""

BACKOFF_SECONDS: Final = 0.1
"""Before the second attempt; doubles with each further one."""

_TRY_AGAIN: Final = frozenset({502, 503, 504})
"""A proxy's word that the server did not answer."""


class EngineHttp:
    """Exchanges with the server at ``url``. Made inside a running loop; ``close`` ends its connections."""

    def __init__(
        self,
        name: str,
        url: str,
        api_key: str | None,
        tls: ssl.SSLContext | None = None,
        admin_keys: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self.name, self._admin_keys, self._api_key = name, admin_keys, api_key
        self._url = url.rstrip("/")
        # identity, and no decompression below: the cap on a body must hold for what it unpacks to.
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self._session = aiohttp.ClientSession(
            # A connection of its own per call: the server closes idle ones after 5 s, and a call sent into one that is
            # closing could not be told from a call that was lost.
            connector=aiohttp.TCPConnector(limit=MAX_CONNECTIONS, force_close=True, ssl=tls or True),
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None),  # Ours covers the retries too.
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),  # nothing of one call may show in another
        )

    async def close(self) -> None:
        """Ends all connections."""
        await self._session.close()

    async def exchange(
        self,
        method: str,
        path: str,
        deadline_seconds: float,
        *,
        body: Mapping[str, object] | None = None,
        query: Mapping[str, str] | None = None,
        idempotent: bool,
    ) -> bytes:
        """The body of a successful answer.

        Raises:
            EngineUnreachable, EngineTimeout, EngineRefused.
        """
        status, data = await self.ask(method, path, deadline_seconds, body=body, query=query, idempotent=idempotent)
        if not 200 <= status < 300:
            raise EngineRefused(self.name, f"{method} {path}", status, excerpt_of(data))
        return data

    async def ask(
        self,
        method: str,
        path: str,
        deadline_seconds: float,
        *,
        body: Mapping[str, object] | None = None,
        query: Mapping[str, str] | None = None,
        idempotent: bool,
    ) -> tuple[int, bytes]:
        """Status and body of an answer that is no redirect.

        An idempotent call is repeated after a broken connection and after a proxy's 502 to 504, at most ATTEMPTS times;
        any other only when the connection could not be made, so that nothing was sent.

        Raises:
            EngineUnreachable, EngineTimeout, EngineRefused (a redirect, or a body over MAX_ANSWER_BYTES).
        """
        call = f"{method} {path}"
        try:
            async with asyncio.timeout(deadline_seconds):
                for attempt in range(1, ATTEMPTS + 1):
                    last = attempt == ATTEMPTS
                    try:
                        status, data = await self._once(method, path, body, query)
                    except EngineUnreachable as error:
                        if last or (error.sent and not idempotent):
                            raise
                    else:
                        if last or not idempotent or status not in _TRY_AGAIN:
                            return status, data
                    await asyncio.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1))
        except TimeoutError as error:
            raise EngineTimeout(self.name, call, deadline_seconds) from error
        raise AssertionError("the last attempt returns or raises")

    async def _once(
        self, method: str, path: str, body: Mapping[str, object] | None, query: Mapping[str, str] | None
    ) -> tuple[int, bytes]:
        call = f"{method} {path}"
        payload = None if body is None else msgspec.json.encode(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        if context := traceparent.get():
            headers["traceparent"] = context
        keys = self._admin_keys()
        if keys:
            headers[ADMIN_HEADER] = ",".join(keys)
        shown = (*keys, self._api_key or "")
        try:
            async with self._session.request(
                method, self._url + path, params=query, data=payload, headers=headers, allow_redirects=False
            ) as response:
                # Followed, it would carry our key to wherever the answer says.
                if 300 <= response.status < 400:
                    where = _without(response.headers.get("Location", "elsewhere"), shown)
                    what = f"a redirect to {where[:MAX_EXCERPT_CHARS]}, which is not followed; set the engine's own url"
                    raise EngineRefused(self.name, call, response.status, what)
                return response.status, await self._body(response, call, shown)
        except (aiohttp.ClientConnectorError, aiohttp.InvalidURL) as error:
            reason = _reason(error)
            raise EngineUnreachable(self.name, call, f"{self._url} cannot be reached: {reason}", sent=False) from error
        except (aiohttp.ClientError, ConnectionError) as error:
            text = clean(_without(str(error), shown), MAX_EXCERPT_CHARS) or type(error).__name__
            raise EngineUnreachable(self.name, call, f"the connection broke: {text}") from error

    async def _body(self, response: aiohttp.ClientResponse, call: str, shown: Sequence[str]) -> bytes:
        data = bytearray()
        async for chunk in response.content.iter_any():
            data += chunk
            if len(data) > MAX_ANSWER_BYTES:
                response.close()  # the rest is not read, so the connection cannot be used again
                what = (
                    f"a body over {MAX_ANSWER_BYTES} bytes, beginning with {excerpt_of(_withheld(data[:100], shown))}"
                )
                raise EngineRefused(self.name, call, response.status, what)
        return _withheld(data, shown)


def _withheld(data: bytearray, shown: Sequence[str]) -> bytes:
    """``data`` without the keys that were shown to whoever sent it: what an answer says comes into log and status, and
    a proxy may repeat a request's headers."""
    found = bytes(data)
    for key in shown:
        if len(key) >= MIN_KEY_CHARS:
            found = found.replace(key.encode(), b"[withheld]")
    return found


def _without(text: str, shown: Sequence[str]) -> str:
    """As ``_withheld``."""
    return _withheld(bytearray(text.encode(errors="replace")), shown).decode()


def _reason(error: aiohttp.ClientConnectorError | aiohttp.InvalidURL) -> str:
    """The operating system's words, without aiohttp's about host and port, which stand before them."""
    return (isinstance(error, aiohttp.ClientConnectorError) and error.os_error.strerror) or str(error)


def excerpt_of(data: bytes) -> str:
    """The message of an error body as OpenAI's API and FastAPI shape it, else the body's beginning, on one line."""
    text = data[: 4 * MAX_EXCERPT_CHARS].decode("utf-8", "replace")
    # RecursionError: of the parser, or of ``str``, on what is nested without end.
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        found = msgspec.json.decode(data if len(data) <= MAX_READ_FOR_EXCERPT else b"", type=_Failure)
        if isinstance(found.error, _Message):
            text = found.error.message
        elif found.error or found.detail:
            text = found.error or str(found.detail)
    return clean(" ".join(text.split()), MAX_EXCERPT_CHARS)


class _Message(msgspec.Struct):
    message: str


class _Failure(msgspec.Struct):
    error: _Message | str = ""
    detail: str | list[dict[str, object]] = ""
