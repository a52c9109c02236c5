"""One connection of the control client: its bounded way out, its heartbeats, its end; and what may go wrong."""

import asyncio
import base64
import hashlib
import random
import secrets
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import aiohttp
from aiohttp import hdrs
from websockets.frames import CloseCode
from websockets.protocol import Side
from weightsync.agents.errors import AgentError
from weightsync.orchestrator.protocol.codec import ProtocolError, decode_from_daemon, encode
from weightsync.orchestrator.protocol.limits import MAX_FRAME_BYTES, MAX_NAME_CHARS
from weightsync.orchestrator.protocol.messages import FromDaemon, Heartbeat, Refused, Welcome
from weightsync.orchestrator.protocol.proof import (
    KEY_HEADER,
    NONCE_BYTES,
    NONCE_HEADER,
    PROOF_HEADER,
    RUN_HEADER,
    Challenge,
    Purpose,
    channel_of,
    daemon_proof,
    is_nonce,
    key_of,
    same,
)
from weightsync.orchestrator.protocol.text import clean
from weightsync.orchestrator.protocol.websocket import Endpoint

MAX_SEND_QUEUE_BYTES: Final = 2 * MAX_FRAME_BYTES
"""Unsent bytes to the daemon: one message of the largest allowed size, and as much again behind it."""

_ACCEPT_SUFFIX: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
"""RFC 6455 §1.3."""

_SWITCHING_PROTOCOLS: Final = 101
_LEAST_REFUSAL: Final = 400
_UNAUTHORIZED: Final = 401

MAX_REFUSAL_BYTES: Final = 500
"""Read of the words in which a daemon refuses the upgrade."""

_HEARTBEAT: Final = encode(Heartbeat())


class NotConnected(ConnectionError):
    """There is no daemon to say it to. The network's or the daemon's fault; the next Welcome is the time to retry."""


class ConnectionLost(ConnectionError):
    """The connection ended, or never came to a Welcome. Retried by the client itself."""


class TokenRejected(ConnectionLost):
    """The daemon has another token. Retried by the client, too: one of the two files may be about to be replaced."""


class NotObeyed(ConnectionLost):
    """A daemon that is not the one to obey. Retried by the client: ours may listen there later."""


class RefusedForGood(AgentError):
    """The daemon will not take this agent in before something is changed: retrying is pointless."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(f"the daemon refused this agent for good ({refused.fault or 'no'} fault): {refused.reason}")
        self.refused = refused
        self.fault = refused.fault


class Unproved(ConnectionLost):
    """Whoever answers there does not prove that it holds this agent's token. Retried: the daemon may come there yet."""


@dataclass(frozen=True, slots=True)
class Upgraded:
    """A connection to a daemon that has proved itself: the response holds it, ``challenge`` is what proofs cover."""

    response: aiohttp.ClientResponse
    challenge: Challenge


async def upgrade(
    session: aiohttp.ClientSession,
    url: str,
    token: str,
    tls: ssl.SSLContext | None = None,
    purpose: Purpose = "connect",
) -> Upgraded:
    """Ask ``url`` for a WebSocket (RFC 6455 §4.1), and for the proof that it holds ``token``, which is not sent.

    Raises:
        ConnectionLost: nobody answers there, not with a WebSocket, or (Unproved) without the proof.
    """
    key = base64.b64encode(secrets.token_bytes(16))
    nonce = secrets.token_hex(NONCE_BYTES)
    headers = {
        hdrs.UPGRADE: "websocket",
        hdrs.CONNECTION: "Upgrade",
        hdrs.SEC_WEBSOCKET_VERSION: "13",
        hdrs.SEC_WEBSOCKET_KEY: key.decode(),
        KEY_HEADER: key_of(token),
        NONCE_HEADER: nonce,
    }
    try:
        response = await session.get(url, headers=headers, allow_redirects=False, ssl=tls or True)
    except (aiohttp.ClientError, OSError) as error:
        raise ConnectionLost(str(error) or type(error).__name__) from error
    accept = base64.b64encode(hashlib.sha1(key + _ACCEPT_SUFFIX, usedforsecurity=False).digest()).decode()
    if response.status == _SWITCHING_PROTOCOLS and response.headers.get(hdrs.SEC_WEBSOCKET_ACCEPT) == accept:
        try:
            return Upgraded(response, _proved(response, token, nonce, purpose))
        except Unproved:
            response.close()
            raise
    why = await _refusal(response)
    response.close()
    if response.status == _UNAUTHORIZED:
        raise TokenRejected("it rejects the token (401): compare this agent's token file with the daemon's")
    raise ConnectionLost(f"it answers {response.status} {response.reason} and no WebSocket" + (why and f": {why}"))


