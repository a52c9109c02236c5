"""The daemon's listening socket, and what a stranger may cost: a place among few, for a short time.

A stranger is a connection by which nobody has proved anything yet: one without a request, in its TLS handshake, with
half a header, or an agent's before its proof. Their number is bounded, over all and for each address, and so is the
time for which one is a stranger; nothing that it sends makes that longer. When all places are taken, the address that
holds the most gives up its oldest: at once to one that holds fewer, else once it has had its chance. A request that
bears a credential has a time of its own, in which it must have been sent, answered and taken: a reader that is too slow
for that is dropped.

Whoever is turned away costs an accept(2), a close(2) and no more. asyncio's own server makes a transport first, and
accepts as many as its backlog holds before anything else has its turn: seconds in which no agent is heard. While more
come than are served (``pace.py``) there is a rest between two batches, so that their number costs no more than that,
and a connection that has sent nothing yet stays with the kernel.

Descriptors are never used up: the kernel would then refuse the journal and the calls to engines.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from weightsync.orchestrator.daemon.access.descriptors import RESERVE, limit
from weightsync.orchestrator.daemon.access.pace import Pace, PaceLimits
from weightsync.orchestrator.daemon.access.refusals import Refusals

ACCEPT_BACKLOG: Final = 4096
"""Connections that may wait for accept(2): a whole fleet reconnects at once when the daemon returns."""

SILENT_SECONDS: Final = 10
"""For so long at least the kernel keeps a connection to itself that has sent nothing, which costs us nothing."""

TOO_MANY: Final = "more strangers a second than are served"

SYN_COOKIES: Final = Path("/proc/sys/net/ipv4/tcp_syncookies")

ACCEPTED_AT_ONCE: Final = 16
"""In one turn of the loop: agents that are connected are heard in between."""

BESIEGED_SECONDS: Final = 0.01
"""Between two batches while more come than are served: 1,600 a second, which take a twentieth of a core. The backlog is
gone through in less than three seconds, so that an agent waits no longer for its turn."""

REST_SECONDS: Final = 1.0
"""After accept(2) has failed for want of something, which no haste brings back."""

SWEEP_SECONDS: Final = 0.02
"""At most so often a newcomer makes us look for places whose holders are gone …"""

LOOKED_AT_ONCE: Final = 256
"""… at so many of them, which takes a tenth of a millisecond; the next look goes on from there."""

SMALL_BYTES: Final = 64 * 1024
"""Of an answer that does not count: as much a transport may keep that has been told to close."""

Peer = tuple[Any, ...]
"""Address and port, as the socket names them."""


@dataclass(frozen=True, slots=True)
class DoorLimits:
    """What strangers may cost.

    ``strangers``: at a time, each some 30 kB. ``from_one_address``: of those; a host with 64 agents has 64 for a
    moment, a whole fleet behind one address comes in turn. ``stranger_seconds``: from accept to proof or credential, as
    long as a Hello may take. ``chance_seconds``: after which one gives way to a newcomer whose address holds as many
    places, if all are taken: an honest one needs a few round trips. ``request_seconds``: for one request with a
    credential, its answer included. ``unread_bytes``: of all large answers that are being read, beyond the first.
    ``pace``: how many of them come in.
    """

    strangers: int = 2048
    from_one_address: int = 1024
    stranger_seconds: float = 10.0
    chance_seconds: float = 1.0
    request_seconds: float = 60.0
    unread_bytes: int = 256 << 20
    pace: PaceLimits = field(default_factory=PaceLimits)

    def of_dearer(self, times: float) -> "DoorLimits":
        """The same cost, of strangers each of whom costs ``times`` as much: fewer of them, but one at the least.

        One address may have as many as before, if need be all: a whole fleet may come by it, and it is the first that
        gives up places to others.
        """
        places = max(1, int(self.strangers / times))
        one_address = min(self.from_one_address, places)
        return replace(self, strangers=places, from_one_address=one_address, pace=self.pace.of_dearer(times))


@dataclass(slots=True, eq=False)
class _Visitor:
    """``is_beyond``: as ``Pace.takes`` says. ``greeting`` makes its transport, with TLS after a handshake. ``owed``:
    bytes of the large answer that it may still be reading."""

    peer: Peer
    connected: socket.socket
    came: float
    leaves: float
    is_beyond: bool
    greeting: "asyncio.Task[None] | None" = None
    transport: asyncio.Transport | None = None
    is_stranger: bool = True
    owed: int = 0

    @property
    def address(self) -> str:
        return str(self.peer[0])


class Door:
    """One per daemon; belongs to its loop.

    Args:
        serve: makes the protocol of one connection.
        agents: how many connections have been handed on by ``enter`` and are still there.
        tls: None: there is none.

    Attributes:
        strangers: their number now.
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
        self.limits, self.strangers = limits, 0
        self._visitors: dict[Peer, _Visitor] = {}
        self._from: dict[str, dict[Peer, _Visitor]] = {}
        self._listening: list[socket.socket] = []
        self._pace = Pace(limits.pace, asyncio.get_running_loop().time())
        self._looked = -float("inf")
        self._unseen: list[_Visitor] = []

    async def open(self, host: str, port: int) -> int:
        """Listen, and return the port.

        Raises:
            OSError: the address is taken or not ours.
        """
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        try:
            for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
                self._listening.append(_listening(family, address))
        except OSError:
            await self.close()
            raise
        for listening in self._listening:
            self._hear(listening)
        return int(self._listening[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening, also to handshakes. Whoever has come to a protocol is its server's to end."""
        for listening in self._listening:
            asyncio.get_running_loop().remove_reader(listening.fileno())
            listening.close()
        self._listening.clear()
        greetings = [visitor.greeting for visitor in self._visitors.values() if visitor.greeting is not None]
        for greeting in greetings:
            greeting.cancel()
        await asyncio.gather(*greetings, return_exceptions=True)

    def limit(self, limits: DoorLimits) -> None:
        """From here on; whoever has a place keeps it."""
        self.limits, self._pace.limits = limits, limits.pace

    # ------------------------------------------------------------------------------------------------- who is let in
    def _accept(self, listening: socket.socket) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                connected, peer = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                break
            except OSError as error:
                self._refusals.say("connections cannot be accepted", reason=str(error))
                self._rest(listening, REST_SECONDS)
                return
            self._arrive(connected, peer)
        if self._pace.is_besieged:
            self._rest(listening, BESIEGED_SECONDS)

    def _rest(self, listening: socket.socket, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(listening.fileno())
        loop.call_later(seconds, self._again, listening)

    def _again(self, listening: socket.socket) -> None:
        if listening in self._listening:
            self._hear(listening)

    def _hear(self, listening: socket.socket) -> None:
        # By its number: asyncio makes a text of what is not registered, and a socket's costs as much as an accept(2).
        asyncio.get_running_loop().add_reader(listening.fileno(), self._accept, listening)

    def _arrive(self, connected: socket.socket, peer: Peer) -> None:
        """Give a connection a place, or end it."""
        address, now = str(peer[0]), self._now()
        reason = self._full(address, now)
        if reason:
            self._refusals.say("connection turned away", remote=address, reason=reason)
            connected.close()
            return
        self._forget(peer)  # of an earlier connection from the same port, whose end was not looked at yet
        visitor = _Visitor(peer, connected, now, now + self.limits.stranger_seconds, self._pace.takes(address))
        self._visitors[peer] = visitor
        self._from.setdefault(address, {})[peer] = visitor
        self.strangers += 1
        visitor.greeting = asyncio.get_running_loop().create_task(self._greet(visitor))
        # One that is cancelled before its first step never comes to its own end.
        visitor.greeting.add_done_callback(lambda _: connected.close() if visitor.transport is None else None)

    async def _greet(self, visitor: _Visitor) -> None:
        visitor.connected.setblocking(False)
        seconds = None if self._tls is None else self.limits.stranger_seconds
        try:
            visitor.transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
                self._serve, visitor.connected, ssl=self._tls, ssl_handshake_timeout=seconds
            )
        except OSError as error:  # ssl's errors, broken connections and TimeoutError
            reason = str(error) or type(error).__name__
            self._refusals.say("TLS handshake failed", remote=visitor.address, reason=reason)
            self._forget(visitor.peer)
            error.__traceback__ = None  # or its frames keep the connection's memory until the garbage collector comes
        finally:
            visitor.greeting = None

    def enter(self, transport: asyncio.BaseTransport) -> None:
        """Whoever is on ``transport`` has proved who it is, and its connection is watched by somebody else."""
        visitor = self._visitors.get(transport.get_extra_info("peername"))
        if visitor is not None:
            self._believe(visitor)
            self._forget(visitor.peer)

    def request(self, transport: asyncio.BaseTransport | None) -> None:
        """A request on ``transport`` bears a credential: from here on it has the time of a request."""
        visitor = None if transport is None else self._visitors.get(transport.get_extra_info("peername"))
        if visitor is not None:
            self._believe(visitor)
            visitor.leaves = self._now() + self.limits.request_seconds
            visitor.owed = 0

    def answers(self, transport: asyncio.BaseTransport | None, size: int) -> bool:
        """Whether ``size`` bytes may be sent as an answer on ``transport``: there is room for what nobody reads."""
        if size <= SMALL_BYTES:
            return True
        visitor = None if transport is None else self._visitors.get(transport.get_extra_info("peername"))
        owed = sum(other.owed for other in self._visitors.values())
        if visitor is None or (owed and owed + size > self.limits.unread_bytes):
            return False
        visitor.owed = size
        return True

    def sweep(self) -> None:
        """End those whose time is over, and give back places of those who are gone: LOOKED_AT_ONCE of all, in turn."""
        now = self._looked = self._now()
        self._unseen = self._unseen or list(self._visitors.values())
        for _ in range(min(LOOKED_AT_ONCE, len(self._unseen))):
            visitor = self._unseen.pop()
            if self._visitors.get(visitor.peer) is not visitor:
                continue
            # Not by its transport: one that closes waits for its reader first, who may never come.
            if visitor.connected.fileno() == -1:
                self._forget(visitor.peer)
            elif now >= visitor.leaves:
                kind = "a stranger has shown nothing" if visitor.is_stranger else "a request takes too long"
                self._refusals.say(kind, remote=visitor.address, seconds=round(now - visitor.came, 1))
                self._end(visitor)

    # ------------------------------------------------------------------------------------------------------- places
    def _full(self, address: str, now: float) -> str:
        """Why a newcomer from ``address`` is not let in; empty where it is, if need be in the place of another."""
        if not self._pace.serves(address, now):
            return TOO_MANY
        lack = self._lack(address)
        if lack and now - self._looked >= SWEEP_SECONDS:
            self.sweep()
            lack = self._lack(address)
        return self._evicted(lack, address, now) if lack else ""

    def _evicted(self, lack: str, address: str, now: float) -> str:
        """``lack``, or empty where somebody else has given up the place that there was not for ``address``."""
        if lack != self._no_place():
            return lack
        most = max(self._from.values(), key=len)
        oldest = next(iter(most.values()))
        is_beyond_its_share = len(most) > len(self._from.get(address, ())) + 1
        if not is_beyond_its_share and now - oldest.came < self.limits.chance_seconds:
            return lack
        self._end(oldest)
        return ""

    def _lack(self, address: str) -> str:
        """What there is not enough of for one more from ``address``; empty where there is."""
        if len(self._visitors) + self._agents() >= limit() - RESERVE:
            return f"all {limit()} descriptors but {RESERVE} are in use"
        if len(self._from.get(address, ())) >= self.limits.from_one_address:
            return f"{self.limits.from_one_address} strangers from this address"
        return self._no_place() if self.strangers >= self.limits.strangers else ""

    def _no_place(self) -> str:
        return f"{self.limits.strangers} strangers"

    def _end(self, visitor: _Visitor) -> None:
        if visitor.transport is not None:
            visitor.transport.abort()
        elif visitor.greeting is not None:
            visitor.greeting.cancel()
        self._forget(visitor.peer)

    def _forget(self, peer: Peer) -> None:
        visitor = self._visitors.pop(peer, None)
        if visitor is not None:
            self._know(visitor)

    def _believe(self, visitor: _Visitor) -> None:
        if visitor.is_stranger:
            self._pace.give_back(visitor.address, visitor.is_beyond)
            self._know(visitor)

    def _know(self, visitor: _Visitor) -> None:
        if visitor.is_stranger:
            visitor.is_stranger = False
            self.strangers -= 1
            others = self._from[visitor.address]
            del others[visitor.peer]
            if not others:
                del self._from[visitor.address]

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _has_cookies() -> bool:
    """Whether the kernel takes connections also where its queue of those that have said nothing is full (tcp(7))."""
    try:
        return SYN_COOKIES.read_text().strip() != "0"
    except OSError:
        return False


def _listening(family: int, address: Peer) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if _has_cookies():
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, SILENT_SECONDS)
        made.bind(address)
        made.listen(ACCEPT_BACKLOG)
    except OSError as error:
        made.close()
        raise OSError(error.errno, f"cannot listen at {address[0]} port {address[1]}: {error.strerror}") from error
    return made
