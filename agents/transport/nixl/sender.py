"""NIXL at a trainer rank: an edge to each peer, prepared once for all rounds, over which the slots are written."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from weightsync.agents.errors import blame
from weightsync.agents.link.beside import computed
from weightsync.agents.tables.cargo import plain_runs
from weightsync.agents.tables.runs import tensor_names
from weightsync.agents.transport.filling import Filled, whole
from weightsync.agents.transport.interface import Ended, HandedOver, Sender, SourceMemory
from weightsync.agents.transport.nixl.cargo import make_cargo
from weightsync.agents.transport.nixl.edge import Edge, EdgeResult
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.agents.transport.nixl.errors import (
    ConnectError,
    DisconnectedError,
    MetadataError,
    NixlError,
    TransferError,
)
from weightsync.agents.transport.nixl.flow import Loading, Packer
from weightsync.agents.transport.nixl.notices import Notice
from weightsync.agents.transport.nixl.open import bind, open_endpoint
from weightsync.agents.transport.nixl.ring import PackingRing
from weightsync.agents.transport.shares import Share
from weightsync.orchestrator.protocol.layout import Layout, Region
from weightsync.orchestrator.protocol.messages import NixlSettings
from weightsync.orchestrator.protocol.names import Member, RoundName

log = logging.getLogger(__name__)

FIRST_WORD_SECONDS: Final = 5.0
"""For new peers to take the first word, until those that have not are named and the others used. Wiring takes 5–20 ms
an edge; a peer that is busy polls late, a dead one never."""

WORD_POLL_SECONDS: Final = 0.001

TRIES: Final = 3
"""Connections over which one write to one peer is tried."""

KEPT_ABSENT: Final = 64
"""Peers that have left the plan and stay connected, for one that comes back alive: a live one that is forgotten leaks
two descriptors. Engines that scale come back under ever new names, and each would stay for good."""


@dataclass(frozen=True, slots=True)
class _Way:
    """The prepared way to a peer that has taken the first word. ``edge`` is None for one that is owed no bytes."""

    share: Share
    edge: Edge | None


class _Write:
    """One ``write``: how its edges end. One that breaks is not told of while it may be tried again.

    Args:
        until: its deadline, on ``time.monotonic``'s clock.
        tell: told of each edge once.
        again: asked to try one again that broke, by its endpoint.

    Attributes:
        broken: by endpoint, what became of edges whose connection broke, and that nothing is in flight over.
        stopped: endpoints that nothing more is posted to.
        tries: under way, of those that broke.
    """

    def __init__(self, until: float, tell: Callable[[EdgeResult], None], again: Callable[[str], None]) -> None:
        self.tell = tell
        self.broken: dict[str, EdgeResult] = {}
        self.stopped: set[str] = set()
        self.tries: list[asyncio.Task[None]] = []
        self._until = until
        self._again = again
        self._tried: Counter[str] = Counter()
        self._over = False

    @property
    def left_seconds(self) -> float:
        return max(self._until - time.monotonic(), 0.0)

    def ended(self, result: EdgeResult) -> None:
        """Nothing is in flight over an edge."""
        name, error = result.peer, result.error
        # Stopped, late or given up: the connection is none the worse, or the bytes may still arrive.
        broke = error is not None and error.retry and type(error) in (TransferError, DisconnectedError)
        self._tried[name] += 1
        late = self._over or not self.left_seconds or name in self.stopped
        if broke and not late and self._tried[name] < TRIES:
            self.broken[name] = result
            self._again(name)
        else:
            self.tell(result)

    def give_up(self) -> None:
        """Nothing is tried again; what is in flight is told of when it has ended."""
        self._over = True
        for task in self.tries:
            task.cancel()
        for name in list(self.broken):
            self.tell(self.broken.pop(name))


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
        self._silent: set[str] = set()
        """Endpoints that have let the time for the first word pass."""
        self._changed = False
        self._given_up: frozenset[str] = frozenset()
        """Peers to which a write was given up and has not ended, at the last look."""
        self._describe = tensor_names(memory.layout)
        arena, layout = memory.arenas[0], memory.layout
        # Of its own, so that packing does not queue behind the kernels of the training.
        self._packer = Packer(torch.cuda.Stream(arena.device) if arena.is_cuda else None)  # type: ignore[no-untyped-call]
        self._ring = PackingRing(layout.regions[layout.staging]) if layout.staging >= 0 else None
        self._writes: list[_Write] = []
        self._connecting = asyncio.Lock()
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
        async with self._connecting:  # a write that has lost a connection asks for another one, too
            return await self._connect(shares)

    async def _connect(self, shares: Sequence[Share]) -> Mapping[Member, Exception]:
        self._leave(shares)
        ends = time.monotonic() + FIRST_WORD_SECONDS
        asked = [share for share in shares if self._lacks(share)]
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
        left = self._ways.keys() & set(self.in_flight())
        return self._failed | {member: _not_ended(member) for member in left}

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
        write, loading = _Write(until, told, again), Loading(round_name, self._ring, self._packer, filled)
        self._writes.append(write)
        self._loadings.append(loading)
        try:
            await self._write([way.edge for way in ways.values() if way.edge is not None], write, loading)
            while write.tries:
                await write.tries.pop()
        finally:
            write.give_up()
            self._writes.remove(write)
            self._loadings.remove(loading)

    async def _write(self, edges: Sequence[Edge], write: _Write, loading: Loading) -> None:
        seconds = write.left_seconds
        results = await self._opened.write(edges, loading=loading, deadline_seconds=seconds, ended=write.ended)
        self._changed = self._changed or any(result.error is not None for result in results)

    def _told(self, member: Member, result: EdgeResult, ended: Ended) -> None:
        self._changed = self._changed or result.error is not None
        error, taken = str(result.error or ""), self._opened.way_to(result.peer)
        ended(HandedOver(member, result.bytes, result.descriptors, result.seconds, error, link=taken.link, by=taken.by))

    async def _write_anew(self, share: Share, write: _Write, loading: Loading) -> None:
        """Over another connection in the place of one that broke, what has not arrived; the others' edges go on."""
        member, name = share.peer.member, share.peer.endpoint_name
        await self.connect(list(self._shares.values()))
        way, before = self._ways.get(member), write.broken.pop(name, None)
        if before is None:
            return
        if way is None or way.edge is None or way.share is not share or name in write.stopped:
            write.tell(before)
            return
        log.warning("%s: the edge broke and is written to anew over another connection", before.error)
        way.edge.before = before
        await self._write([way.edge], write, loading)

    def stop(self, members: Collection[Member], reason: str) -> None:
        names = {self._names[member] for member in members if member in self._names}
        for write in self._writes:
            write.stopped |= names
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
        left = set(self.in_flight())
        for member, way in list(self._ways.items()):
            broken = way.edge is not None and way.edge.broken and member not in left
            if member in kept and not broken:
                continue
            del self._ways[member]  # first: an edge that is given back must not be used, whatever fails from here on
            if way.edge is not None:
                self._opened.stop({way.edge.peer}, "the plan has changed")
                self._opened.release_edge(way.edge)
            if broken:
                self._forget(way.share.peer.endpoint_name)
        for member, share in now.items():
            name = share.peer.endpoint_name
            known = self._names.pop(member, name)
            if known != name and known in self._opened.tainted_peers and not self._is_replaced(known, share):
                name = known  # what is in flight to it may still arrive
            elif known != name:
                self._forget(known)
            self._names[member] = name
        absent = [member for member in self._names if member not in now and member not in left]
        for member in absent[: max(0, len(absent) - KEPT_ABSENT)]:
            self._forget(self._names.pop(member))
        self._shares = now

    def _lacks(self, share: Share) -> bool:
        """Whether a try may give ``share`` a way that it has not."""
        member = share.peer.member
        return member not in self._ways and (member not in self._failed or blame(self._failed[member], "trainer")[1])

    async def _try(self, share: Share) -> bool:
        """One step towards a way for ``share``; whether its peer has yet to take the first word."""
        member, name = share.peer.member, share.peer.endpoint_name
        try:
            if share.bytes:
                if self._names[member] in self._opened.tainted_peers:
                    raise _not_ended(member)
                self._opened.connect(name, share.peer.endpoint)
                if not self._opened.warm(name):
                    self._failed[member] = ConnectError(f"{member} does not answer: it has not taken the first word")
                    return True
            self._ways[member] = await self._way(share)
        except Exception as error:  # whatever it is, it is named, and costs this edge only
            self._failed[member] = error
            if isinstance(error, TransferError):
                self._forget(name)
        else:
            self._failed.pop(member, None)
            self._silent.discard(name)
        return False

    async def _way(self, share: Share) -> _Way:
        if not share.bytes:
            return _Way(share, None)
        arenas, layout, peer = share.arenas, share.layout, share.peer
        cargo = None
        if peer.berth is not None:
            # Seconds for hundreds of thousands of copies, and the loop has heartbeats to answer.
            made = partial(make_cargo, share.copies, share.runs, peer.berth, layout, arenas, peer.regions)
            cargo = await computed(made)
        runs = plain_runs(share.runs, peer.berth)
        edge = self._opened.prepare_edge(
            peer.endpoint_name, layout.regions, peer.regions, runs, cargo=cargo, describe=self._describe
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
