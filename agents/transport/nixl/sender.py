"""NIXL at a trainer rank: an edge to each peer, prepared once for all rounds, over which the slots are written."""

import asyncio
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from weightsync.agents.errors import blame
from weightsync.agents.link.beside import computed
from weightsync.agents.tables.cargo import plain_runs
from weightsync.agents.tables.runs import tensor_names
from weightsync.agents.transport.filling import Filled, whole
from weightsync.agents.transport.interface import Ended, HandedOver, Sender, SourceMemory
from weightsync.agents.transport.nixl.cargo import Cargo, make_cargo
from weightsync.agents.transport.nixl.edge import Edge, EdgeResult, Retries
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.agents.transport.nixl.errors import (
    ConnectError,
    MetadataError,
    NixlError,
    TransferError,
)
from weightsync.agents.transport.nixl.flow import Loading, Packer, packing_stream
from weightsync.agents.transport.nixl.notices import Notice
from weightsync.agents.transport.nixl.open import bind, open_endpoint
from weightsync.agents.transport.nixl.ring import PackingRing
from weightsync.agents.transport.shares import Share
from weightsync.orchestrator.protocol.landing import Berth
from weightsync.orchestrator.protocol.layout import Layout, Region
from weightsync.orchestrator.protocol.messages import NixlSettings
from weightsync.orchestrator.protocol.names import Member, RoundName

log = logging.getLogger(__name__)

FIRST_WORD_SECONDS: Final = 5.0
"""For new peers to take the first word, until those that have not are named and the others used. Wiring takes 5–20 ms
an edge; a peer that is busy polls late, a dead one never."""

WORD_POLL_SECONDS: Final = 0.001

KEPT_ABSENT: Final = 64
"""Peers that have left the plan and stay connected, for one that comes back alive: a live one that is forgotten leaks
two descriptors. Engines that scale come back under ever new names, and each would stay for good."""


@dataclass(frozen=True, slots=True)
class _Way:
    """The prepared way to a peer that has taken the first word. ``edge`` is None for one that is owed no bytes."""

    share: Share
    edge: Edge | None


