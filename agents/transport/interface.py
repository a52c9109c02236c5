"""The transport seam: what moves the bytes of a version from a trainer rank's slots into an inference rank's memory.

A transport is a pair of classes, a ``Sender`` in every trainer rank and a ``Receiver`` in every inference rank, and one
entry in ``registry.TRANSPORTS``. Which one runs is decided by the type of the settings in the daemon's Welcome;
nothing outside of a transport asks for it. The rounds, the digests and the decision to commit are the same for all.

The life of both ends, step by step, and on which thread each step runs. *Main* is the thread that trains or runs
batches, *agent* is the agent's own event loop (``link.thread``).

1. Construction (agent): with the memory that is read or written. Nothing is opened.
2. ``open(settings)`` (agent), at every Welcome: the first opens what has to be opened and registers the memory; a
   later one (another daemon, the same process) takes over what may change. What it raises ends the agent, and its
   process learns it from its next call.
3. ``announcement()`` (agent): how peers reach this end. It travels to them through the daemon, as
   ``Peer.endpoint_name`` and ``Peer.endpoint``; a transport without endpoints has the empty name and no bytes.
4. ``connect`` (agent): the plan is known. A sender gets its shares, one for each peer, and makes everything ready that
   a write can need; a share that has not changed is the same object as before. It returns the peers for which it could
   not; these are told to the daemon, the others are used. A receiver gets the Connect whose copies say what has to be
   done with bytes that arrive packed. It may be called again at any time, also while a write runs: whenever the plan
   changes, and with the same arguments for as long as an edge is not ready or ``poll`` says that one has changed.
5. For each version:

   a. ``Sender.stage(version)`` (main; the agent may connect and poll meanwhile): the slots hold the version and no
      write is granted. For transports that must copy the bytes elsewhere first; most do nothing.
   b. ``Sender.write(round_name, members, deadline, ended, filled)`` (agent): the daemon has granted the write, and the
      engines of ``members`` stand still, or serve on from other memory; to the latter a sender that ``writes_ahead``
      may write before (a), while the slots are filled, as far as ``filled`` says that they are. Each member's end is
      told at once, whatever the others do: it got all, or nothing more will be written to it. One whose bytes cannot be
      taken back (its time is over, or ``stop`` has named it) is given up: ``write`` does not wait for it, and its end
      is told from ``poll``.
   c. ``Receiver.begin(round_name, relays)`` and ``end(round_name)`` (agent): around the time in which writers are
      granted; in between, what passes the landing is brought to its rows chunk by chunk.
   d. ``Receiver.arrive(version)`` (main, inside the round): all writers have finished. Afterwards the live memory
      holds the version, derived tensors included; the digest that follows proves it. Beside live memory it is on
      another thread, and ``Receiver.digest()`` may know that digest already.
   e. A rank may be granted the same version again, after a failed attempt.

   f. ``Receiver.reopen()`` (agent): bytes of a writer hang on their way. The new ``announcement`` brings a new plan;
      the writer whose peer is reached by another endpoint counts what was on its way to the old one as ended, unless
      the two ends share memory, by which it may still arrive.

6. ``poll()`` (agent): every millisecond or two while a grant is open on this side, and every ten otherwise.
   ``Sender.in_flight()``: the peers that were given up and that bytes may still reach, read from the slots. As long as
   there is one the grant stays open and the slots are not converted again.
7. ``Sender.close()`` (agent), at the end of the trainer. A receiver has none: what a late writer may still reach has
   to stay where it is until the process ends.

Adding a transport: its module with the two classes; one entry in ``registry.TRANSPORTS``; its settings struct, with
a tag, in ``orchestrator.protocol.messages`` and in the union ``TransportSettings`` there (one line each); and its
section with ``message()`` in ``orchestrator.settings.sections``, in the union ``Transport`` there.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from weightsync.agents.transport.filling import Filled, whole
from weightsync.agents.transport.shares import Share
from weightsync.orchestrator.protocol.edges import LinkKind
from weightsync.orchestrator.protocol.layout import COPY_COLUMNS, Layout, Matrix
from weightsync.orchestrator.protocol.messages import Connect
from weightsync.orchestrator.protocol.names import Digest, Member, RoundName, Version


@dataclass(frozen=True, slots=True)
class SourceMemory:
    """What a sender reads from.

    ``arenas`` are uint8 tensors of one dimension, one for each of ``layout.regions``. ``world`` counts the trainer
    ranks that have a sender. ``first_replica`` says of each row of the layout whether this rank is the first of those
    that hold the same box, for transports by which one copy of it is enough.
    """

    member: Member
    world: int
    layout: Layout
    arenas: Sequence[torch.Tensor]
    first_replica: Sequence[bool]


@dataclass(frozen=True, slots=True)
class TargetMemory:
    """What a receiver fills.

    ``name`` says to people which rank this is. ``tensors`` are uint8 views, one for each of ``layout.regions``, on
    ``device``. ``refresh`` brings derived tensors
    up to date after a write; ``load`` fills everything from whole logical tensors, by name, and refreshes.
    """

    name: str
    device: torch.device
    layout: Layout
    tensors: Sequence[torch.Tensor]
    refresh: Callable[[], None]
    load: Callable[[Iterable[tuple[str, torch.Tensor]]], None]


@dataclass(frozen=True, slots=True)
class HandedOver:
    """The end of one write to ``member``: what was handed over, and with ``error`` why it was not all.

    ``descriptors`` and ``seconds`` (from the first post to the last completion) are 0 where nothing was posted.
    ``link``: what kind of link it went by, and ``by`` the transport's own name of it, where the transport can tell.
    """

    member: Member
    bytes: int
    descriptors: int = 0
    seconds: float = 0.0
    error: str = ""
    link: LinkKind = "unknown"
    by: str = ""


Ended = Callable[[HandedOver], None]
"""Told once of each member of a write, when nothing is in flight to it any more; on the agent's thread."""


