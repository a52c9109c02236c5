"""What an inference rank writes to others when the daemon grants it: the version that it serves, from live memory, or
one that it has verified and does not serve yet, from its standby.

It lends beside serving, as a trainer rank writes beside training: nothing of what it reads changes meanwhile, since
nobody is granted to write there before it has closed. Its end of the transport is one of its own, so that what is
registered for reading is not what trainer ranks are told of.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Final

from weightsync.agents.errors import AgentError, blame
from weightsync.agents.inference.holdings import Holdings
from weightsync.agents.inference.weights import LiveWeights
from weightsync.agents.link.beside import computed
from weightsync.agents.link.edges import EdgesBeside
from weightsync.agents.link.side import Link
from weightsync.agents.transport.grants import OpenGrant, closed_to, not_written
from weightsync.agents.transport.interface import HandedOver, Sender, SourceMemory
from weightsync.agents.transport.registry import Ends
from weightsync.agents.transport.shares import Share, Shares
from weightsync.orchestrator.protocol.edges import PeerTransfer
from weightsync.orchestrator.protocol.limits import MAX_OPEN_GRANTS
from weightsync.orchestrator.protocol.messages import Abort, Closed, Connect, Fault, Grant, Welcome
from weightsync.orchestrator.protocol.names import NO_BYTES, Digest, Member, RoundName
from weightsync.orchestrator.protocol.text import clean

log = logging.getLogger(__name__)

UNREAD: Final = "this rank does not lend: the transport cannot read its memory"


class Lending:
    """One worker's, for as long as it lives. Everything is called on the agent's thread.

    ``weights``: what is served. ``holdings``: which version that is.
    """

    here: Fault = "engine"

    def __init__(self, weights: LiveWeights, holdings: Holdings) -> None:
        self._weights = weights
        self._holdings = holdings
        self._link: Link | None = None
        self._member: Member | None = None
        self._senders: Ends[Sender] | None = None
        """None: nothing is lent."""
        self._shares: Shares
        """Of what is lent by the present edges …"""
        self._read = ""
        """… and the Connect by which that has landed, if it is the standby; empty for what is served."""
        self._owed: Sequence[Share] = ()
        self._fingerprint = ""
        self._computing = asyncio.Lock()
        """Held while another thread uses the shares."""
        self._edges: EdgesBeside | None = None
        self._grants: dict[RoundName, OpenGrant] = {}
        """Not closed towards everybody yet."""
        self._closed: OpenGrant | None = None
        """The one that was closed last."""
        self._welcome: Welcome | None = None
        """The last one."""

    def attach(self, link: Link, member: Member) -> None:
        """``link`` is the thread that this runs on from now on; the grants that are open stay so."""
        self._link, self._member = link, member
        self._computing = asyncio.Lock()
        self._edges = EdgesBeside(link, member, self)
        if self._senders is not None:
            for grant in list(self._grants.values()):  # what was at work on it has ended with its thread
                grant.leave(self._senders.current.in_flight(), "the agent of this worker was replaced", "engine")
            self._forget_closed()

    def welcomed(self, welcome: Welcome) -> None:
        """Open what is needed to lend, if the daemon wants it. What keeps it from that costs the lending only."""
        layout, self._welcome = self._weights.layout, welcome
        if not welcome.lends or layout.expert_map:
            return  # experts move while the engine serves
        assert self._member is not None, "attach() comes first"
        try:
            if self._senders is None:
                rows = len(layout.matrix())
                memory = SourceMemory(self._member, 1, layout, self._weights.tensors, (False,) * rows)
                senders: Ends[Sender] = Ends(lambda transport: transport.sender(memory))
                self._shares = Shares(layout, memory.arenas)
                senders.open(welcome.transport)
                self._senders = senders
            else:
                self._senders.open(welcome.transport)
        except AgentError as error:
            log.warning("%s cannot lend what it serves: %s", self._member, error)

    def renew(self) -> None:
        """Other memory has taken the place of the landing; no grant is open. What is lent is lent by another end."""
        for sender in self._senders or ():
            sender.close()
        self._senders, self._fingerprint, self._read = None, "", ""
        if self._welcome is not None:
            self.welcomed(self._welcome)

    def announcement(self) -> tuple[str, bytes]:
        """Name and metadata of the end by which it writes; empty if it does not."""
        return self._senders.current.announcement() if self._senders is not None else ("", b"")

    @property
    def open_rounds(self) -> tuple[RoundName, ...]:
        """Of the grants that are not closed."""
        return tuple(self._grants)

    # --------------------------------------------------------------------------------------------------------- edges
    def prepare(self, connect: Connect) -> None:
        """The edges of another feed, told with Ready; an empty one gives them back."""
        assert self._edges is not None, "attach() comes first"
        self._edges.prepare(connect)

    async def connect(self, connect: Connect) -> Mapping[Member, Exception]:
        """See ``link.side.AgentSide``."""
        if self._senders is None:
            raise AgentError(UNREAD)
        if self._fingerprint != connect.fingerprint or not connect.peers:
            self._fingerprint = ""  # no grant is obeyed until these edges are ready
            async with self._computing:
                if connect.landed != self._read or connect.landed:
                    self._shares = await computed(lambda: self._reading(connect))
                    self._read = connect.landed
                self._owed = await computed(lambda: self._shares.replan(connect))
        failed = await self._senders.current.connect(self._owed)
        self._fingerprint = connect.fingerprint
        return failed

    def _reading(self, connect: Connect) -> Shares:
        if connect.landed:
            return Shares(*self._weights.standby(connect.landed))
        return Shares(self._weights.layout, self._weights.tensors)

    # -------------------------------------------------------------------------------------------------------- grants
    def granted(self, message: Grant) -> None:
        """Write what it serves to the members of the grant, once."""
        assert self._link is not None
        known = self._grants.get(message.round, self._closed)
        if known is not None and known.grant.round == message.round:
            known.repeat()  # said again after a reconnect, it is one grant
            return
        grant = OpenGrant(message, self._say)
        if len(self._grants) >= MAX_OPEN_GRANTS:
            grant.leave((), f"{len(self._grants)} grants to lend have not ended", "network")
            return
        self._grants[message.round] = grant
        self._link.spawn(self._push(grant))

    def stop(self, abort: Abort) -> bool:
        """Post nothing more of that round; whether this rank lends in it."""
        grant = self._grants.get(abort.round)
        if grant is not None and self._senders is not None:
            reason = f"the daemon ended it: {abort.reason}"
            self._senders.current.stop(grant.stop(abort.members or grant.grant.members, reason), reason)
            self._forget_closed()
        return grant is not None

    def changes(self) -> None:
        """Another version is about to land here, perhaps where chunks are packed: nothing more is posted."""
        for name, grant in list(self._grants.items()):
            self.stop(Abort(round=name, torn=False, reason="another version lands here", members=tuple(grant.open)))

    def _say(self, closed: Closed) -> None:
        assert self._link is not None
        self._link.say_once(closed)

    def _objection(self, opened: OpenGrant) -> str:
        grant, status = opened.grant, self._holdings.status
        assert self._link is not None
        if grant.round.epoch != self._link.epoch:
            return f"grant of epoch {grant.round.epoch}; this agent obeys epoch {self._link.epoch}"
        if grant.fingerprint != self._fingerprint:
            return f"grant for the edges {grant.fingerprint[:12]}; this rank has {self._fingerprint[:12] or 'none'}"
        if self._read:
            by = f"this rank has {status.standby or 'nothing'} in its standby, not {grant.version}"
            return by if status.standby != grant.version else ""
        if status.whole != grant.version:
            torn = ", torn" if status.torn else ""
            return f"this rank holds {status.applied or 'no version'}{torn}, not {grant.version}"
        return ""

    async def _push(self, grant: OpenGrant) -> None:
        """Each peer's end is told, and what went wrong on this side."""
        ends = time.monotonic() + grant.grant.deadline_seconds
        if self._senders is None:
            grant.leave((), UNREAD, "engine", retry=False)
            self._forget_closed()
            return
        sender = self._senders.current
        try:
            digests: Mapping[Member, Digest] = {}
            if not self._objection(grant):
                async with self._computing:
                    digests = (await computed(self._shares.read)).digests
            if objection := self._objection(grant):
                grant.leave((), objection, "engine")
                return
            sizes = self._shares.sizes
            grant.leave(sizes)
            for member, reason in closed_to(grant, self._grants).items():
                grant.ended(not_written(member, reason))

            def ended(end: HandedOver) -> None:
                error = end.error
                if not error and end.bytes != sizes[end.member]:
                    error = f"{end.bytes} bytes were written to {end.member}, which is owed {sizes[end.member]}"
                digest = digests.get(end.member, NO_BYTES)
                moved = end.bytes, end.descriptors, end.seconds
                grant.ended(PeerTransfer(end.member, *moved, digest, clean(error), end.link, end.by))
                self._forget_closed()

            members = [member for member in grant.grant.members if member in grant.open]
            grant.posting = True
            if members:
                await sender.write(grant.grant.round, members, max(0.0, ends - time.monotonic()), ended)
        except Exception as error:
            # Without CLOSED the peers' memory would count as in reach of this grant until this process ends.
            log.exception("%s: round %s", self._member, grant.grant.round)
            fault, retry = blame(error, self.here)
            why = str(error) if isinstance(error, AgentError) else repr(error)
            grant.leave(sender.in_flight(), why, fault, retry=retry)
        finally:
            self._forget_closed()

    def _forget_closed(self) -> None:
        for name, grant in list(self._grants.items()):
            if grant.final:
                self._closed = self._grants.pop(name)

    def poll(self) -> bool:
        """Let the transport make progress; whether a grant is open."""
        if self._senders is None:
            return False
        changed = [sender.poll() for sender in self._senders]
        if any(changed) and self._edges is not None:
            self._edges.changed()
        return bool(self._grants)
