"""What a trainer rank does on the agent's thread: announce its slots, connect its edges, write when granted."""

import asyncio
import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Final

from weightsync.agents.errors import AgentError, blame
from weightsync.agents.link.beside import computed
from weightsync.agents.link.side import Link
from weightsync.agents.tables.spans import NOWHERE, Spans
from weightsync.agents.trainer.errors import ConversionTableError
from weightsync.agents.trainer.publication import PublishError
from weightsync.agents.trainer.slots.slots import FilledSlots
from weightsync.agents.transport.interface import HandedOver, PushError, Sender, SourceMemory
from weightsync.agents.transport.registry import Ends, Transport
from weightsync.agents.transport.shares import NOT_READ, Reading, Shares
from weightsync.orchestrator.protocol.edges import PeerTransfer
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.messages import (
    Closed,
    Connect,
    Fault,
    FromDaemon,
    Grant,
    Needs,
    Outcome,
    Staged,
    Standing,
    TcpStoreRendezvous,
    TrainerStatus,
    TransportSettings,
    Welcome,
)
from weightsync.orchestrator.protocol.names import NO_BYTES, Digest, Member, RoundName, Version
from weightsync.orchestrator.protocol.text import clean

log = logging.getLogger(__name__)

IN_FLIGHT_POLL_SECONDS: Final = 0.005
"""Short beside a round: once a peer that is gone is forgotten, the next grant must not find this one open."""