async def _refusal(response: aiohttp.ClientResponse) -> str:
    """The words of a refusal, as far as they are few."""
    if response.status < _LEAST_REFUSAL:
        return ""
    try:
        return clean((await response.content.read(MAX_REFUSAL_BYTES)).decode(errors="replace").strip())
    except (aiohttp.ClientError, OSError):
        return ""


def _proved(response: aiohttp.ClientResponse, token: str, nonce: str, purpose: Purpose) -> Challenge:
    said = [response.headers.get(name, "") for name in (RUN_HEADER, NONCE_HEADER, PROOF_HEADER)]
    run_id, daemon_nonce, proof = said
    channel = channel_of(_certificate(response))
    challenge = Challenge(clean(run_id, MAX_NAME_CHARS), nonce, daemon_nonce, channel, purpose)
    expected = daemon_proof(token, challenge).hex()
    if is_nonce(daemon_nonce) and same(proof.encode(errors="replace"), expected.encode()):
        return challenge
    what = "it does not prove that it holds this agent's token, and is not told anything"
    raise Unproved(f"{what}: no daemon of ours listens there, or something before it ends TLS in its place")


def _certificate(response: aiohttp.ClientResponse) -> bytes | None:
    """The daemon's, in DER; None without TLS."""
    transport = None if response.connection is None else response.connection.transport
    tls: ssl.SSLObject | None = None if transport is None else transport.get_extra_info("ssl_object")
    return None if tls is None else tls.getpeercert(binary_form=True)


