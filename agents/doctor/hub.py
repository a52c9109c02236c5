"""The way to the daemon and to the run directory, from where an agent stands."""

import asyncio
import email.utils
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import aiohttp
from weightsync.agents.link.token import read_token
from weightsync.orchestrator.protocol.findings import Finding
from weightsync.orchestrator.protocol.text import clean
from weightsync.orchestrator.protocol.token import TokenError

HTTP: Final = {"ws": "http", "wss": "https", "http": "http", "https": "https"}
"""A hub's URL is a WebSocket's; the daemon answers HTTP at the same port."""

SKEW_SECONDS: Final = 3.0
"""A date tells whole seconds, and an answer takes a while."""


def token(path: Path) -> Iterator[Finding]:
    """Whether the token can be read here, and by whom else."""
    try:
        read_token(path)
    except TokenError as error:
        yield Finding("error", str(error), "give this host the daemon's token file", "token")
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        yield Finding("warning", f"{path} has mode {mode:04o}, others may read it", f"chmod 600 {path}", "token")
    else:
        yield Finding("ok", str(path), check="token")


async def daemon(hub_url: str, token_file: Path, run_id: str, seconds: float) -> list[Finding]:
    """Whether the daemon answers, takes the token, is of this run, and has our clock. ``seconds``: in total."""
    parts = urlsplit(hub_url)
    if parts.scheme not in HTTP or not parts.hostname:
        what = f"{hub_url!r} is no URL such as ws://host:7410/agents"
        return [Finding("error", clean(what), "mend WEIGHTSYNC_HUB_URL", "daemon")]
    url = f"{HTTP[parts.scheme]}://{parts.netloc}"
    try:
        async with asyncio.timeout(seconds), aiohttp.ClientSession() as session:
            async with session.get(f"{url}/healthz", allow_redirects=False) as answer:
                date, status = answer.headers.get("Date", ""), answer.status
                now = time.time()
            headers = _bearer(token_file)
            async with session.get(f"{url}/rounds?last=1", headers=headers, allow_redirects=False) as answer:
                taken, body = answer.status, (await answer.content.read(4096)).decode(errors="replace")
    except TimeoutError:
        what = f"{url} does not answer within {seconds:g} s"
        return [
            Finding("error", what, "is a firewall between? Is listen.host an address of another network?", "daemon")
        ]
    except aiohttp.ClientConnectorError as error:
        what = f"{url} cannot be reached: {error.os_error.strerror or error}"
        return [Finding("error", clean(what), "start the daemon, or mend listen.host and advertise_url", "daemon")]
    except (aiohttp.ClientError, ValueError) as error:
        what = f"{url} is no daemon: {error}"
        return [Finding("error", clean(what), "mend WEIGHTSYNC_HUB_URL: host and listen.port of the daemon", "daemon")]
    return [*_judged(url, status, taken, body, run_id, headers), *clock(date, now)]


def _bearer(token_file: Path) -> dict[str, str]:
    try:
        return {"Authorization": f"Bearer {read_token(token_file)}"}
    except TokenError:
        return {}  # told by ``token``


def _judged(url: str, status: int, taken: int, body: str, run_id: str, headers: dict[str, str]) -> Iterator[Finding]:
    if status != 200:
        what = f"{url}/healthz answers {status}: it is no daemon"
        yield Finding("error", what, "mend WEIGHTSYNC_HUB_URL: host and listen.port of the daemon", "daemon")
    elif taken in (401, 403):
        if headers:
            yield Finding("error", f"{url} refuses the token", "give this host the daemon's token file", "daemon")
    elif taken == 200 and f'"run":"{run_id}"' not in body:
        what = f"{url} is the daemon of another run than {run_id!r}"
        yield Finding("error", what, "mend WEIGHTSYNC_RUN_ID or WEIGHTSYNC_HUB_URL", "daemon")
    else:
        yield Finding("ok", f"{url} answers", check="daemon")


def clock(date: str, now: float) -> Iterator[Finding]:
    """``date``: as its answer's header says, ``now``: by ours, in unix time."""
    try:
        skew = email.utils.parsedate_to_datetime(date).timestamp() + 0.5 - now
    except (ValueError, TypeError, OverflowError):
        return
    if abs(skew) > SKEW_SECONDS:
        what = f"the daemon's clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this host's"
        yield Finding("warning", what, "synchronise both hosts' clocks (chrony, NTP)", "clock")


def run_directory(path: Path) -> Iterator[Finding]:
    """Whether rank 0 can put a marker there."""
    name = path / f".weightsync-doctor-{secrets.token_hex(8)}"
    try:
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.close(descriptor)
        name.unlink()
    except OSError as error:
        what = f"a file cannot be written in {path}: {error.strerror}"
        yield Finding("error", what, "mount the daemon's run.directory here, writable for this user", "run directory")
    else:
        yield Finding("ok", f"{path} can be written", check="run directory")
