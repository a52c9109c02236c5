"""One bounded look at an HTTP server: what it answers, and what that shows of it."""

import asyncio
import email.utils
import ssl
import time
from dataclasses import dataclass
from typing import Final

import aiohttp
from weightsync.orchestrator.protocol.text import clean

MAX_LOOK_BYTES: Final = 4 * 1024 * 1024
"""A vLLM's description of itself has some 50 kB."""


class Silent(Exception):
    """No HTTP answer; the message says what was there instead."""


@dataclass(frozen=True, slots=True)
class Heard:
    """``skew``: its clock before ours, in seconds, to one second; None where it told no date."""

    status: int
    body: bytes
    server: str
    location: str
    skew: float | None


async def look(url: str, seconds: float, api_key: str | None = None, tls: ssl.SSLContext | None = None) -> Heard:
    """Ask once, over a connection of its own, in a total of ``seconds``. ``tls``: for an https URL.

    Raises:
        Silent.
    """
    headers = {"Accept-Encoding": "identity"} | ({} if api_key is None else {"Authorization": f"Bearer {api_key}"})
    connector = aiohttp.TCPConnector(force_close=True, ssl=tls or True)
    try:
        async with (
            asyncio.timeout(seconds),
            aiohttp.ClientSession(connector=connector, auto_decompress=False) as session,
            session.get(url, headers=headers, allow_redirects=False) as response,
        ):
            now = time.time()
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > MAX_LOOK_BYTES:
                    raise Silent(f"answers with more than {MAX_LOOK_BYTES} bytes")
            told = response.headers
            location, server = (clean(told.get(name, ""), 200) for name in ("Location", "Server"))
            return Heard(response.status, bytes(body), server, location, _skew(told.get("Date", ""), now))
    except TimeoutError as error:
        raise Silent(f"does not answer within {seconds:g} s") from error
    except aiohttp.ClientConnectorError as error:
        raise Silent(clean(error.os_error.strerror or str(error), 200)) from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        what = "something is there that speaks no HTTP (another program's port, or https instead of http?)"
        raise Silent(f"{what}: {clean(str(error), 200)}") from error


def _skew(date: str, now: float) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(date).timestamp() + 0.5 - now
    except (ValueError, TypeError, OverflowError):
        return None
