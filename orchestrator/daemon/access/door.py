"""The daemon's listening socket, and what a stranger may cost: a place among few, for a short time.

A stranger is a connection by which nobody has proved anything yet: one without a request, in its TLS handshake, with
half a header, or an agent's before its proof. Their number is bounded, over all and for each address, and so is the
time for which one is a stranger; nothing that it sends makes that longer. When all places are taken, the oldest that
has had its chance gives way. A request that bears a credential has a time of its own, in which it must have been sent,
answered and taken: a reader that is too slow for that is dropped.

Descriptors are never used up: the kernel would then refuse the journal and the calls to engines, and asyncio would log
each refusal of accept(2).
"""

import asyncio
import ssl
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from weightsync.orchestrator.daemon.access.descriptors import RESERVE, limit
from weightsync.orchestrator.daemon.access.refusals import Refusals

ACCEPT_BACKLOG: Final = 4096
"""Connections that may wait for accept(2): a whole fleet reconnects at once when the daemon returns."""

Peer = tuple[Any, ...]
"""Address and port, as the socket names them."""


@dataclass(frozen=True, slots=True)
class DoorLimits:
    """What strangers may cost.

    ``strangers``: at a time, each some 30 kB. ``from_one_address``: of those; a host with 64 agents has 64 for a
    moment, a whole fleet behind one address comes in turn. ``stranger_seconds``: from accept to proof or credential, as
    long as a Hello may take. ``chance_seconds``: after which one gives way to a newcomer if all places are taken: an
    honest one needs a few round trips. ``request_seconds``: for one request with a credential, its answer included.
    """

    strangers: int = 2048
    from_one_address: int = 1024
    stranger_seconds: float = 10.0
    chance_seconds: float = 1.0
    request_seconds: float = 60.0


@dataclass(slots=True)
class _Visitor:
    transport: asyncio.Transport
    address: str
    came: float
    leaves: float
    stranger: bool = True


