"""One bounded look at an HTTP server: what it answers, and what that shows of it."""

import asyncio
import email.utils
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import aiohttp
from weightsync.orchestrator.protocol.proof import ADMIN_HEADER
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


@dataclass(frozen=True, slots=True)
class Opening:
    """What is shown to a server: the key of its API, those of its admin routes, and for an https URL, the context."""

    api_key: str | None = None
    admin_keys: Sequence[str] = ()
    tls: ssl.SSLContext | None = None


NOTHING: Final = Opening()


async def look(url: str, seconds: float, opening: Opening = NOTHING) -> Heard:
    """Ask once, over a connection of its own, in a total of ``seconds``.

    Raises:
        Silent.
    """
    headers = {"Accept-Encoding": "identity"}
    if opening.api_key is not None:
        headers["Authorization"] = f"Bearer {opening.api_key}"
    if opening.admin_keys:
        headers[ADMIN_HEADER] = ",".join(opening.admin_keys)
    connector = aiohttp.TCPConnector(force_close=True, ssl=opening.tls or True)
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
