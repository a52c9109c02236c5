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
from websockets.frames import CloseCode
from websockets.protocol import Side
from weightsync.agents.errors import AgentError
from weightsync.agents.link.client import SCHEMES, Backoff
from weightsync.agents.link.connection import upgrade
from weightsync.agents.link.tls import tls_context
from weightsync.agents.link.token import read_token
from weightsync.orchestrator.protocol.application import ENGINES_PATH, Admitted, Applicant, Application, Declined
from weightsync.orchestrator.protocol.codec import ProtocolError
from weightsync.orchestrator.protocol.proof import agent_proof
from weightsync.orchestrator.protocol.text import clean
from weightsync.orchestrator.protocol.token import TokenError
from weightsync.orchestrator.protocol.websocket import Endpoint

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

CLOSE_SECONDS: Final = 2.0
"""For the daemon to end a connection on which all is said."""

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
    return hub_url.removesuffix(_HUB_PATH) + ENGINES_PATH


class ApplicantThread:
    """The thread. ``start`` it once; it ends with its process, or by ``close``. That the engine has ended the daemon
    notices by itself.

    Args:
        hub_url: the daemon's endpoint for agents.
        token_file: holds the token, read again for each attempt. It is proved and never sent.

    Raises:
        ApplicantError: ``hub_url`` is none.
        TlsError: the environment does not fit it.
    """

    def __init__(
        self, run_id: str, engine: Applicant, hub_url: str, token_file: Path, backoff: Backoff = BACKOFF
    ) -> None:
        self._application = Application(run_id=run_id, engine=engine)
        self._url, self._token_file, self._backoff = engines_url(hub_url), token_file, backoff
        self._tls = tls_context(self._url)
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
            async with asyncio.timeout(ANSWER_SECONDS):
                answer = msgspec.json.decode(await self._asked(session), type=Admitted | Declined)
        except TimeoutError:
            raise NotTakenIn("no answer in time") from None
        except (OSError, TokenError, ValueError, RecursionError) as error:
            raise NotTakenIn(clean(str(error), MAX_SHOWN) or type(error).__name__) from error
        if isinstance(answer, Declined):
            raise NotTakenIn(f"{answer.status}: {clean(answer.why.strip(), MAX_SHOWN)}")
        return min(max(answer.again_seconds, LEAST_SECONDS), LONGEST_SECONDS)

    async def _asked(self, session: aiohttp.ClientSession) -> bytes:
        """The answer of a daemon that has proved itself.

        Raises:
            NotTakenIn: it is another run's.
            ConnectionError, TokenError, ProtocolError: as they say.
        """
        token = read_token(self._token_file)
        upgraded = await upgrade(session, self._url, token, self._tls, "apply")
        exchange = _Exchange(upgraded.response)
        try:
            if upgraded.challenge.run_id != self._application.run_id:
                there = f"that daemon serves run {upgraded.challenge.run_id!r}"
                raise NotTakenIn(f"run_id {self._application.run_id!r}: {there}. Fix: WEIGHTSYNC_RUN_ID or _HUB_URL")
            said = msgspec.json.encode(self._application)
            return await exchange.ask(agent_proof(token, upgraded.challenge, said) + said)
        finally:
            await exchange.close()


class _Exchange(asyncio.Protocol):
    """A WebSocket after its upgrade, for one question and one answer; takes over the transport of ``response``."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        held = response.connection
        if held is None or held.transport is None or held.protocol is None:
            response.close()
            raise ConnectionError("the connection broke during its upgrade")
        self._response, self._http, self._transport = response, held.protocol, held.transport
        self._answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._gone = asyncio.Event()
        self._endpoint = Endpoint(Side.CLIENT, MAX_ANSWER_BYTES)
        self._transport.set_protocol(self)

    async def ask(self, question: bytes) -> bytes:
        """Raises: ConnectionError, ProtocolError."""
        self._transport.write(self._endpoint.message(question))
        return await self._answer

    async def close(self) -> None:
        """Say Close, and wait a moment for the daemon's."""
        if not self._transport.is_closing():
            self._transport.write(self._endpoint.close(CloseCode.NORMAL_CLOSURE, ""))
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._gone.wait()
        except TimeoutError:
            pass
        finally:
            self._transport.abort()
            self._response.close()

    def data_received(self, data: bytes) -> None:
        try:
            messages = self._endpoint.receive(data)
        except ProtocolError as error:
            self._failed(error)
            return
        if messages and not self._answer.done():
            self._answer.set_result(messages[0])
        closed = self._endpoint.peer_closed
        if closed is not None:
            self._failed(ConnectionError(f"it says nothing: code {closed.code} {closed.reason}".rstrip()))
            self._transport.write(self._endpoint.answers())
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._failed(ConnectionError(f"the connection broke: {exc or 'end of stream'}"))
        self._http.connection_lost(exc)
        self._gone.set()

    def _failed(self, error: Exception) -> None:
        if not self._answer.done():
            self._answer.set_exception(error)
            self._answer.exception()  # nobody may wait for it