class TrainerSide:
    """See ``link.side.AgentSide``.

    ``read`` and ``prepare`` run on the trainer's thread, while nothing is granted; everything else on the agent's.

    Args:
        link: the agent's thread.
        memory: the slots' arenas and their layout. None: the slots are made for what the engines need, when they have
            said it; ``hold`` brings them.
        staged_bytes: what STAGED reports: the bytes that one conversion fills.

    Attributes:
        standing: what the daemon said last that it does, while a version waits; only the first rank is told.
        needs: what the daemon said last that the engines need; None before, and for a trainer that has a table.
    """

    here: Fault = "trainer"

    def __init__(self, link: Link, memory: SourceMemory | None, staged_bytes: int) -> None:
        self._link = link
        self._follows_needs = memory is None
        self.needs: Needs | None = None
        self.standing = ""
        self._transport: TransportSettings | None = None
        self._memory = memory
        self._staged_bytes = staged_bytes
        self._shares, self._senders = _ends(memory)
        # A connect that came in the middle of a write would take its edges from under it.
        self._using_sender = asyncio.Lock()
        self._fingerprint = ""
        self._staged: Version | None = None
        self._restaged = 0
        self._open: RoundName | None = None
        self._reserved = False
        self._closing = False
        self._waiting: list[Grant] = []
        """Grants that came while the slots were reserved; the daemon gives one at a time."""
        self._outcome: Future[int] | None = None
        self._reading: tuple[str, Version, Reading] | None = None

    # ------------------------------------------------------------------------------------------ for ``TrainerAgent``
    def reserve(self) -> bool:
        """Ask for the slots for the next version; false while something is written from them.

        From then on grants wait: all ranks have to agree first that they begin the next version, and until then one
        that refuses a grant would tear an engine that the others write to. ``take`` or ``release`` must follow.
        """
        if self._open is not None or self._in_flight():
            return False
        self._reserved = True
        return True

    def take(self) -> None:
        """Every rank has reserved its slots: they hold no version any more."""
        self._staged = None
        self.release()

    def release(self) -> None:
        """The slots are not needed after all, or taken: grants that waited are judged by what the slots hold now."""
        self._reserved = False
        waiting, self._waiting = self._waiting, []
        for grant in waiting:
            self._link.spawn(self._write(grant))

    def read(self, version: Version, slots: FilledSlots) -> Spans:
        """Once ``slots`` hold ``version``: digest what will be sent, as far as edges are known. Returns where all is
        finite, which is nowhere for slots that the daemon does not know yet."""
        if self._memory is None or self._memory.layout is not slots.layout:
            return NOWHERE
        self._reading = None  # a version that FAILED may have come again with other weights
        return self._read(version).finite

    def prepare(self, version: Version) -> float:
        """Before STAGED, on the trainer's thread: digest what ``read`` could not, and have the transport take what it
        must. Returns the seconds that both took."""
        began = time.monotonic()
        self._read(version)
        self._senders.current.stage(version)
        return time.monotonic() - began

    def staged(
        self,
        version: Version,
        convert_seconds: float,
        digest_seconds: float,
        outcome: "Future[int]",
        restaged: int = 0,
    ) -> None:
        """Tell the daemon; ``outcome`` will be the commit sequence number, or PublishError."""
        self._staged, self._restaged = version, restaged
        self._outcome = outcome
        self._link.send(
            Staged(
                version=version,
                bytes=self._staged_bytes,
                convert_seconds=convert_seconds,
                digest_seconds=digest_seconds,
                restaged=restaged,
            )
        )

    def retire(self) -> bool:
        """Obey no further grant; whether the last one is closed, so that nothing reads the slots any more."""
        self._closing = True
        return self._open is None and not self._in_flight()

    def hold(self, memory: SourceMemory, staged_bytes: int) -> "Future[None]":
        """Other slots from now on: announce them. Only after ``take``; the result is there when the old ones, which
        may then be freed, are out of every transport's reach."""
        done: Future[None] = Future()
        self._link.spawn(self._hold(memory, staged_bytes, done))
        return done

    async def _hold(self, memory: SourceMemory, staged_bytes: int, done: "Future[None]") -> None:
        try:
            async with self._using_sender:
                self._fingerprint = ""  # edges of the old slots serve nobody any more
                self._reading = None
                for sender in self._senders:
                    sender.close()
                self._memory, self._staged_bytes = memory, staged_bytes
                self._shares, self._senders = _ends(memory)
                if self._transport is not None:
                    self._senders.open(self._transport)
            self._link.announce()
        except BaseException as error:  # handed to the trainer's thread
            done.set_exception(error)
        else:
            done.set_result(None)

    # ----------------------------------------------------------------------------------------- ``link.side.AgentSide``
    def status(self) -> TrainerStatus:
        return TrainerStatus(
            staged=self._staged,
            open_rounds=(self._open,) if self._open is not None else (),
            restaged=self._restaged,
            follows_needs=self._follows_needs,
        )

    def welcomed(self, welcome: Welcome) -> None:
        if self._follows_needs and isinstance(welcome.rendezvous, TcpStoreRendezvous):
            raise ConversionTableError(
                "rendezvous: tcpstore wants every layout before anybody can say what engines need; give TrainerAgent a"
                " table (an adapter: model_config), or use rendezvous: hub"
            )
        self._transport = welcome.transport
        if self._memory is not None:
            self._senders.open(welcome.transport)

    def announcement(self) -> tuple[Layout, str, bytes] | None:
        if self._memory is None:
            return None
        return self._memory.layout, *self._senders.current.announcement()

    @property
    def _who(self) -> str:
        return str(self._memory.member) if self._memory is not None else "trainer"

    async def connect(self, connect: Connect) -> None:
        async with self._using_sender:
            self._fingerprint = ""  # no grant is obeyed until this plan's edges are ready
            # Tables of a large plan take seconds, and the loop has heartbeats to answer.
            shares = await computed(lambda: self._shares.replan(connect))
            await self._senders.current.connect(shares)
            self._fingerprint = connect.fingerprint

    def heard(self, message: FromDaemon) -> None:
        match message:
            case Grant() if self._reserved:
                self._waiting.append(message)
            case Grant():
                self._link.spawn(self._write(message))
            case Outcome():
                self._settle(message)
            case Needs():
                self.needs = message
            case Standing():
                self.standing = message.sentence
            case _:
                pass  # Abort: what was posted cannot be taken back; CLOSED follows when it is DONE

    def poll(self) -> bool:
        for sender in self._senders:
            sender.poll()
        return self._open is not None

    def shut(self) -> None:
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_exception(PublishError("the agent was closed before the version was committed"))
        for sender in self._senders:
            sender.close()

    # ------------------------------------------------------------------------------------------------------- a grant
    async def _write(self, grant: Grant) -> None:
        objection = self._objection(grant)
        if objection:
            self._link.send(Closed(round=grant.round, error=objection, fault="trainer"))
            return
        self._open = grant.round
        closed = await self._push(grant)
        await self._until_nothing_is_in_flight()
        self._open = None
        self._link.send(closed)

    def _objection(self, grant: Grant) -> str:
        if grant.round.epoch != self._link.epoch:
            return f"grant of epoch {grant.round.epoch}; this agent obeys epoch {self._link.epoch}"
        if grant.fingerprint != self._fingerprint:
            return f"grant for the edges {grant.fingerprint[:12]}; this rank has {self._fingerprint[:12] or 'none'}"
        if self._closing:
            return "this trainer rank is closing its agent"
        if self._open is not None:
            return f"round {self._open} is still being written"
        if self._staged != grant.version:
            return f"the slots hold {self._staged or 'a version in the making'}, not {grant.version}"
        return ""

    async def _push(self, grant: Grant) -> Closed:
        """Write what is granted; the report of it, whatever happens."""
        ends = time.monotonic() + grant.deadline_seconds
        digests: Mapping[Member, Digest] = {}
        try:
            async with self._using_sender:
                # Seconds on the CPU, if no edge was known when the slots were filled.
                digests = (await computed(lambda: self._read(grant.version))).digests
                remaining = max(0.0, ends - time.monotonic())
                moved = await self._senders.current.write(grant.members, remaining)
        except AgentError as error:
            log.warning("%s: round %s: %s", self._who, grant.round, error)
            written = error.moved if isinstance(error, PushError) else ()
            return Closed(
                round=grant.round,
                peers=_transfers(written, digests),
                error=clean(str(error)),
                fault=error.fault,
                retry=error.retry,
            )
        except Exception as error:
            # Without CLOSED the peers' memory would count as in reach of this grant until this process ends.
            log.exception("%s: round %s", self._who, grant.round)
            fault, retry = blame(error, self.here)
            return Closed(round=grant.round, error=clean(repr(error)), fault=fault, retry=retry)
        return Closed(round=grant.round, peers=_transfers(moved, digests))

    def _read(self, version: Version) -> Reading:
        """Of the bytes that each peer is owed; read once per version and plan."""
        fingerprint, known = self._fingerprint, self._reading
        if known is None or known[:2] != (fingerprint, version):
            began = time.monotonic()
            known = self._reading = (fingerprint, version, self._shares.read() if fingerprint else NOT_READ)
            log.debug("%s: digest of %s took %.3f s", self._who, version, time.monotonic() - began)
        return known[2]

    def _in_flight(self) -> bool:
        return any(sender.in_flight() for sender in self._senders)

    async def _until_nothing_is_in_flight(self) -> None:
        """CLOSED is a promise. A handle whose deadline passed keeps the grant open for as long as it is not DONE."""
        while self._in_flight():  # noqa: ASYNC110  (no transport has an event to wait for)
            await asyncio.sleep(IN_FLIGHT_POLL_SECONDS)  # the agent's poll asks after them

    def _settle(self, outcome: Outcome) -> None:
        waiting = self._outcome
        if waiting is None or waiting.done() or outcome.version != self._staged or outcome.restaged != self._restaged:
            return  # the outcome of an earlier staging may be told twice
        if outcome.committed:
            waiting.set_result(outcome.sequence)
        else:
            waiting.set_exception(PublishError(outcome.reason))


