"""Engines that make themselves members: what they say is checked, decided by the core, and durable when answered.

The daemon will call the URLs that an engine gives, so they are looked at before anything is asked of them: the core
compares them with ``engines_admit``, and here the peer is, which must be on the host that it speaks of.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Final

import structlog
from weightsync.orchestrator.core.events import EngineApplied, Event
from weightsync.orchestrator.core.membership import admission
from weightsync.orchestrator.core.memory import keep_newest
from weightsync.orchestrator.core.state import Fleet
from weightsync.orchestrator.daemon.engines.kinds import CLIENTS
from weightsync.orchestrator.protocol.application import Admitted, Applicant, Application
from weightsync.orchestrator.protocol.text import clean
from weightsync.orchestrator.settings.places import usable_url

log = structlog.get_logger(__name__)

DURABLE_SECONDS: Final = 10.0
"""Until an engine that was taken in is in the journal; then it is told to apply again."""

LOOKUP_SECONDS: Final = 5.0
"""For the addresses of one engine's hosts."""

MAX_LOOKUPS: Final = 4
"""At once: each holds a thread of the daemon's until the resolver answers."""

MAX_REMEMBERED: Final = 1024
"""Names whose last refusal is known, so that it is logged once and not with each repetition."""

WORDS_IN_LEAVE: Final = 4
"""How often an engine applies within ``engines_admit.leave_seconds``: some of it may be lost."""

Resolver = Callable[[str], Awaitable[frozenset[str]]]
"""The addresses of a host's name. Raises OSError."""


class ApplicationRefused(Exception):
    """The engine is not taken in. ``status``: of the HTTP answer; the text names the field, its value and the fix."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


async def addresses_of(host: str) -> frozenset[str]:
    """As the daemon's own resolver tells them."""
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return frozenset(str(entry[4][0]) for entry in found)


class Applications:
    """One per daemon; belongs to its loop.

    Args:
        post: hands an event to the core, and returns when all that follows from it is durable.
        next_id: the number of the next event.
    """

    def __init__(
        self,
        fleet: Fleet,
        post: Callable[[Event], Awaitable[None]],
        next_id: Callable[[], int],
        resolver: Resolver = addresses_of,
    ) -> None:
        self._fleet, self._post, self._next_id = fleet, post, next_id
        self._resolver = resolver
        self._lookups = 0
        self._refused: dict[str, str] = {}

    async def receive(self, application: Application, address: str) -> Admitted:
        """Take it in, or hear that it is there. ``address``: of the peer that says it.

        Raises:
            ApplicationRefused: it does not fit (403), its name or place is taken (409), try again later (503).
        """
        name = application.engine.name
        try:
            await self._check(application, address)
            await self._decide(application)
        except ApplicationRefused as refused:
            if self._refused.get(name) != str(refused):
                log.warning("an engine is not taken in", engine=name, address=address, reason=str(refused))
            keep_newest(self._refused, name, str(refused), MAX_REMEMBERED)
            raise
        self._refused.pop(name, None)
        policy = self._fleet.policy.admission
        return Admitted(again_seconds=1.0 if policy is None else max(1.0, policy.leave / WORDS_IN_LEAVE))

    async def _check(self, application: Application, address: str) -> None:
        engine = application.engine
        if engine.kind not in CLIENTS:
            known = ", ".join(CLIENTS)
            raise ApplicationRefused(403, f"kind {engine.kind!r}: there is no such client. Fix: one of {known}")
        for url in engine.urls:
            try:
                if usable_url(url) != clean(url):
                    raise ValueError(f"{clean(url, 200)!r} has characters that no URL has")
            except ValueError as error:
                raise ApplicationRefused(403, f"url: {error}. Fix: give the server's own base URL") from error
        self._raise_objection(application)
        await self._check_peer(engine, address)

    def _raise_objection(self, application: Application) -> None:
        objection = admission.objection(self._fleet, application, asyncio.get_running_loop().time())
        if objection:
            raise ApplicationRefused(409, objection)

    async def _check_peer(self, engine: Applicant, address: str) -> None:
        """The peer is on a host of the engine's servers, where engines may be at all, or a proxy before us.

        Raises:
            ApplicationRefused: it is not.
        """
        policy = self._fleet.policy.admission
        assert policy is not None, "without it there was an objection"
        if admission.may_speak_for_others(policy, address):
            return
        for host in dict.fromkeys(admission.host_of(url) for url in engine.urls):
            if admission.plain(address) in await self._addresses(host):
                return
        raise ApplicationRefused(
            403,
            f"url {engine.urls[0]!r}: this comes from {clean(address, 100)}, which is not the address of its host. "
            "Fix: give the engine's own URL, or add that network to engines_admit.hosts (a proxy's to .proxies)",
        )

    async def _addresses(self, host: str) -> frozenset[str]:
        try:
            return frozenset({admission.plain(str(ip_address(host)))})
        except ValueError:
            pass
        if self._lookups >= MAX_LOOKUPS:
            raise ApplicationRefused(503, "other engines' hosts are being looked up. Fix: apply again")
        self._lookups += 1
        try:
            async with asyncio.timeout(LOOKUP_SECONDS):
                return frozenset(map(admission.plain, await self._resolver(host)))
        except (OSError, UnicodeError) as error:
            raise ApplicationRefused(503, f"url: host {host!r} cannot be looked up here: {error}") from error
        finally:
            self._lookups -= 1

    async def _decide(self, application: Application) -> None:
        engine = application.engine
        self._raise_objection(application)  # anew: the look-up may have taken its time
        try:
            async with asyncio.timeout(DURABLE_SECONDS):
                await self._post(EngineApplied(self._next_id(), application))
        except TimeoutError:
            late = f"it is not in the journal after {DURABLE_SECONDS:g} s: the daemon's disk is slow. Fix: apply again"
            raise ApplicationRefused(503, late) from None
        if self._fleet.memory.admitted.get(engine.name) != engine:
            self._raise_objection(application)
            raise ApplicationRefused(503, "another engine came at the same moment. Fix: apply again")
