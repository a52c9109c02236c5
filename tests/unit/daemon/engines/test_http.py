"""One bounded exchange with a server, and every way in which it ends; test_vllm has more, through real routes."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest
from aiohttp import web
from weightsync.orchestrator.daemon.engines import http
from weightsync.orchestrator.daemon.engines.errors import EngineError, EngineRefused, EngineTimeout, EngineUnreachable
from weightsync.orchestrator.daemon.engines.http import ATTEMPTS, EngineHttp
from weightsync.orchestrator.protocol.limits import MAX_REASON_CHARS

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
SECONDS = 20.0


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BACKOFF_SECONDS", 0.0)


@contextlib.asynccontextmanager
async def talking(
    handler: Handler, api_key: str | None = None, admin_keys: Callable[[], Sequence[str]] = tuple
) -> AsyncIterator[EngineHttp]:
    """Exchanges with a server that answers everything by ``handler``."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    exchanges = EngineHttp("a", f"http://127.0.0.1:{runner.addresses[0][1]}/", api_key, None, admin_keys)
    try:
        yield exchanges
    finally:
        await exchanges.close()
        await runner.cleanup()


async def test_what_is_sent_and_what_comes_back() -> None:
    seen: list[tuple[str, str, str, bytes, str | None]] = []

    async def note(request: web.Request) -> web.Response:
        authorization = request.headers.get("Authorization")
        seen.append((request.method, request.path, request.query_string, await request.read(), authorization))
        return web.Response(status=201, body=b"done")

    async with talking(note, api_key="k3y") as exchanges:
        data = await exchanges.exchange("POST", "/x", SECONDS, body={"n": 1}, query={"q": "2"}, idempotent=False)
    assert data == b"done"
    assert seen == [("POST", "/x", "q=2", b'{"n":1}', "Bearer k3y")]