def _ends(memory: SourceMemory | None) -> tuple[Shares, Ends[Sender]]:
    """The shares and the transports' ends of these slots; of none, as long as there are none."""
    if memory is None:
        return Shares(Layout((), (), b""), ()), Ends(_no_sender)
    return Shares(memory.layout, memory.arenas), Ends(lambda transport: transport.sender(memory))


def _no_sender(transport: Transport) -> Sender:
    raise AssertionError("a transport is opened when there are slots")


def source_of(slots: FilledSlots, member: Member, world: int) -> SourceMemory:
    """The slots' memory, as ``member`` of ``world`` ranks that have an agent."""
    first_replica = tuple(entry.first_replica for entry in slots.entries())
    return SourceMemory(member, world, slots.layout, slots.arenas, first_replica)


def staged_bytes_of(slots: FilledSlots) -> int:
    """What one conversion fills: all of the arenas but the staging region."""
    return sum(arena.numel() for number, arena in enumerate(slots.arenas) if number != slots.layout.staging)


def _transfers(moved: tuple[HandedOver, ...], digests: Mapping[Member, Digest]) -> tuple[PeerTransfer, ...]:
    return tuple(
        PeerTransfer(each.member, each.bytes, each.descriptors, each.seconds, digests.get(each.member, NO_BYTES))
        for each in moved
    )
