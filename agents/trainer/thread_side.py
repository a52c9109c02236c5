"""What a trainer rank does on the agent's thread: announce its slots, connect its edges, write when granted."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

from weightsync.agents.errors import AgentError, blame
from weightsync.agents.link.beside import computed
from weightsync.agents.link.side import Link
from weightsync.agents.tables.spans import NOWHERE, Spans
from weightsync.agents.trainer.errors import ConversionTableError
from weightsync.agents.trainer.publication import PublishError
from weightsync.agents.trainer.slots.slots import FilledSlots
from weightsync.agents.transport.ahead import write_ahead
from weightsync.agents.transport.filling import Filling
from weightsync.agents.transport.grants import OpenGrant, closed_to, not_written
from weightsync.agents.transport.interface import HandedOver, SourceMemory
from weightsync.agents.transport.registry import ends_of
from weightsync.agents.transport.shares import NOT_READ, Reading, Share
from weightsync.orchestrator.protocol.edges import PeerTransfer
from weightsync.orchestrator.protocol.limits import MAX_OPEN_GRANTS
from weightsync.orchestrator.protocol.messages import (
    Abort,
    Announce,
    Connect,
    Converting,
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
        self._shares, self._senders = ends_of(memory)
        self._owed: Sequence[Share] = ()
        """Of the plan that was connected last."""
        self._connecting = asyncio.Lock()  # else the slots could be exchanged in the middle of it
        self._computing = asyncio.Lock()
        """Held while another thread uses the shares."""
        self._fingerprint = ""
        self._staged: Version | None = None
        self._filling: Filling | None = None
        """What the slots are being filled with, if that may be written meanwhile."""
        self._restaged = 0
        self._grants: dict[RoundName, OpenGrant] = {}
        """Not closed towards everybody yet. Only the edges to peers that hang outlive their round."""
        self._closed: OpenGrant | None = None
        """The one that was closed last."""
        self._reserved = False
        self._closing = False
        self._waiting: list[OpenGrant] = []
        """Those of them that came while the slots were reserved."""
        self._outcome: Future[int] | None = None
        self._reading: tuple[str, Version, Reading] | None = None

    # ------------------------------------------------------------------------------------------ for ``TrainerAgent``
    def reserve(self) -> str:
        """Ask for the slots for the next version; empty, or which edge is still written from them.

        From then on grants wait: all ranks have to agree first that they begin the next version, and until then one
        that refuses a grant would tear an engine that the others write to. ``take`` or ``release`` must follow.
        """
        # An edge that the daemon has ended may read what is being converted: its target is within reach until it says
        # CLOSED, so nobody serves what arrives there, and a frozen engine keeps no version from the others.
        if why := self._in_use(lambda grant: grant.open - grant.stopped.keys()):
            return why
        self._reserved = True
        return ""

    def take(self) -> None:
        """Every rank has reserved its slots: they hold no version any more."""
        self._staged = None
        self.release()

    def release(self) -> None:
        """The slots are not needed after all, or taken: grants that waited are judged by what the slots hold now."""
        self._reserved = False
        waiting, self._waiting = self._waiting, []
        for grant in waiting:
            self._link.spawn(self._carry_out(grant))

    def convert(self, version: Version) -> Filling | None:
        """After ``take``: the slots are filled with ``version``, and what is filled may be written from now on; None
        where the transport cannot. ``staged`` or ``give_up`` must follow."""
        if self._memory is None or self._transport is None or not self._senders.current.writes_ahead:
            return None
        self._filling = Filling(version, self._memory.arenas[0].device)
        self._link.send(Converting(version=version))
        return self._filling

    def give_up(self, reason: str) -> None:
        """What was converted is no version: nothing more of it is written."""
        filling = self._end_filling(staged=False)
        if filling is None:
            return
        self._link.send(Converting(version=None))  # first: what follows is no engine's fault
        for grant in [each for each in self._grants.values() if each.grant.version == filling.version]:
            self._senders.current.stop(grant.stop(grant.grant.members, reason), reason)
            grant.leave(self._senders.current.in_flight(), reason, "trainer")

    def _end_filling(self, *, staged: bool) -> Filling | None:
        filling, self._filling = self._filling, None
        if filling is not None:
            filling.ended.set_result(staged)
        return filling

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
        trace: str = "",
    ) -> None:
        """Tell the daemon; ``outcome`` will be the commit sequence number, or PublishError."""
        self._staged, self._restaged = version, restaged
        self._end_filling(staged=True)
        self._outcome = outcome
        self._link.send(Staged(
            version=version, bytes=self._staged_bytes, convert_seconds=convert_seconds, digest_seconds=digest_seconds,
            restaged=restaged, trace=trace,
        ))  # fmt: skip

    def retire(self) -> bool:
        """Obey no further grant; whether the last one is closed, so that nothing reads the slots any more."""
        self._closing = True
        return not self._in_use()

    def hold(self, memory: SourceMemory, staged_bytes: int) -> "Future[None]":
        """Other slots from now on: announce them. Only after ``take``; the result is there when the old ones, which
        may then be freed, are out of every transport's reach."""
        done: Future[None] = Future()
        self._link.spawn(self._hold(memory, staged_bytes, done))
        return done

    async def _hold(self, memory: SourceMemory, staged_bytes: int, done: "Future[None]") -> None:
        try:
            async with self._connecting:
                self._fingerprint = ""  # edges of the old slots serve nobody any more
                self._reading = None
                self._owed = ()
                for sender in self._senders:
                    sender.close()
                self._memory, self._staged_bytes = memory, staged_bytes
                self._shares, self._senders = ends_of(memory)
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
            open_rounds=tuple(self._grants),
            restaged=self._restaged,
            follows_needs=self._follows_needs,
            converting=self._filling.version if self._filling is not None else None,
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

    def announcement(self) -> Announce | None:
        if self._memory is None:
            return None
        name, endpoint = self._senders.current.announcement()
        return Announce(layout=self._memory.layout, endpoint_name=name, endpoint=endpoint)

    @property
    def _who(self) -> str:
        return str(self._memory.member) if self._memory is not None else "trainer"

    async def connect(self, connect: Connect) -> Mapping[Member, Exception]:
        async with self._connecting:
            if self._fingerprint != connect.fingerprint:
                self._fingerprint = ""  # no grant is obeyed until this plan's edges are ready
                async with self._computing:  # seconds for a large plan's tables, and the loop has heartbeats to answer
                    self._owed = await computed(lambda: self._shares.replan(connect))
            failed = await self._senders.current.connect(self._owed)
            self._fingerprint = connect.fingerprint
            return failed

    def heard(self, message: FromDaemon) -> None:
        match message:
            case Grant():
                self._granted(message)
            case Abort():
                self._stop(message)
            case Outcome():
                self._settle(message)
            case Needs():
                self.needs = message
            case Standing():
                self.standing = message.sentence
            case _:
                pass

    def poll(self) -> bool:
        for sender in self._senders:
            if sender.poll():
                self._link.reconnect()
        return bool(self._grants)

    def shut(self) -> None:
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_exception(PublishError("the agent was closed before the version was committed"))
        for sender in self._senders:
            sender.close()

    # ------------------------------------------------------------------------------------------------------- a grant
    def _granted(self, message: Grant) -> None:
        known = self._grants.get(message.round, self._closed)
        if known is not None and known.grant.round == message.round:
            known.repeat()  # said again after a reconnect, it is one grant
            return
        grant = OpenGrant(message, self._link.say_once)
        if len(self._grants) >= MAX_OPEN_GRANTS:
            grant.leave((), f"{len(self._grants)} grants are open: {self._in_use()}", "network")
            return
        self._grants[message.round] = grant
        if self._reserved:
            self._waiting.append(grant)
        else:
            self._link.spawn(self._carry_out(grant))

    async def _carry_out(self, grant: OpenGrant) -> None:
        grant.posting = True  # or digested, and the slots are in use for that long
        objection = self._objection(grant)
        if objection:
            grant.leave((), objection, "trainer")
        else:
            await self._push(grant)
        self._forget_closed()

    def _objection(self, opened: OpenGrant) -> str:
        grant = opened.grant
        if grant.round.epoch != self._link.epoch:
            return f"grant of epoch {grant.round.epoch}; this agent obeys epoch {self._link.epoch}"
        if grant.fingerprint != self._fingerprint:
            return f"grant for the edges {grant.fingerprint[:12]}; this rank has {self._fingerprint[:12] or 'none'}"
        if self._closing:
            return "this trainer rank is closing its agent"
        if grant.version not in (self._staged, self._filling.version if self._filling is not None else None):
            return f"the slots hold {self._staged or 'a version in the making'}, not {grant.version}"
        return ""

    async def _push(self, grant: OpenGrant) -> None:
        """Write what is granted; each peer's end is told, and what went wrong on this side."""
        ends = time.monotonic() + grant.grant.deadline_seconds
        sender, filling = self._senders.current, self._filling
        try:
            digests = await self._digests(grant.grant.version) if filling is None else {}
            if objection := self._objection(grant):
                grant.leave((), objection, "trainer")
                return
            sizes = self._shares.sizes
            grant.leave(sizes)
            for member, reason in closed_to(grant, self._grants).items():
                grant.ended(not_written(member, reason))
            members = [member for member in grant.grant.members if member in grant.open]
            remaining = max(0.0, ends - time.monotonic())
            if members and filling is not None:
                tell = partial(self._ended, grant, sizes)
                await write_ahead(sender, grant, members, remaining, filling, self._digests, tell)
            elif members:
                ended = partial(self._ended, grant, sizes, digests)
                await sender.write(grant.grant.round, members, remaining, ended)
        except Exception as error:
            # Without CLOSED the peers' memory would count as in reach of this grant until this process ends.
            log.exception("%s: round %s", self._who, grant.grant.round)
            fault, retry = blame(error, self.here)
            why = str(error) if isinstance(error, AgentError) else repr(error)
            grant.leave(sender.in_flight(), why, fault, retry=retry)

    async def _digests(self, version: Version) -> Mapping[Member, Digest]:
        async with self._computing:  # seconds on the CPU, if no edge was known when the slots were filled
            return (await computed(lambda: self._read(version))).digests

    def _ended(
        self, grant: OpenGrant, sizes: Mapping[Member, int], digests: Mapping[Member, Digest], end: HandedOver
    ) -> None:
        error = end.error
        if not error and end.bytes != sizes[end.member]:
            error = f"{end.bytes} bytes were written to {end.member}, which is owed {sizes[end.member]}"
        if error:
            log.warning("%s: round %s: %s", self._who, grant.grant.round, error)
        digest = digests.get(end.member, NO_BYTES)
        moved = end.bytes, end.descriptors, end.seconds
        grant.ended(PeerTransfer(end.member, *moved, digest, clean(error), end.link, end.by))
        self._forget_closed()

    def _stop(self, abort: Abort) -> None:
        """What was posted cannot be taken back; CLOSED follows when it has ended."""
        grant = self._grants.get(abort.round)
        if grant is None:
            return
        reason = f"the daemon ended it: {abort.reason}"
        members = grant.stop(abort.members or grant.grant.members, reason)
        for sender in self._senders:
            sender.stop(members, reason)
        if grant.final and grant in self._waiting:
            self._waiting.remove(grant)
        self._forget_closed()

    def _forget_closed(self) -> None:
        for name, grant in list(self._grants.items()):
            if grant.final:
                self._closed = self._grants.pop(name)

    def _read(self, version: Version) -> Reading:
        """Of the bytes that each peer is owed; read once per version and plan."""
        fingerprint, known = self._fingerprint, self._reading
        if known is None or known[:2] != (fingerprint, version):
            known = self._reading = (fingerprint, version, self._shares.read() if fingerprint else NOT_READ)
        return known[2]

    def _in_use(self, edges: Callable[[OpenGrant], set[Member]] = lambda grant: grant.open) -> str:
        """Which edge still reads the slots, or may; empty if none of ``edges`` does."""
        for grant in self._grants.values():
            if members := edges(grant):
                return f"edge to {min(members)} has not ended (round {grant.grant.round})"
        return ""

    def _settle(self, outcome: Outcome) -> None:
        waiting = self._outcome
        if waiting is None or waiting.done() or outcome.version != self._staged or outcome.restaged != self._restaged:
            return  # the outcome of an earlier staging may be told twice
        if outcome.committed:
            waiting.set_result(outcome.sequence)
        else:
            waiting.set_exception(PublishError(outcome.reason))