@pytest.mark.parametrize(("status", "idempotent", "times"), [(503, True, ATTEMPTS), (503, False, 1), (500, True, 1)])
async def test_only_a_proxys_refusals_of_idempotent_calls_are_repeated(
    status: int, idempotent: bool, times: int
) -> None:
    asked = 0

    async def refuse(_: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.Response(status=status, text="busy")

    async with talking(refuse) as exchanges:
        assert await exchanges.ask("GET", "/x", SECONDS, idempotent=idempotent) == (status, b"busy")
        assert asked == times
        with pytest.raises(EngineRefused, match=f"GET /x: answered {status}: busy"):
            await exchanges.exchange("GET", "/x", SECONDS, idempotent=idempotent)


async def test_the_deadline_covers_all_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BACKOFF_SECONDS", 60.0)

    async def refuse(_: web.Request) -> web.Response:
        return web.Response(status=503)

    async with talking(refuse) as exchanges:
        with pytest.raises(EngineTimeout, match=r"within 0\.1 s"):
            await exchanges.ask("GET", "/x", 0.1, idempotent=True)


async def test_what_was_never_sent_is_known() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        exchanges = EngineHttp("a", f"http://127.0.0.1:{closed.getsockname()[1]}", None)
        with pytest.raises(EngineUnreachable, match="cannot be reached") as caught:
            await exchanges.ask("POST", "/x", SECONDS, idempotent=False)
        await exchanges.close()
    assert not caught.value.sent


async def test_a_connection_that_breaks_may_have_been_heard() -> None:
    async def hang_up(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    async with talking(hang_up) as exchanges:
        with pytest.raises(EngineUnreachable, match="the connection broke") as caught:
            await exchanges.ask("POST", "/x", SECONDS, idempotent=False)
    assert caught.value.sent


async def test_many_calls_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that lasts as long as a round does not keep others waiting."""
    free = asyncio.Event()

    async def wait(request: web.Request) -> web.Response:
        if request.path == "/long":
            await free.wait()
        return web.Response()

    async with talking(wait) as exchanges:
        long = asyncio.create_task(exchanges.ask("POST", "/long", SECONDS, idempotent=False))
        for _ in range(http.MAX_CONNECTIONS):
            assert await exchanges.ask("GET", "/short", SECONDS, idempotent=True) == (200, b"")
        assert not long.done()
        free.set()
        assert await long == (200, b"")


HEAD = b"HTTP/1.1 %s\r\nContent-Length: %d\r\n%s\r\n"


def answer(status: bytes, body: bytes, headers: bytes = b"") -> bytes:
    return HEAD % (status, len(body), headers) + body


NASTY = {
    "nested JSON": answer(b"500 no", b'{"detail":' + b"[" * 30_000 + b"]" * 30_000 + b"}"),
    "nested objects": answer(b"500 no", b'{"detail":[' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"]}"),
    "a megabyte of an error": answer(b"500 no", b'{"error": "' + b"x" * 1_000_000 + b'"}'),
    "no UTF-8": answer(b"500 no", b'{"error": "\xff\xfe\xed\xa0\x80"}'),
    "control characters": answer(b"500 no", b'{"error": "\\u001b[2J\\u202e\\u0000"}'),
    "a lone surrogate": answer(b"500 no", b'{"error": "\\ud800"}'),
    "a redirect to odd bytes": answer(b"307 go", b"", b"Location: http://h/\xff\xfe\x80\r\n"),
    "a long redirect": answer(b"307 go", b"", b"Location: http://h/" + b"x" * 8000 + b"\r\n"),
    "an odd reason": answer(b"500 \xff\xfe", b"\x00\x01"),
    "an endless header": b"HTTP/1.1 500 no\r\nX: " + b"x" * 200_000,
    "many headers": b"HTTP/1.1 500 no\r\n" + b"X: y\r\n" * 50_000,
    "a bad chunk": b"HTTP/1.1 500 no\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "no HTTP": b"\xff" * 1000,
    "two lengths": b"HTTP/1.1 500 no\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "a negative length": b"HTTP/1.1 500 no\r\nContent-Length: -1\r\n\r\n",
    "a status that is none": b"HTTP/1.1 99999 no\r\n\r\n",
    "a cut body": b"HTTP/1.1 500 no\r\nContent-Length: 100\r\n\r\nab",
    "a broken compression": answer(b"500 no", b"\xff" * 100, b"Content-Encoding: gzip\r\n"),
    "nothing": b"",
}


@pytest.mark.parametrize("what", NASTY)
async def test_whatever_is_answered_is_one_error_that_can_be_told(what: str) -> None:
    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(NASTY[what])
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(say, "127.0.0.1", 0)
    exchanges = EngineHttp("a", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", None)
    try:
        with pytest.raises(EngineError, match=r"^engine a: POST /x: ") as caught:
            await exchanges.exchange("POST", "/x", SECONDS, idempotent=False)
    finally:
        await exchanges.close()
        server.close()
    assert not isinstance(caught.value, EngineTimeout)
    text = str(caught.value)
    assert len(text) <= MAX_REASON_CHARS
    assert text.encode()
    assert text.isprintable()


async def test_the_admin_keys_of_the_moment_are_shown() -> None:
    seen: list[str | None] = []
    keys = ["one", "two"]

    async def note(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Weightsync-Admin"))
        return web.Response(text="{}")

    async with talking(note, admin_keys=lambda: keys) as exchanges:
        await exchanges.exchange("GET", "/x", 5, idempotent=True)
        keys = ["three"]
        await exchanges.exchange("GET", "/x", 5, idempotent=True)
        keys = []
        await exchanges.exchange("GET", "/x", 5, idempotent=True)
    assert seen == ["one,two", "three", None]


async def test_no_answer_carries_our_keys_into_log_and_status() -> None:
    """As of a proxy that shows the request that it refuses."""

    async def repeat(request: web.Request) -> web.Response:
        said = " ".join(f"{name}: {value}" for name, value in request.headers.items())
        status = {"/refused": 500, "/sent-on": 307}.get(request.path, 200)
        return web.Response(status=status, text=said, headers={"Location": "/?" + said.replace(" ", "+")})

    keys = ("f" * 64, "e" * 64)
    async with talking(repeat, api_key="an-api-key", admin_keys=lambda: keys) as exchanges:
        for path in ("/refused", "/sent-on"):
            with pytest.raises(EngineRefused) as refused:
                await exchanges.exchange("GET", path, SECONDS, idempotent=True)
            assert "[withheld],[withheld]" in str(refused.value)
            assert not [key for key in ("an-api-key", *keys) if key in str(refused.value)]
        assert b"Bearer [withheld]" in await exchanges.exchange("GET", "/", SECONDS, idempotent=True)
