"""The way to the daemon, from where an agent stands."""

import asyncio
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import aiohttp
from weightsync.agents.inference.place import VARIABLES, is_loopback
from weightsync.agents.link.connection import ConnectionLost, TokenRejected, upgrade
from weightsync.agents.link.examination import clock
from weightsync.agents.link.tls import CA_VARIABLE, TlsError, tls_context
from weightsync.agents.link.token import read_token
from weightsync.orchestrator.files.ownership import NotOurs
from weightsync.orchestrator.protocol.findings import Finding
from weightsync.orchestrator.protocol.text import clean
from weightsync.orchestrator.protocol.token import MIN_TOKEN_CHARS, TokenError

HTTP: Final = {"ws": "http", "wss": "https"}
"""A hub's URL is a WebSocket's; the daemon answers HTTP at the same port."""

HUB_VARIABLE: Final = VARIABLES["hub_url"]

MEND_TOKEN: Final = "give this host the token file of its role from the daemon's credentials"
MEND_URL: Final = "mend WEIGHTSYNC_HUB_URL: host and listen.port of the daemon"


def plain(hub_url: str) -> Iterator[Finding]:
    """Whether what is said to the daemon can be altered on its way."""
    parts = urlsplit(hub_url)
    if parts.scheme == "ws" and not is_loopback(hub_url):
        what = f"{hub_url} is not TLS: whoever stands in that network can alter what is said, and so what is written"
        fix = "listen.tls of the daemon, and wss:// here; or see that nobody else reaches that network"
        yield Finding("warning", clean(what), fix, HUB_VARIABLE)


def token(path: Path) -> Iterator[Finding]:
    """Whether the token can be read here, and by nobody else, and cannot be guessed."""
    try:
        found = read_token(path)
    except TokenError as error:
        if isinstance(error.__cause__, NotOurs):
            yield Finding("error", f"{error.__cause__.place}: {error.__cause__.what}", error.__cause__.fix, "token")
        else:
            yield Finding("error", str(error), MEND_TOKEN, "token")
        return
    if len(found) < MIN_TOKEN_CHARS:
        what = f"{path} holds a token of {len(found)} characters, which can be guessed, and no daemon takes it"
        yield Finding("error", what, MEND_TOKEN, "token")
        return
    yield Finding("ok", str(path), check="token")


async def daemon(hub_url: str, token_file: Path, run_id: str, seconds: float) -> list[Finding]:
    """Whether the daemon answers, proves that it holds the token, is of this run, and has our clock.

    It is asked as an agent asks that comes in, and is told nothing. ``seconds``: in total.
    """
    parts = urlsplit(hub_url)
    if parts.scheme not in HTTP or not parts.hostname:
        what = f"{hub_url!r} is no URL such as ws://host:7410/agents"
        return [Finding("error", clean(what), "mend WEIGHTSYNC_HUB_URL", "daemon")]
    url = f"{HTTP[parts.scheme]}://{parts.netloc}"
    try:
        tls = tls_context(hub_url)
    except TlsError as error:
        return [Finding("error", clean(str(error)), "mend them where this process is started", "TLS")]
    try:
        async with asyncio.timeout(seconds), aiohttp.ClientSession() as session:
            async with session.get(f"{url}/healthz", allow_redirects=False, ssl=tls or True) as answer:
                date, status = answer.headers.get("Date", ""), answer.status
                now = time.time()
            if status != 200:
                what = f"{url}/healthz answers {status}: it is no daemon"
                return [Finding("error", what, MEND_URL, "daemon")]
            return [*await _proved(session, hub_url, token_file, run_id, tls), *clock(date, now)]
    except TimeoutError:
        what = f"{url} does not answer within {seconds:g} s"
        return [
            Finding("error", what, "is a firewall between? Is listen.host an address of another network?", "daemon")
        ]
    except aiohttp.ClientConnectorCertificateError as error:
        what = f"{url} has a certificate that is not believed: {error.certificate_error}"
        return [Finding("error", clean(what), f"set {CA_VARIABLE} to the run's ca.pem", "TLS")]
    except aiohttp.ClientConnectorError as error:
        what = f"{url} cannot be reached: {error.os_error.strerror or error}"
        return [Finding("error", clean(what), "start the daemon, or mend listen.host and advertise_url", "daemon")]
    except (aiohttp.ClientError, ValueError) as error:
        return [Finding("error", clean(f"{url} is no daemon: {error}"), MEND_URL, "daemon")]


async def _proved(
    session: aiohttp.ClientSession, hub_url: str, token_file: Path, run_id: str, tls: ssl.SSLContext | None
) -> list[Finding]:
    try:
        upgraded = await upgrade(session, hub_url, read_token(token_file), tls)
    except TokenError:
        return [Finding("ok", f"{hub_url} answers", check="daemon")]  # of the token tells ``token``
    except TokenRejected:
        return [Finding("error", f"{hub_url} does not know the token", MEND_TOKEN, "daemon")]
    except ConnectionLost as error:
        fix = "the token must be one of role engine or trainer, and nothing between may end the connection"
        return [Finding("error", clean(f"{hub_url}: {error}"), fix, "daemon")]
    upgraded.response.close()
    there = upgraded.challenge.run_id
    if there != run_id:
        what = f"{hub_url} is the daemon of run {there!r}, and this is of {run_id!r}"
        return [Finding("error", clean(what), "mend WEIGHTSYNC_RUN_ID or WEIGHTSYNC_HUB_URL", "daemon")]
    return [Finding("ok", f"{hub_url} answers, and proves that it holds the token", check="daemon")]
