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
   a write can need; a share that has not changed is the same object as before. A receiver gets the Connect whose
   copies say what has to be done with bytes that arrive packed. It may be called again at any time outside a write,
   whenever the plan changes, and after a failure with the same arguments.
5. For each version:

   a. ``Sender.stage(version)`` (main; the agent may connect and poll meanwhile): the slots hold the version and no
      write is granted. For transports that must copy the bytes elsewhere first; most do nothing.
   b. ``Sender.write(members, deadline, groups)`` (agent): the daemon has granted the write. When it returns, all bytes
      for ``members`` have been handed over, and none is written any more. The engines of ``members`` stand still.
   c. ``Receiver.arrive(version)`` (main, inside the round): all writers have finished. Afterwards the live memory
      holds the version, derived tensors included; the digest that follows proves it.
   d. A rank may be granted the same version again, after a failed attempt.

6. ``poll()`` (agent): every millisecond or two while a grant is open on this side, and every ten otherwise.
   ``Sender.in_flight()``: whether a write that failed or ran out of time may still read the slots or reach a peer. As
   long as it is true the grant stays open and the slots are not converted again.
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

import torch
from weightsync.agents.errors import AgentError
from weightsync.agents.transport.shares import Share
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.messages import Connect
from weightsync.orchestrator.protocol.names import Member, Version


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
    """What one write handed over to ``member``.

    ``descriptors`` and ``seconds`` (from the first post to the last completion) are 0 where nothing was posted.
    """

    member: Member
    bytes: int
    descriptors: int = 0
    seconds: float = 0.0


class PushError(AgentError):
    """Some peers were not written. ``moved`` tells of those that were, ``failures`` says why by peer.

    One failure that no retry helps is the one that counts: the others would only be repeated with it.
    """

    def __init__(self, moved: tuple[HandedOver, ...], failures: Mapping[Member, AgentError]) -> None:
        super().__init__("; ".join(f"{member}: {error}" for member, error in failures.items()))
        self.moved = moved
        self.failures = dict(failures)
        worst = min(failures.values(), key=lambda error: error.retry)
        self.fault = worst.fault
        self.retry = worst.retry


class Sender(Protocol):
    """A trainer rank's end. Steps in the order of the module's docstring; the caller never lets two overlap."""

    @abstractmethod
    def open(self, settings: Any) -> None:
        """Be ready for ``connect``; ``settings`` are of the type that this transport is registered under."""

    def announcement(self) -> tuple[str, bytes]:
        """Name and metadata of this end for its peers."""
        return "", b""

    async def connect(self, shares: Sequence[Share]) -> None:
        """Make everything ready that writing ``shares`` needs; what earlier shares needed may be given back.

        Raises:
            AgentError: a peer or its memory is refused. Nothing may be written until a later call succeeds.
        """

    def stage(self, version: Version) -> None:
        """The slots hold ``version``; on the trainer's thread."""

    @abstractmethod
    async def write(
        self, members: Sequence[Member], deadline_seconds: float, groups: Collection[int] | None = None
    ) -> tuple[HandedOver, ...]:
        """Hand over what ``members`` are owed of the version in the slots.

        Args:
            members: of the grant; those that are owed nothing are left out of the result.
            deadline_seconds: for everything together.
            groups: numbers of the layout's pipelining groups (``COPY_GROUP``) to write; None: all of them.

        Raises:
            PushError: some peers were not written.
            AgentError: none was.
        """

    def in_flight(self) -> bool:
        """Whether bytes may still move although no ``write`` is running."""
        return False

    def poll(self) -> None:
        """Let the transport make progress; must not block."""

    def close(self) -> None:
        """Give everything back. Nothing is in flight; again does nothing."""


class Receiver(Protocol):
    """An inference rank's end. Steps in the order of the module's docstring."""

    @abstractmethod
    def open(self, settings: Any) -> None:
        """Be ready for ``announcement``; ``settings`` are of the type that this transport is registered under."""

    def announcement(self) -> tuple[str, bytes]:
        """Name and metadata of this end for its peers."""
        return "", b""

    async def connect(self, connect: Connect) -> None:
        """Prepare what ``arrive`` will need.

        Raises:
            AgentError: the copies do not fit this rank's layout.
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

    def poll(self) -> None:
        """Let the transport make progress; must not block."""
