"""One plan's edges at an agent: prepared, told with Ready, and tried again for as long as the plan stands."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from weightsync.agents.errors import AgentError, blame
from weightsync.agents.link.side import Link
from weightsync.orchestrator.protocol.edges import EdgeFailure
from weightsync.orchestrator.protocol.messages import Connect, Fault, Ready
from weightsync.orchestrator.protocol.names import Member
from weightsync.orchestrator.protocol.text import clean

log = logging.getLogger(__name__)

FIRST_RETRY_SECONDS: Final = 0.5
"""Before edges that are not ready are tried again; twice as long each time that nothing has changed …"""

LONGEST_RETRY_SECONDS: Final = 30.0
"""… up to this: a network that is mended is used soon, and one that is not costs little."""


class Connects(Protocol):
    """What makes the edges of a plan; see ``link.side.AgentSide``."""

    @property
    def here(self) -> Fault: ...

    async def connect(self, connect: Connect) -> Mapping[Member, Exception]: ...


class PlanEdges:
    """The edges of ``connect`` at ``member``, as its ``side`` makes them. All of it on the agent's thread."""

    def __init__(self, member: Member, side: Connects, connect: Connect) -> None:
        self._member = member
        self._side = side
        self._connect = connect
        self._changed = asyncio.Event()
        self._ready: Ready | None = None
        self._wanting = False

    def changed(self) -> None:
        """Edges may have become ready, or have been lost: ``keep`` looks at once."""
        self._changed.set()

    async def prepare(self) -> Ready:
        """Try once what is not ready; what is then."""
        self._changed.clear()
        failed: Mapping[Member, Exception]
        try:
            failed = await self._side.connect(self._connect)
        except Exception as error:  # no peer's fault: none of them can be used
            failed = dict.fromkeys((peer.member for peer in self._connect.peers), error) or {self._member: error}
        self._wanting = any(blame(error, self._side.here)[1] for error in failed.values())
        told = tuple(EdgeFailure(member, clean(_text(error))) for member, error in sorted(failed.items()))
        ready = Ready(fingerprint=self._connect.fingerprint, failed=told)
        if ready != self._ready:
            for failure in told:
                log.warning("%s: the edge with %s is not ready: %s", self._member, failure.peer, failure.error)
        self._ready = ready
        return ready

    async def keep(self, say: Callable[[Ready], object]) -> None:
        """After the first ``prepare``: again for what a retry may help, and for each ``changed``; ``say`` what is ready
        whenever that is not what it was. Until it is cancelled, because the plan is not the present one any more."""
        wait = FIRST_RETRY_SECONDS
        while True:
            await _happened(self._changed, wait if self._wanting else None)
            before = self._ready
            ready = await self.prepare()
            wait = min(2 * wait, LONGEST_RETRY_SECONDS)
            if ready != before:
                say(ready)
                wait = FIRST_RETRY_SECONDS


class EdgesBeside:
    """The edges of one kind of Connect beside the plan's; those of the next take their place."""

    def __init__(self, link: Link, member: Member, side: Connects) -> None:
        self._link, self._member, self._side = link, member, side
        self._edges: PlanEdges | None = None
        self._task: asyncio.Task[None] | None = None

    def prepare(self, connect: Connect) -> None:
        """Told with Ready; one without peers gives those before back."""
        if self._task is not None:
            self._task.cancel()
        self._task = self._link.spawn(self._keep(connect))

    async def _keep(self, connect: Connect) -> None:
        self._edges = edges = PlanEdges(self._member, self._side, connect)
        ready = await edges.prepare()
        if connect.peers:
            self._link.send(ready)
            await edges.keep(self._link.send)

    def changed(self) -> None:
        """See ``PlanEdges.changed``."""
        if self._edges is not None:
            self._edges.changed()


async def _happened(event: asyncio.Event, seconds: float | None) -> None:
    """Until ``event`` is set, or so many seconds have passed. (``wait_for`` loses a cancellation at the same time.)"""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, AgentError) else repr(error)
