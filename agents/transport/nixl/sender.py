"""NIXL at a trainer rank: an edge to each peer, prepared once for all rounds, over which the slots are written."""

import asyncio
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from weightsync.agents.link.beside import computed
from weightsync.agents.tables.runs import pack_table, tensor_names
from weightsync.agents.transport.interface import HandedOver, PushError, Sender, SourceMemory
from weightsync.agents.transport.nixl.edge import Edge
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.agents.transport.nixl.errors import TransferError
from weightsync.agents.transport.nixl.open import open_endpoint
from weightsync.agents.transport.shares import Share
from weightsync.kernels.copy import PreparedCopy
from weightsync.kernels.copy import prepare as prepare_copy
from weightsync.orchestrator.protocol.layout import Matrix
from weightsync.orchestrator.protocol.messages import NixlSettings
from weightsync.orchestrator.protocol.names import Member

WARM_UP_SECONDS: Final = 10.0
"""For the first word to every peer. Wiring takes 5–20 ms an edge; a peer that is busy polls late, a dead one never."""


@dataclass(frozen=True, slots=True)
class _Way:
    """The prepared way to one peer. ``edge`` is None for a peer that is owed no bytes."""

    share: Share
    pack: PreparedCopy | None
    edge: Edge | None


class NixlSender(Sender):
    """See ``transport.interface``."""

    def __init__(self, memory: SourceMemory) -> None:
        self._memory = memory
        self._endpoint: NixlEndpoint | None = None
        self._ways: dict[Member, _Way] = {}
        self._describe = tensor_names(memory.layout)
        arena = memory.arenas[0]
        # Of its own, so that packing does not queue behind the kernels of the training.
        self._stream = torch.cuda.Stream(arena.device) if arena.is_cuda else None  # type: ignore[no-untyped-call]

    def open(self, settings: NixlSettings) -> None:
        if self._endpoint is not None:
            return  # backends and ports of an open endpoint cannot be changed
        endpoint = open_endpoint(str(self._memory.member), settings, self._memory.arenas[0].device)
        endpoint.register(self._memory.layout.regions)
        self._endpoint = endpoint

    def announcement(self) -> tuple[str, bytes]:
        return self._opened.name, self._opened.metadata()

    async def connect(self, shares: Sequence[Share]) -> None:
        """Prepare the edges and warm them up. Edges of unchanged shares are kept as they are.

        Raises:
            NixlError: a peer's memory or metadata is refused, or a peer did not take the first word.
        """
        self._leave(shares)
        for share in shares:
            old = self._ways.get(share.peer.member)
            if old is not None and old.share is share:
                continue
            # Seconds for hundreds of thousands of copies, and the loop has heartbeats to answer.
            table = await computed(partial(pack_table, share.copies, self._memory.layout))
            # Out first, so that whatever stops this leaves no way behind whose edge is gone.
            self._ways.pop(share.peer.member, None)
            self._ways[share.peer.member] = self._way(share, table, old)
            await asyncio.sleep(0)  # an edge of thousands of tensors takes 0.2 s; heartbeats are answered between two
        edges = [way.edge for way in self._ways.values() if way.edge is not None]
        results = await self._opened.warm_up(edges, WARM_UP_SECONDS)
        failed = next((result.error for result in results if result.error is not None), None)
        if failed is not None:
            raise failed

    async def write(
        self, members: Sequence[Member], deadline_seconds: float, groups: Collection[int] | None = None
    ) -> tuple[HandedOver, ...]:
        """Gather what travels packed, write, and wait until all is DONE.

        Raises:
            PushError: some peers were not written in time or are gone.
        """
        until = time.monotonic() + deadline_seconds
        ways = [self._ways[member] for member in members if member in self._ways]
        self._gather(ways)
        edges = [way.edge for way in ways if way.edge is not None]
        remaining = max(until - time.monotonic(), 0.0)
        results = iter(await self._opened.write(edges, groups=groups, deadline_seconds=remaining))
        moved: list[HandedOver] = []
        failures: dict[Member, TransferError] = {}
        for way in ways:
            member = way.share.peer.member
            if way.edge is None:
                moved.append(HandedOver(member, 0))
                continue
            result = next(results)
            if result.error is not None:
                failures[member] = result.error
            else:
                moved.append(HandedOver(member, result.bytes, result.descriptors, result.seconds))
        if failures:
            raise PushError(tuple(moved), failures)
        return tuple(moved)

    def in_flight(self) -> bool:
        return self._endpoint is not None and bool(self._endpoint.tainted_peers)

    def poll(self) -> None:
        if self._endpoint is not None:
            self._endpoint.poll()

    def close(self) -> None:
        if self._endpoint is not None:
            self._endpoint.close()

    # ------------------------------------------------------------------------------------------------- internals
    @property
    def _opened(self) -> NixlEndpoint:
        assert self._endpoint is not None, "open() comes first"
        return self._endpoint

    def _leave(self, shares: Sequence[Share]) -> None:
        """Give back ways that the new plan does not have, and forget processes that a newer one has replaced."""
        now = {share.peer.member: share.peer for share in shares}
        for member, way in list(self._ways.items()):
            name = way.share.peer.endpoint_name
            replaced = member in now and now[member].endpoint_name != name
            if way.edge is not None and (member not in now or replaced):
                self._opened.release_edge(way.edge)
            if replaced:
                self._opened.forget(name)
            if replaced or member not in now:
                del self._ways[member]

    def _way(self, share: Share, packing: Matrix, old: _Way | None) -> _Way:
        arenas = self._memory.arenas
        pack = prepare_copy(arenas, arenas, packing) if len(packing) else None
        return _Way(share, pack, self._edge(share, old) if share.bytes else None)

    def _edge(self, share: Share, old: _Way | None) -> Edge:
        peer = share.peer
        if old is not None and old.edge is not None and old.share.peer.endpoint_name == peer.endpoint_name:
            self._opened.release_edge(old.edge)
        self._opened.connect(peer.endpoint_name, peer.endpoint)
        return self._opened.prepare_edge(
            peer.endpoint_name,
            self._memory.layout.regions,
            peer.regions,
            share.runs,
            groups=share.groups,
            describe=self._describe,
        )

    def _gather(self, ways: Sequence[_Way]) -> None:
        """Collect packed bytes in the staging region; they are there when this returns."""
        packs = [way.pack for way in ways if way.pack is not None]
        with torch.cuda.stream(self._stream):
            for pack in packs:
                pack()
        if packs and self._stream is not None:
            self._stream.synchronize()
