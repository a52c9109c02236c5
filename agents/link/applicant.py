"""An engine that makes itself a member of its run: it says to the daemon where it is, for as long as it lives.

A thread of its own applies until it is taken in, and then again and again, as often as the daemon wants: a daemon that
does not hear an engine drops it, and one that was restarted or has lost its journal learns of it anew.
"""

import asyncio
import logging
import random
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Final

import aiohttp
import msgspec
from aiohttp import hdrs
from weightsync.agents.errors import AgentError
from weightsync.agents.link.client import SCHEMES, Backoff
from weightsync.agents.link.token import read_token
from weightsync.orchestrator.protocol.application import ENGINES_PATH, Admitted, Applicant, Application
from weightsync.orchestrator.protocol.text import clean
from weightsync.orchestrator.protocol.token import TokenError

log = logging.getLogger(__name__)

ANSWER_SECONDS: Final = 20.0
"""Of one attempt; longer than the daemon takes to say that its disk is slow."""

STOP_SECONDS: Final = 5.0
"""For the thread to end."""

LEAST_SECONDS: Final = 1.0
LONGEST_SECONDS: Final = 300.0
"""Between two applications, whatever the daemon says."""

MAX_ANSWER_BYTES: Final = 16 * 1024
"""Of an answer: a few words."""

BACKOFF: Final = Backoff(first=0.5, longest=30.0, quick=5.0)

MAX_SHOWN: Final = 1000
"""Characters of a refusal in the log."""

_HUB_PATH: Final = "/agents"


class ApplicantError(AgentError):
    """What an engine is told about where it is, or where its daemon is, cannot be used."""


class NotTakenIn(Exception):
    """The daemon does not answer, or says no. Tried again: either side may be mended."""


def engines_url(hub_url: str) -> str:
    """Where an engine applies: beside the endpoint of the agents, ``ws://host:port/agents``.

    Raises:
        ApplicantError: that is no such endpoint.
    """
    if not hub_url.startswith(SCHEMES) or not hub_url.endswith(_HUB_PATH):
        raise ApplicantError(f"hub url {hub_url!r}: write ws://host:port{_HUB_PATH}")
    return hub_url.replace("ws", "http", 1).removesuffix(_HUB_PATH) + ENGINES_PATH


class ApplicantThread:
    """The thread. ``start`` it once; it ends with its process, or by ``close``. That the engine has ended the daemon
    notices by itself.

    Args:
        hub_url: the daemon's endpoint for agents.
        token_file: holds the bearer token, read again for each attempt.

    Raises:
        ApplicantError: ``hub_url`` is none.
    """

    def __init__(
        self, run_id: str, engine: Applicant, hub_url: str, token_file: Path, backoff: Backoff = BACKOFF
    ) -> None:
        self._application = Application(run_id=run_id, engine=engine)
        self._url, self._token_file, self._backoff = engines_url(hub_url), token_file, backoff
        self._closed: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=f"weightsync applicant {engine.name}", daemon=True)
        self.trouble = ""
        """Why it was not taken in the last time; empty when it was."""

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.cancel()
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)

    # ------------------------------------------------------------------------------------------------- on the thread
    def _run(self) -> None:
        try:
            asyncio.run(self._live())
        except Exception:  # the engine serves on, and its daemon will notice
            log.exception("%s no longer says that it is there", self._application.engine.name)

    async def _live(self) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS)) as session:
            applying = asyncio.ensure_future(self._apply(session))
            await asyncio.wait({applying, asyncio.wrap_future(self._closed)}, return_when=asyncio.FIRST_COMPLETED)
            if applying.done():
                applying.result()
            applying.cancel()

    async def _apply(self, session: aiohttp.ClientSession) -> None:
        """Again and again; never returns."""
        name, failures, taken_in = self._application.engine.name, 0, False
        while True:
            try:
                wait = await self._say(session)
            except NotTakenIn as error:
                failures += 1
                if str(error) != self.trouble:
                    log.warning("%s is not taken in at %s: %s; tried again", name, self._url, error)
                self.trouble, taken_in = str(error), False
                wait = self._backoff.seconds(failures, random.random())
            else:
                if not taken_in:
                    log.info("%s is a member, says the daemon at %s", name, self._url)
                self.trouble, taken_in, failures = "", True, 0
            await asyncio.sleep(wait)

    async def _say(self, session: aiohttp.ClientSession) -> float:
        """Say it once; returns the seconds until it is to be said again.

        Raises:
            NotTakenIn: with the daemon's reason, or why there is no answer.
        """
        try:
            headers = {
                hdrs.AUTHORIZATION: f"Bearer {read_token(self._token_file)}",
                hdrs.CONTENT_TYPE: "application/json",
            }
            body = msgspec.json.encode(self._application)
            async with session.post(self._url, data=body, headers=headers, allow_redirects=False) as response:
                data = bytearray()
                async for chunk in response.content.iter_any():
                    data += chunk
                    if len(data) > MAX_ANSWER_BYTES:
                        raise NotTakenIn(f"an answer of more than {MAX_ANSWER_BYTES} bytes: is that the daemon?")
            if response.status != 200:
                raise NotTakenIn(f"{response.status}: {clean(data.decode(errors='replace').strip(), MAX_SHOWN)}")
            answer = msgspec.json.decode(data, type=Admitted)
        except TimeoutError:
            raise NotTakenIn("no answer in time") from None
        except (aiohttp.ClientError, OSError, TokenError, ValueError, RecursionError) as error:
            raise NotTakenIn(clean(str(error), MAX_SHOWN) or type(error).__name__) from error
        return min(max(answer.again_seconds, LEAST_SECONDS), LONGEST_SECONDS)