class NixlSender(Sender):
    """See ``transport.interface``.

    Each peer of the plan is in one of two places: ``_ways``, ready to be written to, or ``_failed`` with the reason,
    and then nothing of it is left but what is in flight.
    """

    writes_ahead = True

    def __init__(self, memory: SourceMemory) -> None:
        self._memory = memory
        self._endpoint: NixlEndpoint | None = None
        self._shares: Mapping[Member, Share] = {}
        self._ways: dict[Member, _Way] = {}
        self._failed: dict[Member, Exception] = {}
        self._names: dict[Member, str] = {}
        """Of the endpoint that each member had last, in this plan or in one before; those of this plan come last."""
        self._cargoes: dict[Share, Cargo | None] = {}
        """Of this plan, as far as they are made: they outlive the connections."""
        self._silent: set[str] = set()
        """Endpoints that have let the time for the first word pass."""
        self._changed = False
        self._given_up: frozenset[str] = frozenset()
        """Peers to which a write was given up and has not ended, at the last look."""
        self._describe = tensor_names(memory.layout)
        arena, layout = memory.arenas[0], memory.layout
        self._packer = Packer(packing_stream(arena.device) if arena.is_cuda else None)
        self._ring = PackingRing(layout.regions[layout.staging]) if layout.staging >= 0 else None
        self._writes: list[Retries] = []
        self._loadings: list[Loading] = []
        """Of the writes under way."""

    def open(self, settings: NixlSettings) -> None:
        device = self._memory.arenas[0].device
        if self._endpoint is not None:
            if device.type == "cuda":
                bind(device)  # the agent's thread may be another than the one that opened it
            return  # backends and ports of an open endpoint cannot be changed
        endpoint = open_endpoint(str(self._memory.member), settings, device)
        endpoint.register(readable(self._memory.layout))
        endpoint.heard = self._heard
        self._endpoint = endpoint

    def announcement(self) -> tuple[str, bytes]:
        return self._opened.name, self._opened.metadata()

    async def connect(self, shares: Sequence[Share]) -> Mapping[Member, Exception]:
        """Prepare the edges that are not. Those of unchanged shares are kept as they are."""
        self._leave(shares)
        await self._prepare([share for share in shares if self._lacks(share)], FIRST_WORD_SECONDS)
        left = self._ways.keys() & set(self.in_flight())
        return self._failed | {member: _not_ended(member) for member in left}

    async def _prepare(self, asked: Sequence[Share], seconds: float) -> None:
        """Try each of ``asked``, again for so long while its peer has yet to take the first word. Whoever else wants
        ways at the same time, of these or others, does not wait: a write that has lost a connection, another plan."""
        ends = time.monotonic() + seconds
        while asked:
            silent = []
            for share in asked:
                if await self._try(share):
                    silent.append(share)
                await asyncio.sleep(0)  # an edge of thousands of tensors takes 0.2 s; heartbeats pass between two
            asked = [share for share in silent if share.peer.endpoint_name not in self._silent]
            if asked and time.monotonic() >= ends:
                self._silent |= {share.peer.endpoint_name for share in asked}
                break
            await asyncio.sleep(WORD_POLL_SECONDS if asked else 0)

    async def write(
        self,
        round_name: RoundName,
        members: Sequence[Member],
        deadline_seconds: float,
        ended: Ended,
        filled: Filled = whole,
    ) -> None:
        """Pack what travels packed, write, and wait until every edge has ended or is given up."""
        until = time.monotonic() + deadline_seconds
        ways: dict[str, _Way] = {}
        for member in members:
            way = self._ways.get(member)
            if way is not None and way.edge is not None:
                ways[way.share.peer.endpoint_name] = way
            elif member in self._shares:
                ended(HandedOver(member, 0, error="" if way is not None else self._why_not(member)))

        def again(name: str) -> None:
            write.tries.append(asyncio.ensure_future(self._write_anew(ways[name].share, write, loading)))

        told = lambda result: self._told(ways[result.peer].share.peer.member, result, ended)  # noqa: E731
        write, loading = Retries(until, told, again), Loading(round_name, self._ring, self._packer, filled)
        self._writes.append(write)
        self._loadings.append(loading)
        try:
            await self._write([way.edge for way in ways.values() if way.edge is not None], write, loading)
            await write.tried()
        finally:
            self._writes.remove(write)
            self._loadings.remove(loading)
            await write.give_up()

    async def _write(self, edges: Sequence[Edge], write: Retries, loading: Loading) -> None:
        seconds = write.left_seconds
        results = await self._opened.write(edges, loading=loading, deadline_seconds=seconds, ended=write.ended)
        self._changed = self._changed or any(result.error is not None for result in results)

    def _told(self, member: Member, result: EdgeResult, ended: Ended) -> None:
        self._changed = self._changed or result.error is not None
        error, taken = str(result.error or ""), self._opened.way_to(result.peer)
        ended(HandedOver(member, result.bytes, result.descriptors, result.seconds, error, link=taken.link, by=taken.by))

    async def _write_anew(self, share: Share, write: Retries, loading: Loading) -> None:
        """Over another connection in the place of one that broke, what has not arrived; the others' edges go on."""
        member, name = share.peer.member, share.peer.endpoint_name
        edge: Edge | None = None
        try:
            self._give_back({member})
            await self._prepare([share], min(FIRST_WORD_SECONDS, write.left_seconds))
            way = self._ways.get(member)
            if name in write.broken and way is not None and way.edge is not None and way.share is share:
                edge, way.edge.before = way.edge, write.broken.pop(name)
        finally:
            write.try_no_more({name})
        if edge is not None and edge.before is not None:
            log.warning("%s: the edge broke and is written to anew over another connection", edge.before.error)
            await self._write([edge], write, loading)

    def stop(self, members: Collection[Member], reason: str) -> None:
        names = {self._names[member] for member in members if member in self._names}
        for write in self._writes:
            write.stop(names)
        self._opened.stop(names, reason)

    def in_flight(self) -> Sequence[Member]:
        left = self._endpoint.tainted_peers if self._endpoint is not None else {}
        return [member for member, name in self._names.items() if name in left]

    def poll(self) -> bool:
        if self._endpoint is None:
            return False
        self._endpoint.poll()
        given_up = frozenset(self._endpoint.tainted_peers)
        self._changed = self._changed or not given_up <= self._given_up
        self._given_up = given_up
        for name in [name for name in self._silent if self._has_answered(name)]:
            self._silent.discard(name)
            self._changed = True
        changed, self._changed = self._changed, False
        return changed

    def close(self) -> None:
        if self._endpoint is not None:
            self._endpoint.close()

    # ------------------------------------------------------------------------------------------------- internals
    @property
    def _opened(self) -> NixlEndpoint:
        assert self._endpoint is not None, "open() comes first"
        return self._endpoint

    def _leave(self, shares: Sequence[Share]) -> None:
        """Give back ways that the new plan does not have or that are broken; forget processes that are replaced."""
        now = {share.peer.member: share for share in shares}
        kept = {member for member, share in self._shares.items() if now.get(member) is share}
        self._failed = {member: error for member, error in self._failed.items() if member in kept}
        self._cargoes = {share: cargo for share, cargo in self._cargoes.items() if now.get(share.peer.member) is share}
        self._give_back(kept, self._ways.keys() - kept)
        for member, share in now.items():
            name = share.peer.endpoint_name
            known = self._names.pop(member, name)
            if known != name and known in self._opened.tainted_peers and not self._is_replaced(known, share):
                name = known  # what is in flight to it may still arrive
            elif known != name:
                self._forget(known)
            self._names[member] = name
        left = self.in_flight()
        absent = [member for member in self._names if member not in now and member not in left]
        for member in absent[: max(0, len(absent) - KEPT_ABSENT)]:
            self._forget(self._names.pop(member))
        self._shares = now

    def _give_back(self, broken: Collection[Member], others: Collection[Member] = ()) -> None:
        """The ways to those of ``broken`` whose connection has broken, and to ``others``."""
        left = set(self.in_flight())
        for member, way in list(self._ways.items()):
            lost = way.edge is not None and way.edge.broken and member not in left
            if member not in others and not (lost and member in broken):
                continue
            del self._ways[member]  # first: an edge that is given back must not be used, whatever fails from here on
            if way.edge is not None:
                self._opened.stop({way.edge.peer}, "the plan has changed")
                self._opened.release_edge(way.edge)
            if lost:
                self._forget(way.share.peer.endpoint_name)

    def _lacks(self, share: Share) -> bool:
        """Whether a try may give ``share`` a way that it has not."""
        member = share.peer.member
        return member not in self._ways and (member not in self._failed or blame(self._failed[member], "trainer")[1])

    async def _try(self, share: Share) -> bool:
        """One step towards a way for ``share``; whether its peer has yet to take the first word."""
        member, name = share.peer.member, share.peer.endpoint_name
        if not self._wants(share):
            return False
        try:
            if share.bytes:
                if self._names[member] in self._opened.tainted_peers:
                    raise _not_ended(member)
                self._opened.connect(name, share.peer.endpoint)
                if not self._opened.warm(name):
                    self._failed[member] = ConnectError(f"{member} does not answer: it has not taken the first word")
                    return True
                if share.peer.berth is not None and share not in self._cargoes:
                    await self._make_cargo(share, share.peer.berth)
                    return await self._try(share)  # it may have another connection by now, or be in no plan
            self._ways[member] = self._way(share)
        except Exception as error:  # whatever it is, it is named, and costs this edge only
            if self._shares.get(member) is share:
                self._failed[member] = error
            if isinstance(error, TransferError):
                self._forget(name)
        else:
            self._failed.pop(member, None)
            self._silent.discard(name)
        return False

    def _wants(self, share: Share) -> bool:
        """Whether it is of the plan, and nobody else has made its way meanwhile."""
        return self._shares.get(share.peer.member) is share and share.peer.member not in self._ways

    async def _make_cargo(self, share: Share, berth: Berth) -> None:
        peer = share.peer
        # Seconds for hundreds of thousands of copies, and the loop has heartbeats to answer.
        made = partial(make_cargo, share.copies, share.runs, berth, share.layout, share.arenas, peer.regions)
        cargo = await computed(made)
        if self._shares.get(peer.member) is share:
            self._cargoes[share] = cargo

    def _way(self, share: Share) -> _Way:
        if not share.bytes:
            return _Way(share, None)
        peer, cargo = share.peer, self._cargoes.get(share)
        runs = plain_runs(share.runs, peer.berth)
        edge = self._opened.prepare_edge(
            peer.endpoint_name, share.layout.regions, peer.regions, runs, cargo=cargo, describe=self._describe
        )
        return _Way(share, edge)

    def _heard(self, peer: str, notice: Notice) -> None:
        for loading in self._loadings:
            loading.heard(peer, notice)

    def _forget(self, name: str) -> None:
        self._silent.discard(name)
        self._opened.forget(name)

    def _is_replaced(self, known: str, share: Share) -> bool:
        try:
            return self._opened.is_replaced(known, share.peer.endpoint_name, share.peer.endpoint)
        except MetadataError:
            return False  # and the way to the new one fails by the same

    def _has_answered(self, name: str) -> bool:
        """Whether a new try may do more than the last one, now that the first word is taken or refused."""
        try:
            return self._opened.warm(name)
        except NixlError:
            return True

    def _why_not(self, member: Member) -> str:
        return f"there is no edge to {member}: {self._failed.get(member, 'it is being prepared')}"


def readable(layout: Layout) -> Sequence[Region]:
    """What is written from: of an engine whose weights lie in pages its ring alone, by which all of it is packed."""
    if layout.lands != "flip":
        return layout.regions
    return [layout.regions[layout.staging]] if layout.staging >= 0 else []


def _not_ended(member: Member) -> NixlError:
    return ConnectError(f"edge to {member} has not ended: an earlier write may still reach its memory")
