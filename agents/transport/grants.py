"""One grant at a rank that writes, from its arrival to its last CLOSED: which of its edges have ended, and how."""

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import Final, Protocol

from weightsync.orchestrator.protocol.edges import PeerTransfer
from weightsync.orchestrator.protocol.messages import Closed, Fault, Grant
from weightsync.orchestrator.protocol.names import NO_BYTES, Member, RoundName
from weightsync.orchestrator.protocol.text import clean

SAY_SECONDS: Final = 0.05
"""At most so often CLOSED is said before the last one: edges that end together are told together."""


class Cancellable(Protocol):
    """A call that will be made."""

    def cancel(self) -> None: ...


Later = Callable[[float, Callable[[], None]], Cancellable]
"""Call something so many seconds from now."""


def _later(seconds: float, work: Callable[[], None]) -> Cancellable:
    return asyncio.get_running_loop().call_later(seconds, work)


class OpenGrant:
    """What becomes of ``grant``. Each peer's end is told by ``ended``; CLOSED says those that there are.

    It is said at once for the first edge that failed and for the last edge, otherwise every SAY_SECONDS.

    Args:
        say: sends CLOSED to the daemon; the last one has ``final``.
        later: in the place of the event loop's ``call_later``.

    Attributes:
        open: peers whose end has not been told.
        stopped: peers to which nothing may be posted any more, with the reason.
        posting: whether anything may have been posted. Before that, ``stop`` is the end of whom it names.
        final: whether the last CLOSED has been said; after that there is nothing but ``repeat``.
    """

    def __init__(self, grant: Grant, say: Callable[[Closed], object], later: Later = _later) -> None:
        self.grant = grant
        self.open = set(grant.members)
        self.stopped: dict[Member, str] = {}
        self.posting = False
        self.final = False
        self._say = say
        self._later = later
        self._ended: dict[Member, PeerTransfer] = {}
        self._has_failed = False
        self._due: Cancellable | None = None
        self._error: tuple[str, Fault, bool] = ("", "", True)

    def stop(self, members: Collection[Member], reason: str) -> frozenset[Member]:
        """Post nothing more to ``members``; those of them that something may still be posted or on its way to."""
        named = frozenset(self.open.intersection(members))
        self.stopped |= dict.fromkeys(named, reason)
        if self.posting:
            return named
        for member in sorted(named):
            self.ended(not_written(member, reason))  # a digest may hang, with the device that computes it
        return frozenset()

    def ended(self, transfer: PeerTransfer) -> None:
        """Nothing is in flight to a peer, and nothing more will be posted."""
        if transfer.peer not in self.open:
            return
        self.open.discard(transfer.peer)
        self._ended[transfer.peer] = transfer
        first_failure = bool(transfer.error) and not self._has_failed
        self._has_failed = self._has_failed or first_failure
        if first_failure or not self.open:
            self._speak()
        elif self._due is None:
            self._due = self._later(SAY_SECONDS, self._speak)

    def leave(self, still: Collection[Member], error: str = "", fault: Fault = "", *, retry: bool = True) -> None:
        """Nothing is posted to others than those of ``still`` that are open: nothing is owed to the others or, with
        ``error``, something of our own keeps us from it."""
        self.open.intersection_update(still)
        if error:
            self._error = clean(error), fault, retry
        if not self.final and (error or not self.open):
            self._speak()

    def repeat(self) -> None:
        """Say again what was said last, which the connection before may have lost."""
        if self.final:
            self._speak()

    def _speak(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
        self.final = not self.open
        error, fault, retry = self._error
        peers = tuple(self._ended.values())
        self._say(Closed(round=self.grant.round, peers=peers, final=self.final, error=error, fault=fault, retry=retry))


def not_written(member: Member, reason: str) -> PeerTransfer:
    """The end of an edge over which nothing was posted."""
    return PeerTransfer(member, 0, 0, 0.0, NO_BYTES, clean(reason))


def closed_to(grant: OpenGrant, grants: Mapping[RoundName, OpenGrant]) -> dict[Member, str]:
    """Peers of the grant to which nothing may be posted, and why. ``grants``: all of this rank, the oldest first."""
    closed = dict(grant.stopped)
    for name, earlier in grants.items():
        if earlier is grant:
            break
        closed |= {member: f"edge to {member} has not ended (round {name})" for member in earlier.open}
    return closed