class Door:
    """One per daemon; belongs to its loop.

    Args:
        serve: makes the protocol of one connection.
        tls: None: there is none.
        agents: how many connections have been handed on by ``enter`` and are still there.
    """

    def __init__(
        self,
        serve: Callable[[], asyncio.Protocol],
        refusals: Refusals,
        agents: Callable[[], int],
        tls: ssl.SSLContext | None,
        limits: DoorLimits,
    ) -> None:
        self._serve, self._refusals, self._agents, self._tls = serve, refusals, agents, tls
        self.limits = limits
        self._visitors: dict[Peer, _Visitor] = {}
        self._from: Counter[str] = Counter()
        self._handshakes: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def open(self, host: str, port: int) -> int:
        """Listen, and return the port.

        Raises:
            OSError: the address is taken or not ours.
        """
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Newcomer(self), host, port, backlog=ACCEPT_BACKLOG)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening, also to handshakes. Whoever has come to a protocol is its server's to end."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in self._handshakes:
            task.cancel()
        await asyncio.gather(*self._handshakes, return_exceptions=True)

    @property
    def strangers(self) -> int:
        """Their number now."""
        return self._from.total()

    # ------------------------------------------------------------------------------------------------- who is let in
    def arrive(self, transport: asyncio.Transport) -> None:
        """A connection was accepted: give it a place, or end it."""
        peer, now = transport.get_extra_info("peername"), self._now()
        if not peer:  # it is gone already
            transport.abort()
            return
        address = str(peer[0])
        reason = self._full(address, now)
        if reason:
            self._refusals.say("connection turned away", remote=address, reason=reason)
            transport.abort()
            return
        self._forget(peer)  # of an earlier connection from the same port, whose end was not looked at yet
        self._visitors[peer] = _Visitor(transport, address, now, now + self.limits.stranger_seconds)
        self._from[address] += 1
        if self._tls is None:
            protocol = self._serve()
            transport.set_protocol(protocol)
            protocol.connection_made(transport)
        else:
            task = asyncio.get_running_loop().create_task(self._secure(transport, self._tls, address))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    def enter(self, transport: asyncio.BaseTransport) -> None:
        """Whoever is on ``transport`` has proved who it is, and its connection is watched by somebody else."""
        self._forget(transport.get_extra_info("peername"))

    def request(self, transport: asyncio.BaseTransport | None) -> None:
        """A request on ``transport`` bears a credential: from here on it has the time of a request."""
        visitor = None if transport is None else self._visitors.get(transport.get_extra_info("peername"))
        if visitor is not None:
            self._know(visitor)
            visitor.leaves = self._now() + self.limits.request_seconds

    def sweep(self) -> None:
        """End those whose time is over, and give back the places of those who are gone."""
        now = self._now()
        for peer, visitor in list(self._visitors.items()):
            if visitor.transport.is_closing():
                self._forget(peer)
            elif now >= visitor.leaves:
                kind = "a stranger has shown nothing" if visitor.stranger else "a request takes too long"
                self._refusals.say(kind, remote=visitor.address, seconds=round(now - visitor.came, 1))
                self._end(peer)

    # ------------------------------------------------------------------------------------------------------- places
    def _full(self, address: str, now: float) -> str:
        """Why a newcomer from ``address`` is not let in; empty where it is, if need be in the place of another."""
        if len(self._visitors) + self._agents() >= limit() - RESERVE:
            self.sweep()
            if len(self._visitors) + self._agents() >= limit() - RESERVE:
                return f"all {limit()} descriptors but {RESERVE} are in use"
        if self._from[address] >= self.limits.from_one_address:
            self.sweep()
            if self._from[address] >= self.limits.from_one_address:
                return f"{self.limits.from_one_address} strangers from this address"
        if self.strangers >= self.limits.strangers:
            self.sweep()
            oldest = next((peer for peer, visitor in self._visitors.items() if visitor.stranger), None)
            if self.strangers >= self.limits.strangers and oldest is not None:
                if now - self._visitors[oldest].came < self.limits.chance_seconds:
                    return f"{self.limits.strangers} strangers"
                self._end(oldest)
        return ""

    def _end(self, peer: Peer) -> None:
        self._visitors[peer].transport.abort()
        self._forget(peer)

    def _forget(self, peer: Peer) -> None:
        visitor = self._visitors.pop(peer, None)
        if visitor is not None:
            self._know(visitor)

    def _know(self, visitor: _Visitor) -> None:
        if visitor.stranger:
            visitor.stranger = False
            self._from[visitor.address] -= 1
            if not self._from[visitor.address]:
                del self._from[visitor.address]

    # ---------------------------------------------------------------------------------------------------------- TLS
    async def _secure(self, transport: asyncio.Transport, context: ssl.SSLContext, address: str) -> None:
        loop, waiting = asyncio.get_running_loop(), _Waiting()
        try:
            secured = await loop.start_tls(
                transport, waiting, context, server_side=True, ssl_handshake_timeout=self.limits.stranger_seconds
            )
        except (OSError, asyncio.CancelledError) as error:  # ssl's errors, broken connections and TimeoutError
            transport.abort()
            if isinstance(error, OSError):
                self._refusals.say("TLS handshake failed", remote=address, reason=str(error) or type(error).__name__)
            return
        if secured is None or waiting.over:
            transport.abort()
            return
        protocol = self._serve()
        secured.set_protocol(protocol)
        protocol.connection_made(secured)
        if waiting.data:
            protocol.data_received(bytes(waiting.data))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


class _Newcomer(asyncio.Protocol):
    """Of a connection until the door has given it another protocol, before anything was read."""

    def __init__(self, door: Door) -> None:
        self._door = door

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._door.arrive(transport)


class _Waiting(asyncio.Protocol):
    """Takes what comes right behind a TLS handshake, before the connection's own protocol can be told of it."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.over = False

    def data_received(self, data: bytes) -> None:
        self.data += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.over = True