class DaemonConnection(asyncio.Protocol):
    """One WebSocket from its upgrade to its end; nothing here waits.

    Args:
        response: the upgrade's; its transport is taken over.
        on_message: called with each message but Heartbeat and Refused, in order.

    Attributes:
        welcomed: done when the daemon has said Welcome.
        heard_at: when the last byte came, on the loop's clock.
        lost: gets the exception that ended the connection: ConnectionLost, RefusedForGood or what a callback raised.
    """

    def __init__(self, response: aiohttp.ClientResponse, on_message: Callable[[FromDaemon], None]) -> None:
        held = response.connection
        if held is None or held.transport is None or held.protocol is None:
            response.close()
            raise ConnectionLost("the connection broke during its upgrade")
        self._loop = asyncio.get_running_loop()
        self.welcomed: asyncio.Future[None] = self._loop.create_future()
        self.lost: asyncio.Future[None] = self._loop.create_future()
        self._gone = asyncio.Event()
        self._response = response
        self._http = held.protocol
        self._transport = held.transport
        self._on_message = on_message
        # Both are told by Welcome. Before it nothing here watches for silence: the attempt's own deadline does.
        self._heartbeat_seconds = 0.0
        self._silence_seconds = 0.0
        self._heartbeat_due = 0.0
        self.heard_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._endpoint = Endpoint(Side.CLIENT, MAX_FRAME_BYTES)
        self._transport.set_protocol(self)

    # ------------------------------------------------------------------------------------------------------ reading
    def data_received(self, data: bytes) -> None:
        """Handle what has come, to the end of the last whole frame."""
        self.heard_at = self._loop.time()
        try:
            for message in self._endpoint.receive(data):
                self._heard(message)
        except ProtocolError as error:
            self._end(ConnectionLost(f"it broke the protocol: {error}"))
        except Exception as error:
            self._end(error)
        answers = self._endpoint.answers()
        if answers:
            self._transport.write(answers)
        closed = self._endpoint.peer_closed
        if closed is not None:
            self._end(ConnectionLost(f"it closed the connection: code {closed.code} {closed.reason}".rstrip()))
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport has ended, closed by either side."""
        self._end(ConnectionLost(f"the connection broke: {exc or 'end of stream'}"))
        self._http.connection_lost(exc)
        self._gone.set()

    def _heard(self, data: bytes) -> None:
        if self.lost.done():
            return
        message = decode_from_daemon(data)
        if isinstance(message, Heartbeat):
            return
        if isinstance(message, Refused):
            raise ConnectionLost(f"it refuses for now: {message.reason}") if message.retry else RefusedForGood(message)
        if isinstance(message, Welcome):
            self._welcome(message)
        elif not self.welcomed.done():
            raise ConnectionLost(f"it answers Hello with {type(message).__name__}")
        self._on_message(message)

    def _welcome(self, welcome: Welcome) -> None:
        if not self.welcomed.done():
            self._heartbeat_seconds = welcome.heartbeat_seconds
            self._silence_seconds = welcome.heartbeat_seconds * welcome.lost_after_heartbeats
            self.welcomed.set_result(None)
            self._schedule()

    # ------------------------------------------------------------------------------------------------------ writing
    def send(self, data: bytes) -> None:
        """Hand a message to the transport.

        Raises:
            NotConnected: the connection is ending, or its queue is full (which ends it).
        """
        if self.lost.done() or self._transport.is_closing():
            raise NotConnected("the connection to the daemon is ending")
        waiting = self._transport.get_write_buffer_size()
        if waiting + len(data) > MAX_SEND_QUEUE_BYTES:
            self._end(ConnectionLost(f"it takes no messages: {waiting} bytes wait for it"))
            self._transport.abort()
            raise NotConnected("the daemon takes no messages")
        self._transport.write(self._endpoint.message(data))

    def finish(self) -> None:
        """Count the connection as ended by this side; ``close`` is to follow."""
        self._end(ConnectionLost("closed by this side"))

    async def close(self, seconds: float) -> None:
        """Say Close behind all that was sent, and wait for the transport's end; ``seconds`` at most."""
        self.finish()
        if not self._transport.is_closing():
            self._transport.write(self._endpoint.close(CloseCode.NORMAL_CLOSURE, ""))
        try:
            async with asyncio.timeout(seconds):
                await self._gone.wait()
        except TimeoutError:
            pass
        finally:  # Also when the wait itself is cut short.
            self._transport.abort()
            self._response.close()

    def _end(self, error: Exception) -> None:
        """The first reason is the one that counts."""
        if not self.lost.done():
            self.lost.set_exception(error)
            self.lost.exception()  # Whoever waits for the Welcome learns it there, and nobody may wait for ``lost``.
        if not self.welcomed.done():
            self.welcomed.set_exception(error)
            self.welcomed.exception()
        if self._timer is not None:
            self._timer.cancel()

    # --------------------------------------------------------------------------------------------------- heartbeats
    def _schedule(self) -> None:
        # Spread over the interval, or the heartbeats of a fleet that was welcomed at once stay together.
        interval = self._heartbeat_seconds * random.uniform(0.75, 1.0)
        self._heartbeat_due = self._loop.time() + interval
        self._timer = self._loop.call_later(interval, self._beat)

    def _beat(self) -> None:
        now = self._loop.time()
        if now - self._heartbeat_due > self._heartbeat_seconds:
            # This process stood still: the daemon may have spoken meanwhile, and gets one more interval.
            self.heard_at = max(self.heard_at, now - self._silence_seconds + self._heartbeat_seconds)
        if now - self.heard_at > self._silence_seconds:
            self._end(ConnectionLost(f"it was silent for {now - self.heard_at:.1f} s"))
            self._transport.abort()
            return
        if not self._transport.get_write_buffer_size() and not self._transport.is_closing():
            self._transport.write(self._endpoint.message(_HEARTBEAT))
        self._schedule()