class Sender(Protocol):
    """A trainer rank's end. Steps in the order of the module's docstring; the caller never lets two overlap.

    Attributes:
        writes_ahead: whether ``write`` can begin while the slots are still being filled.
    """

    writes_ahead: bool = False

    @abstractmethod
    def open(self, settings: Any) -> None:
        """Be ready for ``connect``; ``settings`` are of the type that this transport is registered under."""

    def announcement(self) -> tuple[str, bytes]:
        """Name and metadata of this end for its peers."""
        return "", b""

    async def connect(self, shares: Sequence[Share]) -> Mapping[Member, Exception]:
        """Make everything ready that writing ``shares`` needs; what earlier shares needed may be given back.

        Returns:
            The peers that cannot be written to now, and why. Nothing is left of what was begun for them; a later call
            with the same shares tries those again that a retry may help. All other peers are ready.

        Raises:
            AgentError: something of our own. Nothing may be written until a later call returns.
        """
        return {}

    def stage(self, version: Version) -> None:
        """The slots hold ``version``; on the trainer's thread."""

    @abstractmethod
    async def write(
        self,
        round_name: RoundName,
        members: Sequence[Member],
        deadline_seconds: float,
        ended: Ended,
        filled: Filled = whole,
    ) -> None:
        """Hand over what ``members`` are owed of the version in the slots; return when nothing more will be posted.

        Args:
            round_name: of the grant, by which the peers tell this attempt from others.
            members: of the grant; ``ended`` hears nothing of those that are no peers of the plan.
            deadline_seconds: for everything together.
            ended: told of each peer.
            filled: what of the slots may be read; only for one that ``writes_ahead`` may it be less than all.

        Raises:
            Exception: something of our own, which is no peer's fault. ``ended`` will still be told of those that are
                ``in_flight`` now, and of no others.
        """

    def stop(self, members: Collection[Member], reason: str) -> None:
        """Post nothing more to ``members`` in the write that runs; the others go on."""

    def in_flight(self) -> Sequence[Member]:
        """Peers to which bytes may still move although they were given up."""
        return ()

    def poll(self) -> bool:
        """Let the transport make progress; must not block. Whether edges may have become ready, or have been lost:
        ``connect`` tells which."""
        return False

    def close(self) -> None:
        """Give everything back. Nothing is in flight; again does nothing."""


class Receiver(Protocol):
    """An inference rank's end. Steps in the order of the module's docstring.

    Attributes:
        landed: int64 ``[n, COPY_COLUMNS]`` of the plan in use, of those that were connected last: what lies in the
            landing when all writers have finished, with its place there in COPY_STAGED, and what ``arrive`` has yet to
            bring to its row. Replaced as a whole. Empty for a transport by which nothing lands.
        lands_beside: whether a version can land beside live memory, so that ``arrive`` may come while a switch holds
            the main thread only, and what has landed can be digested before it.
    """

    lands_beside: bool = False

    landed: Matrix = np.empty((0, COPY_COLUMNS), np.int64)

    @abstractmethod
    def open(self, settings: Any) -> None:
        """Be ready for ``announcement``; ``settings`` are of the type that this transport is registered under."""

    def announcement(self) -> tuple[str, bytes]:
        """Name and metadata of this end for its peers."""
        return "", b""

    async def connect(self, connect: Connect) -> Mapping[Member, Exception]:
        """Prepare what ``arrive`` will need. A Connect that ``relays`` is kept beside the other one.

        Returns:
            The peers whose bytes cannot be taken now, and why; a later call with the same Connect tries again.

        Raises:
            AgentError: the copies do not fit this rank's layout.
        """
        return {}

    def landed_by(self, fingerprint: str) -> Matrix | None:
        """As ``landed``, by the Connect of this fingerprint; None if that is none of those connected last."""
        return None

    def begin(self, round_name: RoundName, relays: bool = False) -> None:
        """Writers of this round may be granted from now on, and of no other: what still comes of others is not let
        near the rows. ``relays``: by the Connect that does so. On the agent's thread, before the daemon is told
        Exposed; again changes nothing."""

    def end(self, round_name: RoundName) -> None:
        """All writers of this round have finished, or it is over; for another than the one that began it does
        nothing. On the agent's thread."""

    def reopen(self) -> None:
        """Be reached by another endpoint from now on: nothing that was sent to the one before arrives any more, as far
        as the transport can see to it. No writer is granted. On the agent's thread.

        Raises:
            AgentError: there is none.
        """

    @abstractmethod
    def renew(self, memory: TargetMemory) -> None:
        """The same regions hold other tensors from now on (experts were rebalanced): forget what was connected."""

    @abstractmethod
    def arrive(self, version: Version) -> None:
        """Bring the live memory to ``version``, from what the writers have handed over; on the worker's main thread.

        Raises:
            AgentError: the version is not all there. The live memory may be torn.
        """

    def digest(self) -> Digest | None:
        """Of all that has arrived in the round that has ended, where its rows are, after ``arrive`` and in no other
        order: as far as it could, it was taken while the rest was on its way. Waits for the device.

        Returns:
            None: it was not, or the plan in use does not reach each byte of the layout once.
        """
        return None

    def poll(self) -> None:
        """Let the transport make progress; must not block."""
